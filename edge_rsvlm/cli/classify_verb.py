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


@click.command("classify")
@click.argument("images", nargs=-1, required=True)
@click.option("--labels", required=True, metavar="A,B,C", help="The classes to choose from, by words.")
@click.option("--output", type=click.Path(path_type=Path), help="GeoJSON file of tiles, or a folder for many inputs.")
@run_options
@json_option
def command(
    images: tuple[str, ...], labels: str, output: Path | None, as_json: bool, bundle: Path | None,
    allow_unsigned: bool, **limits: Any,
) -> None:  # fmt: skip
    """Say which class of scene images show. IMAGES are files, folders, globs or .tar archives of images.

    A scene larger than a tile gets scores per tile, and their mean weighted by valid area.
    """
    from edge_rsvlm.cli import orders
    from edge_rsvlm.cli.deliver import Delivery
    from edge_rsvlm.raster.inputs import list_inputs

    wanted = split_labels(labels)
    session = open_session(bundle, allow_unsigned, make_limits(**limits), ("classify",))
    code, sources = ExitCode(), list_inputs(images)
    outputs = Outputs(output, len(sources), ".geojson")
    delivery = Delivery(session, code, sys.stdout if as_json else None)
    for source in sources:
        delivery.deliver(orders.classify(session, source, wanted, outputs.path(source.name)))
    code.leave()
