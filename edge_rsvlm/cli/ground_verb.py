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
    open_session,
    run_options,
)


@click.command("ground")
@click.argument("images", nargs=-1, required=True)
@click.argument("phrase")
@click.option("--output", type=click.Path(path_type=Path), help="GeoJSON file, or a folder for many inputs.")
@adapter_option
@run_options
@json_option
def command(
    images: tuple[str, ...], phrase: str, output: Path | None, as_json: bool, bundle: Path | None,
    allow_unsigned: bool, adapter: str | None, **limits: Any,
) -> None:  # fmt: skip
    """Find what a PHRASE refers to. IMAGES are files, folders, globs or .tar archives of images.

    Boxes that a model writes as text have no score.
    """
    from edge_rsvlm.cli import orders
    from edge_rsvlm.cli.deliver import Delivery
    from edge_rsvlm.raster.inputs import list_inputs

    session = open_session(bundle, allow_unsigned, make_limits(**limits), ("ground",), adapter)
    code, sources = ExitCode(), list_inputs(images)
    outputs = Outputs(output, len(sources), ".geojson")
    delivery = Delivery(session, code, sys.stdout if as_json else None)
    for source in sources:
        delivery.deliver(orders.ground(session, source, phrase, outputs.path(source.name)))
    code.leave()
