"""Stage 3: how the encoder's channels vary on training images, which ``model.appearance`` needs. Nothing is trained.

Shapes: N tiles, C channels of a map, D of all, h, w cells, M of all tiles.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edge_rsvlm.export import artifact
from edge_rsvlm.export.default.data.objects import SETS, ObjectData
from edge_rsvlm.export.default.loop import device
from edge_rsvlm.export.default.model.appearance import FEATURES, MAPS
from edge_rsvlm.export.default.model.encoder import Encoder
from edge_rsvlm.export.default.splits import held_out
from edge_rsvlm.export.default.stages.features import load_encoder

NAME = "appearance"
DEFAULTS: dict[str, Any] = {"crops": 300, "batch": 10, "crop_px": 256, "seed": 0}
LEAST_DEVIATION = 1e-3
"""A channel that is the same everywhere says nothing, and is not to be divided by zero."""


def run(data: Path, work: Path, config: dict[str, Any], vision: artifact.Artifact) -> artifact.Artifact:
    config = DEFAULTS | config
    digest = artifact.stage_hash(NAME, config, [vision])
    if found := artifact.find(work / NAME, digest):
        return found
    sets = [ObjectData(spec, data, work / "cache", held_out(spec.name)) for spec in SETS]
    mean, deviation = spread(load_encoder(vision).to(device()), tiles(sets, config))
    state = {"mean": mean.float(), "deviation": deviation.float()}
    return artifact.write(work / NAME, NAME, digest, config, {"crops": float(config["crops"])}, state)


def tiles(sets: list[ObjectData], config: dict[str, Any]) -> Iterator[Tensor]:
    """Batches [N,5,H,W] of crops as boxes are learnt from, of each set by its weight."""
    rng, share = np.random.default_rng(config["seed"]), np.array([data.spec.weight for data in sets])
    chosen = rng.choice(len(sets), config["crops"], p=share / share.sum())
    for start in range(0, len(chosen), config["batch"]):
        made = [sets[int(i)].sample(rng, config["crop_px"])[0] for i in chosen[start : start + config["batch"]]]
        yield torch.from_numpy(np.stack(made))


def spread(encoder: Encoder, batches: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [D] of each channel of MAPS over all cells."""
    sums_3D = torch.zeros(3, FEATURES, dtype=torch.float64)
    with torch.inference_mode():
        for batch in batches:
            found = encoder(batch.to(device()), last=MAPS[-1])
            sums_3D += torch.cat([_sums(found[name]) for name in MAPS], dim=1)
    count, total, squares = sums_3D
    mean = total / count
    return mean, (squares / count - mean**2).clamp(min=0).sqrt().clamp(min=LEAST_DEVIATION)


def _sums(features_NChw: Tensor) -> Tensor:
    """[3,C] of each channel: how many cells, their sum and that of their squares."""
    cells_CM = features_NChw.double().cpu().transpose(0, 1).flatten(1)
    count = torch.full((len(cells_CM),), cells_CM.shape[1], dtype=torch.float64)
    return torch.stack([count, cells_CM.sum(dim=1), (cells_CM**2).sum(dim=1)])
