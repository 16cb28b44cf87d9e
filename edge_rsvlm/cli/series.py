"""Three or more dates: their stories told as JSON, GeoJSON, a line for people, and a picture of the time line."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from edge_rsvlm.cli.common import ExitCode, Outputs, progress_bar
from edge_rsvlm.cli.orders import alert_record
from edge_rsvlm.config.rules import Rules
from edge_rsvlm.errors import UsageError
from edge_rsvlm.geo import PixelMapper
from edge_rsvlm.pipeline.pictures import timeline_view
from edge_rsvlm.pipeline.series import SeriesOutcome, change_series, ordered
from edge_rsvlm.pipeline.session import Session
from edge_rsvlm.raster.inputs import list_inputs
from edge_rsvlm.report.timeline import SUFFIXES, write_timeline
from edge_rsvlm.sinks.files import writing, written_whole
from edge_rsvlm.sinks.geojson import GeoJsonWriter
from edge_rsvlm.sinks.records import dumps

NAME = "series"
MOST_TOLD = 5
"""Stories, and alerts, below the line for people."""


def check_timeline(timeline: Path | None) -> None:
    """UsageError for a format that is not written."""
    if timeline is not None and timeline.suffix.lower() not in SUFFIXES:
        raise UsageError(f"--timeline {timeline} is of no known format", fix=f"name a file in {', '.join(SUFFIXES)}")


def tell_series(
    session: Session, code: ExitCode, arguments: Sequence[str], *, output: Path | None, timeline: Path | None,
    rules: Rules | None, crops: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Compare the dates that ``arguments`` name, and write what became of the place."""
    check_timeline(timeline)
    geojson = Outputs(output, 1, ".geojson").path(NAME)
    with code.input(NAME), progress_bar(NAME, "pairs") as progress:
        outcome = change_series(session, ordered(list_inputs(arguments)), rules=rules, crops=crops, progress=progress)
        if geojson:
            _write_geojson(geojson, outcome)
        if timeline:
            view = timeline_view(outcome)
            with written_whole(timeline) as partial, writing(timeline):
                write_timeline(partial, view, timeline.suffix.lower())
        if as_json:
            sys.stdout.write(dumps(record(outcome)) + "\n")
        else:
            click.echo("\n  ".join([_line(outcome), *_told(outcome)]))
        _report(outcome, code)


def record(outcome: SeriesOutcome) -> dict[str, Any]:
    """As in ``--json``."""
    order = outcome.order
    found: dict[str, Any] = {
        "dates": [{"image": s.name, "acquired": t} for s, t in zip(order.sources, order.taken, strict=True)],
        "order": "acquired" if order.known else "given",
        "pairs": outcome.pairs,
        "series": [story.record for story in outcome.stories],
        "alerts": [
            {**alert_record(alert), "before": alert.record["before"], "after": alert.record["after"]}
            for alert in outcome.alerts
        ],
        "coverage": round(outcome.coverage, 4),
    }
    return found | ({"warnings": outcome.warnings} if outcome.warnings else {})


def _write_geojson(path: Path, outcome: SeriesOutcome) -> None:
    located = PixelMapper(outcome.where).located
    dates = [source.name for source in outcome.order.sources]
    with GeoJsonWriter(path, properties={"images": dates}, located=located) as writer:
        for story in outcome.stories:
            writer.write(story.geometry, {k: v for k, v in story.record.items() if k != "polygon"})


def _line(outcome: SeriesOutcome) -> str:
    names, count = outcome.order.dates.names, len(outcome.stories)
    lasting = sum(story.record["persists"] for story in outcome.stories)
    order = "by when they were taken" if outcome.order.known else "as given"
    stories = f"{count} stor{'y' if count == 1 else 'ies'} of change, {lasting} still there"
    return f"{len(names)} dates {order}, {names[0]} to {names[-1]}: {stories}"


def _told(outcome: SeriesOutcome) -> list[str]:
    stories = [story.record["sentence"] for story in outcome.stories[:MOST_TOLD]]
    return stories + [f"{alert.rule}: {alert.sentence}" for alert in outcome.alerts[:MOST_TOLD]]


def _report(outcome: SeriesOutcome, code: ExitCode) -> None:
    for warning in outcome.warnings:
        click.echo(f"{NAME}: {warning}", err=True)
    if not outcome.order.known:
        unknown = [s.name for s, t in zip(outcome.order.sources, outcome.order.taken, strict=True) if t is None]
        click.echo(f"{NAME}: when {', '.join(unknown)} was taken is not known: dates are in the order given", err=True)
    for failure in outcome.failed:
        click.echo(f"error: {failure}", err=True)
        code.add(3)
    if outcome.coverage < 1:
        code.partial(NAME, outcome.coverage)
