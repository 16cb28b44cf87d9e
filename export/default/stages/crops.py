"""Crops with boxes, as the frozen encoder sees them, and the phrases that mean their objects.

Crops are as large as whole small images, so that "the largest" and "on the left" are said of all that is in view.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from edge_rsvlm.export import artifact
from edge_rsvlm.export.default.data.captions import FeatureStore
from edge_rsvlm.export.default.data.labels import random_box, visible_share
from edge_rsvlm.export.default.data.objects import GENERAL, KINDS, SETS, ObjectData
from edge_rsvlm.export.default.data.phrases import Objects, Phrase, phrases
from edge_rsvlm.export.default.data.views import RGB_BANDS, U8_RANGE, cut, dihedral, dihedral_boxes, jitter
from edge_rsvlm.export.default.loop import device
from edge_rsvlm.export.default.model.encoder import STRIDES
from edge_rsvlm.export.default.model.language import TOKEN_CHANNELS
from edge_rsvlm.export.default.splits import held_out
from edge_rsvlm.export.default.stages.features import load_encoder, tokens_of

SIZE_PX = 512
COUNT = 4000
SEED = 7
MOST_OBJECTS, LEAST_PX = 12, 10.0
SPOKEN = {kind: general for general, finer in GENERAL.items() for kind in finer}
"""Phrases speak of airplanes and trucks: few know a trainer from a fighter."""


@dataclass(frozen=True)
class Crops:
    """Features [I,1,C,h,w], boxes [n,4] in pixels of each crop, and what can be said of them."""

    store: FeatureStore
    boxes: list[npt.NDArray[np.float64]]
    phrases: list[list[Phrase]]


def of_objects(data: Path, work: Path, vision: artifact.Artifact) -> Crops:
    """Made once for an encoder; a crop with nothing to say of it is left out."""
    cache = work / "cache" / f"crops-{vision.hash[:12]}"
    shape = (COUNT, 1, TOKEN_CHANNELS, SIZE_PX // STRIDES["c5"], SIZE_PX // STRIDES["c5"])
    facts, maps = cache.with_suffix(".json"), cache.with_suffix(".f16")
    if not facts.is_file():
        _make(data, work, vision, facts, maps, shape)
    found = json.loads(facts.read_text())
    boxes = [np.array(b, np.float64).reshape(-1, 4) for b in found["boxes"]]
    size = (float(SIZE_PX), float(SIZE_PX))
    said = [phrases(Objects(b, names, size)) for b, names in zip(boxes, found["names"], strict=True)]
    return Crops(FeatureStore(maps, shape), boxes, said)


@torch.inference_mode()
def _make(data: Path, work: Path, vision: artifact.Artifact, facts: Path, maps: Path, shape: tuple[int, ...]) -> None:
    where, rng = device(), np.random.default_rng(SEED)
    encoder = load_encoder(vision).to(where, memory_format=torch.channels_last)
    sets = [ObjectData(spec, data, work / "cache", held_out(spec.name)) for spec in SETS]
    share = np.array([d.spec.weight for d in sets])
    store = np.memmap(maps, np.float16, mode="w+", shape=shape)
    boxes: list[list[list[float]]] = []
    names: list[list[str]] = []
    while len(boxes) < COUNT:
        tile, found, kinds = sample(sets[int(rng.choice(len(sets), p=share / share.sum()))], rng)
        if not kinds or not phrases(Objects(found, kinds, (float(SIZE_PX), float(SIZE_PX)))):
            continue
        with torch.autocast(where.type, torch.bfloat16):
            seen = tokens_of(encoder(torch.from_numpy(tile)[None].to(where, memory_format=torch.channels_last)))
        store[len(boxes), 0] = seen[0].float().cpu().numpy()
        boxes.append(found.tolist())
        names.append(kinds)
        if len(boxes) % 500 == 0:
            print(f"features of {len(boxes)} of {COUNT} crops", flush=True)
    store.flush()
    facts.write_text(json.dumps({"boxes": boxes, "names": names}))


def sample(
    data: ObjectData, rng: np.random.Generator
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float64], list[str]]:
    """A tile [5,SIZE,SIZE], the boxes in it and their names; none where not all that is in view is known."""
    name = data.names[rng.integers(len(data.names))]
    image, labels = data.store[name], data.labels[name]
    side = float(np.clip(SIZE_PX * np.exp(rng.uniform(np.log(0.6), np.log(1.7))), 0, 1.1 * max(image.shape[:2])))
    box = random_box(rng, image.shape[:2], labels, side)
    boxes = (labels.boxes - np.tile(box[:2], 2)) * (SIZE_PX / side)
    view = int(rng.integers(8))
    boxes = dihedral_boxes(boxes, SIZE_PX, view)
    shown = np.array([visible_share(b, SIZE_PX) for b in boxes])
    seen, cut_off = shown > 0.6, (shown > 0) & (shown <= 0.6)
    small = (boxes[:, 2:] - boxes[:, :2]).min(axis=1) < LEAST_PX if len(boxes) else seen
    nothing = np.zeros((0, 4)), list[str]()
    if not 0 < seen.sum() <= MOST_OBJECTS or (seen & (small | (labels.classes < 0))).any() or cut_off.any():
        return np.zeros((0,), np.float32), *nothing
    tile = cut(image, box, (SIZE_PX, SIZE_PX), RGB_BANDS, U8_RANGE, jitter(rng, 0.15, 0.05, 0.03))
    kinds = [KINDS[k] for k in labels.classes[seen]]
    return np.ascontiguousarray(dihedral(tile, view)), boxes[seen], [SPOKEN.get(kind, kind) for kind in kinds]
