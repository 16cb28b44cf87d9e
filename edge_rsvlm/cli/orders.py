"""What is to be done with one input, and how its outcome is told: the same for a verb and for a task of a job."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from edge_rsvlm.config.rules import Rules
from edge_rsvlm.config.task_specs import AnswerTask
from edge_rsvlm.pipeline import requests
from edge_rsvlm.pipeline.alerting import Comparison, compare, scene_time
from edge_rsvlm.pipeline.change import ChangeOutcome, MaskRows
from edge_rsvlm.pipeline.detect import DetectQuery
from edge_rsvlm.pipeline.outcome import Emit, Outcome, Progress
from edge_rsvlm.pipeline.requests import Request
from edge_rsvlm.pipeline.segment import SegmentOutcome
from edge_rsvlm.pipeline.session import Session, georeference
from edge_rsvlm.raster.inputs import Source
from edge_rsvlm.sinks.mask import MaskWriter
from edge_rsvlm.tasks.generate import Sampling
from edge_rsvlm.types import Alert

NOTHING_VALID = "no valid pixel"
MOST_LABELS = 5
"""Classes on a line for people."""
MOST_ALERTS = 5
"""Told below the line."""
O = TypeVar("O", bound=Outcome)  # noqa: E741 - an outcome
Counts = Mapping[str, int]
"""Results by label."""


@dataclass(frozen=True)
class Order(Generic[O]):
    """One task over one input. ``head`` begins its record, which lists its results under ``list_key``.

    ``request`` is what to ask of the image, with files that it writes to open until the stack is closed; None of a task
    that has no tiles of one image, and that ``work`` does. ``tail`` ends the record, ``text`` is the line for people,
    from the outcome, the number of results and that by label.
    """

    verb: str
    name: str
    head: Mapping[str, Any]
    list_key: str
    image: str
    geojson: Path | None
    tail: Callable[[O], Mapping[str, Any]]
    text: Callable[[O, int, Counts], str]
    request: Callable[[Emit, ExitStack], Request[O]] | None = None
    work: Callable[[Emit, ExitStack, Progress | None], O] | None = None


def _of_image(verb: str, list_key: str, source: Source, geojson: Path | None, **how: Any) -> Order[Any]:
    return Order(verb, source.name, {"image": source.name}, list_key, source.path, geojson, **how)


def detect(session: Session, source: Source, query: DetectQuery, geojson: Path | None) -> Order[Outcome]:
    return _boxes("detect", source, geojson, lambda emit, _: requests.detecting(session.bundle, query, emit))


def ground(session: Session, source: Source, phrase: str, geojson: Path | None) -> Order[Outcome]:
    return _boxes("ground", source, geojson, lambda emit, _: requests.grounding(session.bundle, phrase, emit))


def _boxes(
    verb: str, source: Source, geojson: Path | None, request: Callable[[Emit, ExitStack], Request[Outcome]]
) -> Order[Outcome]:
    return _of_image(
        verb,
        "detections",
        source,
        geojson,
        tail=lambda _: {},
        text=lambda _, __, counts: (
            ", ".join(f"{count} {label}" for label, count in sorted(counts.items())) or "nothing found"
        ),
        request=request,
    )


def caption(session: Session, source: Source, geojson: Path | None, sampling: Sampling | None = None) -> Order[Any]:
    return _of_image(
        "caption",
        "tiles",
        source,
        geojson,
        tail=lambda outcome: {"caption": outcome.caption},
        text=lambda outcome, _, __: outcome.caption or NOTHING_VALID,
        request=lambda emit, _: requests.captioning(session.bundle, sampling, emit),
    )


def ask(
    session: Session, source: Source, question: str, geojson: Path | None, sampling: Sampling | None = None
) -> Order[Any]:
    task = session.tasks.ask
    of_features = isinstance(task, AnswerTask) and task.input is None
    return _of_image(
        "ask",
        "tiles",
        source,
        geojson,
        tail=lambda outcome: {"answer": outcome.answer},
        text=lambda outcome, _, __: NOTHING_VALID if outcome.answer is None else outcome.answer,
        request=None if of_features else lambda emit, _: requests.asking(session.bundle, question, sampling, emit),
        work=lambda emit, _, progress: session.ask(source.path, question, emit, progress, sampling),
    )


def classify(session: Session, source: Source, labels: Sequence[str], geojson: Path | None) -> Order[Any]:
    return _of_image(
        "classify",
        "tiles",
        source,
        geojson,
        tail=lambda outcome: {"labels": outcome.labels},
        text=lambda outcome, _, __: (
            ", ".join(f"{label} {score:.2f}" for label, score in outcome.labels[:MOST_LABELS]) or NOTHING_VALID
        ),
        request=lambda emit, _: requests.classifying(session.bundle, labels, emit),
    )


def segment(
    session: Session, source: Source, labels: Sequence[str], geojson: Path | None, mask: Path | None
) -> Order[SegmentOutcome]:
    def request(emit: Emit, files: ExitStack) -> Request[SegmentOutcome]:
        rows = _mask_rows(mask, source, files, labels)
        return requests.segmenting(session.bundle, labels, emit, rows)

    def text(outcome: SegmentOutcome, _: int, counts: Counts) -> str:
        found = [f"{counts.get(label, 0)} {label} on {share:.1%}" for label, share in outcome.labels if share]
        return f"{', '.join(found[:MOST_LABELS])} of the valid area" if found else "nothing found"

    return _of_image(
        "segment",
        "segments",
        source,
        geojson,
        tail=lambda outcome: {"labels": outcome.labels},
        text=text,
        request=request,
    )


def change(
    session: Session,
    before: Source,
    after: Source,
    geojson: Path | None,
    mask: Path | None,
    rules: Rules | None = None,
    crops: Path | None = None,
) -> Order[ChangeOutcome]:
    """Two dates, with the evidence of each change, and alerts by ``rules``; pictures go to the folder ``crops``."""
    found: list[Comparison] = []

    def work(emit: Emit, files: ExitStack, progress: Progress | None) -> ChangeOutcome:
        rows = _mask_rows(mask, after, files)
        when = scene_time(after) if rules else ""
        compared = compare(
            session, before, after, emit, rules=rules, tracks=None, when=when, crops=crops, mask_rows=rows,
            progress=progress,
        )  # fmt: skip
        found.append(compared)
        return compared.outcome

    def tail(outcome: ChangeOutcome) -> Mapping[str, Any]:
        alerts = [alert_record(alert) for alert in found[0].alerts]
        return {"changed_fraction": round(outcome.changed_fraction, 6), "alerts": alerts, **_waiting(found[0])}

    def text(outcome: ChangeOutcome, count: int, _: Counts) -> str:
        said = f"{_counted(count, 'change')}, {outcome.changed_fraction:.2%} of the valid area"
        alerts = found[0].alerts
        shown = [f"\n  {alert.rule}: {alert.sentence}" for alert in alerts[:MOST_ALERTS]]
        return f"{said}, {_counted(len(alerts), 'alert')}{''.join(shown)}" if rules else said

    return Order(
        "change",
        f"{before.name} -> {after.name}",
        {"before": before.name, "after": after.name},
        "changes",
        after.path,
        geojson,
        tail=tail,
        text=text,
        work=work,
    )


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def alert_record(alert: Alert) -> dict[str, Any]:
    """As in ``--json``: its change is among the changes, by its id."""
    crops = {"crops": list(alert.crops)} if alert.crops else {}
    return {
        "id": alert.id,
        "rule": alert.rule,
        "time": alert.time,
        "score": alert.score,
        "sentence": alert.sentence,
        "geometry": alert.geometry,
        "change": alert.record["id"],
        **crops,
    }


def _waiting(found: Comparison) -> dict[str, Any]:
    """What met a rule and was not told."""
    counts = {"held_back": found.held_back, "pending": found.pending, "silenced": found.silenced}
    return {name: count for name, count in counts.items() if count}


def _mask_rows(mask: Path | None, source: Source, files: ExitStack, labels: Sequence[str] = ()) -> MaskRows | None:
    """What takes the rows of a mask on the grid of ``source``."""
    if mask is None:
        return None
    return files.enter_context(MaskWriter(mask, georeference(source.path), labels)).write_rows
