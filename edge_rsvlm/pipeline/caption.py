"""Captions: one sentence for an image; for a scene larger than a tile, one per tile and a summary."""

from __future__ import annotations

from dataclasses import dataclass

from edge_rsvlm.config.task_specs import GenerateTask, GgufTask
from edge_rsvlm.pipeline.outcome import Emit, Outcome
from edge_rsvlm.pipeline.per_tile import each_tile, emit_tile, mapper_of
from edge_rsvlm.pipeline.runtime import Pace, Runtime
from edge_rsvlm.pipeline.stream import Seen, View
from edge_rsvlm.tasks.generate import Sampling
from edge_rsvlm.tasks.summary import summarise


@dataclass
class CaptionOutcome(Outcome):
    """``caption`` is None when no pixel of the image is valid."""

    caption: str | None = None


def caption(
    runtime: Runtime, task: GenerateTask | GgufTask, view: View, sampling: Sampling | None, pace: Pace, emit: Emit
) -> CaptionOutcome:
    """Emit ``{"caption", "box"}`` per tile (box x, y, w, h in raster pixels) and return the image's caption."""
    outcome = CaptionOutcome()
    mapper = mapper_of(view, outcome)
    captions: list[str] = []
    weights: list[float] = []

    def use(seen: Seen, sentence: str) -> None:
        emit_tile(emit, mapper, seen, {"caption": sentence})
        captions.append(sentence)
        weights.append(seen.valid_px)

    each_tile(
        view,
        pace,
        outcome,
        lambda tiles, kept: runtime.generator("caption", task)(tiles.dates[0].chosen(kept), "", sampling),
        use,
    )
    outcome.caption = summarise(captions, weights) if captions else None
    return outcome
