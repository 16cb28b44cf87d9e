"""One task over one input: run it, stream its results out, and report what happened. Shared by every verb that runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TextIO, TypeVar

import click

from edge_rsvlm.cli.common import ExitCode, progress_bar
from edge_rsvlm.geo import PixelMapper
from edge_rsvlm.pipeline.ask import is_features
from edge_rsvlm.pipeline.detect import DetectQuery
from edge_rsvlm.pipeline.outcome import Emit, Outcome, Progress
from edge_rsvlm.pipeline.segment import EXPERIMENTAL, SegmentOutcome
from edge_rsvlm.pipeline.session import Session, georeference
from edge_rsvlm.raster.inputs import Source
from edge_rsvlm.sinks.geojson import GeoJsonWriter
from edge_rsvlm.sinks.mask import MaskWriter
from edge_rsvlm.sinks.records import RecordSpool
from edge_rsvlm.tasks.generate import Sampling

NOTHING_VALID = "no valid pixel"
MOST_LABELS = 5
"""Classes on a line for people."""
O = TypeVar("O", bound=Outcome)  # noqa: E741 - an outcome


class Results:
    """Takes results as they become final and counts them by label."""

    def __init__(self, spool: RecordSpool | None, geojson: GeoJsonWriter | None) -> None:
        self._spool, self._geojson = spool, geojson
        self.count = 0
        self.labels: dict[str, int] = {}

    def emit(self, record: dict[str, Any], geometry: dict[str, Any] | None) -> None:
        self.count += 1
        if "label" in record:
            self.labels[record["label"]] = self.labels.get(record["label"], 0) + 1
        if self._spool:
            self._spool.add(record)
        if self._geojson:
            self._geojson.write(geometry, {k: v for k, v in record.items() if k != "polygon"})

    def counts(self) -> str:
        return ", ".join(f"{count} {label}" for label, count in sorted(self.labels.items())) or "nothing found"


def _areas(outcome: SegmentOutcome, counts: Mapping[str, int]) -> str:
    """Segments and area of each label, for people."""
    found = [f"{counts.get(label, 0)} {label} on {share:.1%}" for label, share in outcome.labels if share]
    return f"{', '.join(found[:MOST_LABELS])} of the valid area" if found else "nothing found"


class Delivery:
    """Runs tasks of one session. JSON lines go to ``json_stream``; without one, a line for people to stdout."""

    def __init__(self, session: Session, code: ExitCode, json_stream: TextIO | None) -> None:
        self._session, self._code, self._stream = session, code, json_stream
        self._said_experimental = False

    def caption(self, source: Source, geojson: Path | None, sampling: Sampling | None = None) -> None:
        self._deliver(
            source.name,
            {"image": source.name},
            "tiles",
            (source.path, geojson),
            lambda emit, progress: self._session.caption(source.path, emit, progress, sampling),
            tail=lambda outcome: {"caption": outcome.caption},
            text=lambda outcome, _: outcome.caption or NOTHING_VALID,
        )

    def ask(self, source: Source, question: str, geojson: Path | None, sampling: Sampling | None = None) -> None:
        self._deliver(
            source.name,
            {"image": source.name},
            "tiles",
            (source.path, geojson),
            lambda emit, progress: self._session.ask(source.path, question, emit, progress, sampling),
            tail=lambda outcome: {"answer": outcome.answer},
            text=lambda outcome, _: NOTHING_VALID if outcome.answer is None else outcome.answer,
        )

    def classify(self, source: Source, labels: Sequence[str], geojson: Path | None) -> None:
        self._deliver(
            source.name,
            {"image": source.name},
            "tiles",
            (source.path, geojson),
            lambda emit, progress: self._session.classify(source.path, labels, emit, progress),
            tail=lambda outcome: {"labels": outcome.labels},
            text=lambda outcome, _: (
                ", ".join(f"{label} {score:.2f}" for label, score in outcome.labels[:MOST_LABELS]) or NOTHING_VALID
            ),
        )

    def detect(self, source: Source, query: DetectQuery, geojson: Path | None) -> None:
        self._boxes(source, geojson, lambda emit, progress: self._session.detect(source.path, query, emit, progress))

    def ground(self, source: Source, phrase: str, geojson: Path | None) -> None:
        self._boxes(source, geojson, lambda emit, progress: self._session.ground(source.path, phrase, emit, progress))

    def _boxes(self, source: Source, geojson: Path | None, work: Callable[[Emit, Progress | None], Outcome]) -> None:
        self._deliver(
            source.name,
            {"image": source.name},
            "detections",
            (source.path, geojson),
            work,
            tail=lambda _: {},
            text=lambda _, results: results.counts(),
        )

    def segment(self, source: Source, labels: Sequence[str], geojson: Path | None, mask: Path | None) -> None:
        def work(emit: Emit, progress: Progress | None) -> SegmentOutcome:
            with ExitStack() as stack:
                rows = None
                if mask:
                    rows = stack.enter_context(MaskWriter(mask, georeference(source.path), labels)).write_rows
                return self._session.segment(source.path, labels, emit, rows, progress)

        self._deliver(
            source.name,
            {"image": source.name},
            "segments",
            (source.path, geojson),
            work,
            tail=lambda outcome: {"labels": outcome.labels},
            text=lambda outcome, results: _areas(outcome, results.labels),
        )

    def change(self, before: Source, after: Source, geojson: Path | None, mask: Path | None) -> None:
        def work(emit: Emit, progress: Progress | None) -> Any:
            with ExitStack() as stack:
                rows = None
                if mask:
                    rows = stack.enter_context(MaskWriter(mask, georeference(after.path))).write_rows
                return self._session.change(before.path, after.path, emit, rows, progress)

        self._deliver(
            f"{before.name} -> {after.name}",
            {"before": before.name, "after": after.name},
            "changes",
            (after.path, geojson),
            work,
            tail=lambda outcome: {"changed_fraction": round(outcome.changed_fraction, 6)},
            text=lambda outcome, results: (
                f"{results.count} change{'' if results.count == 1 else 's'}, "
                f"{outcome.changed_fraction:.2%} of the valid area"
            ),
        )

    def _deliver(
        self,
        name: str,
        head: dict[str, Any],
        list_key: str,
        files: tuple[str, Path | None],
        work: Callable[[Emit, Progress | None], O],
        *,
        tail: Callable[[O], Mapping[str, Any]],
        text: Callable[[O, Results], str],
    ) -> None:
        with self._code.input(name), progress_bar(name) as progress:
            with self._results(head, list_key, *files) as (results, spool):
                outcome = work(results.emit, progress)
                if spool and self._stream:
                    spool.finish({**tail(outcome), **outcome.record()}, self._stream)
            if self._stream is None:
                click.echo(f"{name}: {text(outcome, results)}")
            self._warn(name, outcome.warnings)
            if not outcome.complete:
                self._code.partial(name, outcome.coverage)

    def _warn(self, name: str, warnings: Sequence[str]) -> None:
        """What is true of the bundle, whatever the input, is said once."""
        for warning in warnings:
            if warning != EXPERIMENTAL:
                click.echo(f"{name}: {warning}", err=True)
            elif not self._said_experimental:
                click.echo(warning, err=True)
                self._said_experimental = True

    @contextmanager
    def _results(
        self, head: dict[str, Any], list_key: str, image: str, geojson: Path | None
    ) -> Iterator[tuple[Results, RecordSpool | None]]:
        """Files appear whole, or not at all when the block raises."""
        with ExitStack() as stack:
            spool = stack.enter_context(RecordSpool(head, list_key)) if self._stream else None
            writer = None
            if geojson:
                located = not is_features(image) and PixelMapper(georeference(image)).located
                writer = stack.enter_context(GeoJsonWriter(geojson, properties=head, located=located))
            yield Results(spool, writer), spool
