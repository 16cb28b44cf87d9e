"""Captions: one sentence for an image; for a scene larger than a tile, one per tile and a summary."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edge_rsvlm.geo import PixelMapper, box_ring, feature_geometry
from edge_rsvlm.pipeline.outcome import Emit, Outcome
from edge_rsvlm.pipeline.runtime import Pace, Runtime, caption_task
from edge_rsvlm.pipeline.stream import View, scene_batches
from edge_rsvlm.tasks.caption import summarise
from edge_rsvlm.tasks.encode import encode


@dataclass
class CaptionOutcome(Outcome):
    """``caption`` is None when no pixel of the image is valid."""

    caption: str | None = None


def caption(runtime: Runtime, view: View, pace: Pace, emit: Emit) -> CaptionOutcome:
    """Emit ``{"caption", "box"}`` per tile (box x, y, w, h in raster pixels) and return the image's caption."""
    task, outcome = caption_task(runtime.manifest), CaptionOutcome()
    mapper = PixelMapper(view.rasters[0].georeference)
    outcome.warnings += [*view.warnings, *([mapper.warning] if mapper.warning else [])]
    captions: list[str] = []
    weights: list[float] = []
    with scene_batches(view, pace, outcome) as source:
        for tiles in source:
            kept = np.flatnonzero(tiles.valid_fraction_N > 0)
            if not len(kept):
                continue
            with outcome.clock("engine"):
                features = encode(runtime.encoder, tiles.tiles_NCHW[0][kept], task.encoder_outputs)
                sentences = runtime.captioner(features)
            for n, sentence in zip(kept, sentences, strict=True):
                x0, y0, x1, y1 = np.clip(tiles.boxes_N4[n], 0, np.tile(view.size, 2))
                record = {"caption": sentence, "box": [round(float(v), 2) for v in (x0, y0, x1 - x0, y1 - y0)]}
                emit(record, feature_geometry([box_ring(np.array([x0, y0, x1, y1]))], mapper))
                captions.append(sentence)
                weights.append(float(tiles.valid_fraction_N[n]) * float((x1 - x0) * (y1 - y0)))
    outcome.caption = summarise(captions, weights) if captions else None
    return outcome
