"""Captions: one sentence for an image; for a scene larger than a tile, one per tile and a summary."""

from __future__ import annotations

from dataclasses import dataclass

from edge_rsvlm.config.task_specs import GenerateTask, GgufTask
from edge_rsvlm.pipeline.outcome import Emit, Outcome
from edge_rsvlm.pipeline.per_tile import EachTile, Kept, emit_tile, mapper_of
from edge_rsvlm.pipeline.runtime import Runtime
from edge_rsvlm.pipeline.stream import Seen, TileBatch, View
from edge_rsvlm.tasks.generate import Sampling
from edge_rsvlm.tasks.summary import summarise


@dataclass
class CaptionOutcome(Outcome):
    """``caption`` is None when no pixel of the image is valid."""

    caption: str | None = None


def caption(
    runtime: Runtime, task: GenerateTask | GgufTask, view: View, sampling: Sampling | None, emit: Emit
) -> EachTile[CaptionOutcome, str]:
    """Emits ``{"caption", "box"}`` per tile (box x, y, w, h in raster pixels); the outcome has the image's caption."""
    outcome = CaptionOutcome()
    mapper = mapper_of(view, outcome)
    captions: list[str] = []
    weights: list[float] = []

    def use(seen: Seen, sentence: str) -> None:
        emit_tile(emit, mapper, seen, {"caption": sentence})
        captions.append(sentence)
        weights.append(seen.valid_px)

    def sentences(tiles: TileBatch, kept: Kept) -> list[str]:
        return runtime.generator("caption", task)(tiles.dates[0].chosen(kept), "", sampling)

    def conclude() -> None:
        outcome.caption = summarise(captions, weights) if captions else None

    return EachTile(outcome, view.size, sentences, use, conclude)
