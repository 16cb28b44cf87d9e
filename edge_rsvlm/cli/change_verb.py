from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_rsvlm.cli.common import ExitCode, Outputs, json_option, make_limits, open_session, run_options

if TYPE_CHECKING:
    from edge_rsvlm.config.rules import Rules
    from edge_rsvlm.pipeline.session import Session


@click.command("change")
@click.argument("dates", nargs=-1, required=True, metavar="BEFORE AFTER | DATES...")
@click.option("--output", type=click.Path(path_type=Path), help="GeoJSON file, or a folder for many pairs.")
@click.option(
    "--mask", type=click.Path(path_type=Path), help="Mask on AFTER's grid (.tif), or a folder for many pairs."
)
@click.option(
    "--rule", type=click.Path(path_type=Path), metavar="RULES.toml", help="Rules that turn changes into alerts."
)
@click.option("--crops", type=click.Path(path_type=Path), metavar="DIR", help="Folder for a picture of each date.")
@click.option(
    "--timeline", type=click.Path(path_type=Path), metavar="FILE", help="Picture of a series: .png, .svg or .html."
)
@run_options
@json_option
def command(
    dates: tuple[str, ...], output: Path | None, mask: Path | None, rule: Path | None, crops: Path | None,
    timeline: Path | None, as_json: bool, bundle: Path | None, allow_unsigned: bool, **limits: Any,
) -> None:  # fmt: skip
    """Find what changed between two dates, what the ground was and is, and what of it is worth an alert.

    BEFORE and AFTER are two images, or two folders, globs or .tar archives whose images pair up by name. BEFORE is
    warped onto AFTER's grid where they differ. The format of rules is in docs/cli.md; `rules check` explains a file.

    Three or more DATES, or one folder, glob or .tar archive of them, are a series: what changed is told as stories,
    each with when it began, whether it lasts and how its area goes. They are ordered by when they were taken, where
    that is known of all.
    """
    if len(dates) == 2:
        _check_pair(timeline)
    else:
        _check_series(mask)
    rules = None if rule is None else _rules(rule, pair=len(dates) == 2)
    session, code = open_session(bundle, allow_unsigned, make_limits(**limits), ("change",)), ExitCode()
    if len(dates) == 2:
        _compare_pairs(session, code, *dates, output, mask, rules, crops, as_json)
    else:
        from edge_rsvlm.cli.series import tell_series

        tell_series(session, code, dates, output=output, timeline=timeline, rules=rules, crops=crops, as_json=as_json)
    code.leave()


def _check_pair(timeline: Path | None) -> None:
    from edge_rsvlm.errors import UsageError

    if timeline is not None:
        raise UsageError("--timeline shows a series", fix="give three or more dates")


def _check_series(mask: Path | None) -> None:
    from edge_rsvlm.errors import UsageError

    if mask is not None:
        raise UsageError("--mask is of two dates", fix="give BEFORE and AFTER, or --output for the stories of a series")


def _compare_pairs(
    session: Session, code: ExitCode, before: str, after: str, output: Path | None, mask: Path | None,
    rules: Rules | None, crops: Path | None, as_json: bool,
) -> None:  # fmt: skip
    from edge_rsvlm.cli import orders
    from edge_rsvlm.cli.deliver import Delivery
    from edge_rsvlm.cli.pairs import list_pairs

    pairs = list_pairs(before, after)
    outputs, masks = Outputs(output, len(pairs), ".geojson"), Outputs(mask, len(pairs), ".tif")
    delivery = Delivery(session, code, sys.stdout if as_json else None)
    for earlier, later in pairs:
        files = outputs.path(later.name), masks.path(later.name)
        delivery.deliver(orders.change(session, earlier, later, *files, rules, crops))


def _rules(path: Path, *, pair: bool) -> Rules:
    """Rules, and a word about those that one pair cannot meet."""
    from edge_rsvlm.config.rules import load_rules

    rules = load_rules(path)
    for rule in rules.rules:
        if pair and rule.persistence > 1:
            click.echo(
                f"rule '{rule.name}' wants {rule.persistence} dates and a pair is one: what it finds stays pending, "
                "and `watch` and series of dates count on",
                err=True,
            )
    return rules
