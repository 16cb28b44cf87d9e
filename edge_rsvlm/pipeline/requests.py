"""What can be asked of an image: each request makes the consumer that the tiles of its task are fed to.

Texts are checked before any work; UsageError for those that the bundle never learnt, and for a task that it lacks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from edge_rsvlm.bundle import Bundle
from edge_rsvlm.config.offered import (
    ask_task,
    caption_task,
    classify_task,
    detect_task,
    ground_task,
    search_task,
    segment_task,
)
from edge_rsvlm.pipeline.ask import AskOutcome, ask
from edge_rsvlm.pipeline.caption import CaptionOutcome, caption
from edge_rsvlm.pipeline.change import MaskRows
from edge_rsvlm.pipeline.classify import ClassifyOutcome, classify
from edge_rsvlm.pipeline.consume import Consumer
from edge_rsvlm.pipeline.detect import DetectQuery, detect
from edge_rsvlm.pipeline.embed import EmbedOutcome, EmitVector, embed
from edge_rsvlm.pipeline.ground import ground
from edge_rsvlm.pipeline.outcome import Emit, Outcome
from edge_rsvlm.pipeline.runtime import Runtime
from edge_rsvlm.pipeline.segment import SegmentOutcome, Segments
from edge_rsvlm.pipeline.stream import View
from edge_rsvlm.pipeline.vocabulary import check_texts
from edge_rsvlm.tasks.generate import Sampling

O_co = TypeVar("O_co", bound=Outcome, covariant=True)


@dataclass(frozen=True)
class Request(Generic[O_co]):
    """One task for an image. ``verb`` is its key in the manifest; ``sampling`` is of those that write."""

    verb: str
    start: Callable[[Runtime, View], Consumer[O_co]]
    sampling: Sampling | None = None


def detecting(bundle: Bundle, query: DetectQuery, emit: Emit) -> Request[Outcome]:
    task = detect_task(bundle.manifest)
    check_texts(bundle, "detect", query.labels)
    return Request("detect", lambda runtime, view: detect(runtime, task, view, query, emit))


def grounding(bundle: Bundle, phrase: str, emit: Emit) -> Request[Outcome]:
    task = ground_task(bundle.manifest)
    check_texts(bundle, "ground", [phrase])
    return Request("ground", lambda runtime, view: ground(runtime, task, view, phrase, emit))


def captioning(bundle: Bundle, sampling: Sampling | None, emit: Emit) -> Request[CaptionOutcome]:
    task = caption_task(bundle.manifest)
    return Request("caption", lambda runtime, view: caption(runtime, task, view, sampling, emit), sampling)


def asking(bundle: Bundle, question: str, sampling: Sampling | None, emit: Emit) -> Request[AskOutcome]:
    task = ask_task(bundle.manifest)
    check_texts(bundle, "ask", [question])
    return Request("ask", lambda runtime, view: ask(runtime, task, view, question, sampling, emit), sampling)


def classifying(bundle: Bundle, labels: Sequence[str], emit: Emit) -> Request[ClassifyOutcome]:
    task = classify_task(bundle.manifest)
    check_texts(bundle, "classify", labels)
    return Request("classify", lambda runtime, view: classify(runtime, task, view, labels, emit))


def segmenting(
    bundle: Bundle, labels: Sequence[str], emit: Emit, mask_rows: MaskRows | None = None
) -> Request[SegmentOutcome]:
    task = segment_task(bundle.manifest)
    check_texts(bundle, "segment", labels)
    return Request("segment", lambda runtime, view: Segments(runtime, task, view, labels, emit, mask_rows))


def embedding(bundle: Bundle, emit: EmitVector) -> Request[EmbedOutcome]:
    task = search_task(bundle.manifest)
    return Request("search", lambda runtime, view: embed(runtime, task, view, emit))
