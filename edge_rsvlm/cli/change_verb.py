from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from edge_rsvlm.cli.common import ExitCode, Outputs, json_option, make_limits, open_session, run_options


@click.command("change")
@click.argument("before")
@click.argument("after")
@click.option("--output", type=click.Path(path_type=Path), help="GeoJSON file, or a folder for many pairs.")
@click.option(
    "--mask", type=click.Path(path_type=Path), help="Mask on AFTER's grid (.tif), or a folder for many pairs."
)
@run_options
@json_option
def command(
    before: str, after: str, output: Path | None, mask: Path | None, as_json: bool,
    bundle: Path | None, allow_unsigned: bool, **limits: Any,
) -> None:  # fmt: skip
    """Find what changed between two dates.

    BEFORE and AFTER are two images, or two folders, globs or .tar archives whose images pair up by name. BEFORE is
    warped onto AFTER's grid where they differ.
    """
    from edge_rsvlm.cli import orders
    from edge_rsvlm.cli.deliver import Delivery
    from edge_rsvlm.cli.pairs import list_pairs

    session = open_session(bundle, allow_unsigned, make_limits(**limits), ("change",))
    code, pairs = ExitCode(), list_pairs(before, after)
    outputs, masks = Outputs(output, len(pairs), ".geojson"), Outputs(mask, len(pairs), ".tif")
    delivery = Delivery(session, code, sys.stdout if as_json else None)
    for earlier, later in pairs:
        delivery.deliver(orders.change(session, earlier, later, outputs.path(later.name), masks.path(later.name)))
    code.leave()
