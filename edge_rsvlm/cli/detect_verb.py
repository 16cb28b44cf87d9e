from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from edge_rsvlm.cli.common import ExitCode, Outputs, json_option, make_limits, make_query, open_session, run_options


@click.command("detect")
@click.argument("images", nargs=-1, required=True)
@click.option(
    "--query",
    multiple=True,
    metavar="LABEL",
    help="Only this kind of object; may be repeated. Needed where the bundle has no classes of its own.",
)
@click.option(
    "--like",
    multiple=True,
    metavar="IMAGE#x,y,w,h",
    help="Instead of --query: what looks like this box, in pixels of IMAGE. Repeated: like any of them.",
)
@click.option("--score", type=click.FloatRange(0.01, 0.99), help="Least score.  [default: the bundle's threshold]")
@click.option("--output", type=click.Path(path_type=Path), help="GeoJSON file, or a folder for many inputs.")
@run_options
@json_option
def command(
    images: tuple[str, ...], query: tuple[str, ...], like: tuple[str, ...], score: float | None, output: Path | None,
    as_json: bool, bundle: Path | None, allow_unsigned: bool, **limits: Any,
) -> None:  # fmt: skip
    """Find objects. IMAGES are files, folders, globs or .tar archives of images.

    What was found by examples has the label "like".
    """
    from edge_rsvlm.cli import orders
    from edge_rsvlm.cli.deliver import Delivery
    from edge_rsvlm.raster.inputs import list_inputs

    session = open_session(bundle, allow_unsigned, make_limits(**limits), ("detect",))
    wanted = make_query(session, query, score, like)
    code, sources = ExitCode(), list_inputs(images)
    outputs = Outputs(output, len(sources), ".geojson")
    delivery = Delivery(session, code, sys.stdout if as_json else None)
    for source in sources:
        delivery.deliver(orders.detect(session, source, wanted, outputs.path(source.name)))
    code.leave()
