from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from edge_rsvlm.cli.common import (
    ExitCode,
    Outputs,
    adapter_option,
    json_option,
    make_limits,
    make_sampling,
    open_session,
    run_options,
    sampling_options,
)


@click.command("caption")
@click.argument("images", nargs=-1, required=True)
@click.option("--output", type=click.Path(path_type=Path), help="GeoJSON file of tiles, or a folder for many inputs.")
@sampling_options
@adapter_option
@run_options
@json_option
def command(
    images: tuple[str, ...], output: Path | None, as_json: bool, bundle: Path | None, allow_unsigned: bool,
    adapter: str | None, **options: Any,
) -> None:  # fmt: skip
    """Describe images in a sentence. IMAGES are files, folders, globs or .tar archives of images.

    A scene larger than a tile also gets a sentence per tile, and a summary of them leads.
    """
    from edge_rsvlm.cli import orders
    from edge_rsvlm.cli.deliver import Delivery
    from edge_rsvlm.raster.inputs import list_inputs

    sampling = make_sampling(options)
    session = open_session(bundle, allow_unsigned, make_limits(**options), ("caption",), adapter)
    code, sources = ExitCode(), list_inputs(images)
    outputs = Outputs(output, len(sources), ".geojson")
    delivery = Delivery(session, code, sys.stdout if as_json else None)
    for source in sources:
        delivery.deliver(orders.caption(session, source, outputs.path(source.name), sampling))
    code.leave()
