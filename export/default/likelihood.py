"""How well decoders foretell what people said of validation images: the cross-entropy of a token, in nats.

``python -m edge_rsvlm.export.default.likelihood build/train/language build/train/teacher-*`` prints it for captions and
for answers, of each decoder and, where there are several, of the mean of their probabilities. It moves before words do:
a decoder that has learnt its training images by heart loses here first.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from edge_rsvlm.export import artifact
from edge_rsvlm.export.default.data.captions import BOS
from edge_rsvlm.export.default.data.questions import asked
from edge_rsvlm.export.default.data.words import sentences
from edge_rsvlm.export.default.model.language import Language
from edge_rsvlm.export.default.stages import backbone, features, vision
from edge_rsvlm.export.default.stages.language import IGNORE, Batch, padded, prompt_of, together, trained

IMAGES = 35
"""At a time."""


@dataclass(frozen=True)
class Likelihood:
    """Nats per token."""

    captions: float
    answers: float


def validation(seen: features.Scenes) -> Iterator[Batch]:
    """UCM's validation images with all that was said and asked of them."""
    ucm = seen.parts[0]
    chosen = [i for i, scene in enumerate(ucm.scenes.scenes) if scene.source == "ucm_val"]
    for start in range(0, len(chosen), IMAGES):
        images = chosen[start : start + IMAGES]
        scenes = [ucm.scenes.scenes[i] for i in images]
        said = [
            [*((BOS, s) for s in sentences(scene)), *((prompt_of(q.question), q.answer) for q in asked(scene))]
            for scene in scenes
        ]
        maps = np.stack([ucm.store[i, 0] for i in images]).astype(np.float32)
        yield {"tokens": torch.from_numpy(maps), **padded(seen.tokenizer, said, max(map(len, said)))}


def likelihood(models: Sequence[Language], batches: Sequence[Batch]) -> Likelihood:
    """Of the mean of what ``models`` say."""
    lost, tokens = np.zeros(2), np.zeros(2)
    for batch in batches:
        known = batch["expected"].flatten(1) != IGNORE
        each = F.nll_loss(together(models, batch).log(), batch["expected"].flatten(1)[known], reduction="none")
        answers = batch["asked"][..., None].expand_as(batch["expected"]).flatten(1)[known]
        for kind, part in enumerate((~answers, answers)):
            lost[kind] += float(each[part].sum())
            tokens[kind] += int(part.sum())
    return Likelihood(*(lost / tokens))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("decoders", nargs="+", type=Path, help="folders of trained decoders")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="the data sets")
    parser.add_argument("--work", type=Path, default=Path("build/train"), help="artifacts and caches of the training")
    options = parser.parse_args()
    stages = (artifact.load(options.work / stage.NAME) for stage in (backbone, vision))
    seen = features.of_scenes(options.data, options.work, *stages)
    batches = list(validation(seen))
    models = [trained(artifact.load(folder)) for folder in options.decoders]
    rows = [(str(folder), [model]) for folder, model in zip(options.decoders, models, strict=True)]
    if len(models) > 1:
        rows.append(("their mean", models))
    for name, of in rows:
        found = likelihood(of, batches)
        print(f"{name}: captions {found.captions:.3f}, answers {found.answers:.3f}", flush=True)


if __name__ == "__main__":
    main()
