from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from edge_rsvlm.cli.common import (
    ExitCode,
    Outputs,
    json_option,
    make_limits,
    open_session,
    run_options,
    split_labels,
)


@click.command("segment")
@click.argument("images", nargs=-1, required=True)
@click.option("--labels", required=True, metavar="A,B,C", help="What to look for, by words.")
@click.option("--output", type=click.Path(path_type=Path), help="GeoJSON file, or a folder for many inputs.")
@click.option(
    "--mask", type=click.Path(path_type=Path), help="Mask on the image's grid (.tif), or a folder for many inputs."
)
@run_options
@json_option
def command(
    images: tuple[str, ...], labels: str, output: Path | None, mask: Path | None, as_json: bool, bundle: Path | None,
    allow_unsigned: bool, **limits: Any,
) -> None:  # fmt: skip
    """Outline what words name, such as trees or water. IMAGES are files, folders, globs or .tar archives of images.

    A pixel is of its best label, or of none where no label is likely. In the mask the k-th label is k and the rest 0;
    its colour table and tags (LABEL_1 ...) say which is which.
    """
    from edge_rsvlm.cli import orders
    from edge_rsvlm.cli.deliver import Delivery
    from edge_rsvlm.raster.inputs import list_inputs

    wanted = split_labels(labels)
    session = open_session(bundle, allow_unsigned, make_limits(**limits), ("segment",))
    code, sources = ExitCode(), list_inputs(images)
    outputs, masks = Outputs(output, len(sources), ".geojson"), Outputs(mask, len(sources), ".tif")
    delivery = Delivery(session, code, sys.stdout if as_json else None)
    for source in sources:
        delivery.deliver(orders.segment(session, source, wanted, outputs.path(source.name), masks.path(source.name)))
    code.leave()
