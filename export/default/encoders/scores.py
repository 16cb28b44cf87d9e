"""What the comparison measures of features and heads on images that were never trained on.

Shapes: N images, D features, K groups of classes, h, w heat-map cells (stride 4), n boxes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from edge_rsvlm.export.default.data.labels import MIN_BOX_PX
from edge_rsvlm.export.default.data.scenes import SceneSet, multi_hot
from edge_rsvlm.export.default.data.views import RGB_BANDS, U8_RANGE, cut
from edge_rsvlm.export.default.encoders.centres import CLASSES, SETS, STRIDE, DetectData, targets
from edge_rsvlm.export.default.encoders.proxy import CROP_PX, GROUPS, Proxy, grouped
from edge_rsvlm.export.default.losses import heat_loss
from edge_rsvlm.export.default.splits import by_hash, held_out

F32 = npt.NDArray[np.float32]
Encode = Callable[[F32], dict[str, F32]]
"""tiles [N,5,H,W] -> maps by name."""
Peak = tuple[float, float, float]
"""Score, and x, y in tile px."""
BATCH = 8
PENALTIES = (1.0, 10.0, 100.0, 1e3, 1e4)
WITH_OBJECTS, WITHOUT = 5, 2
"""Tiles of one held-out image at most, so that a few large scenes do not decide."""
KNOWN_VISIBLE = 0.35
"""As in training: objects cut to less than this share of them are ignored."""


@dataclass(frozen=True)
class DenseTile:
    """tile [5,H,W]; heat and weight [K,h,w]; boxes [n,4] px that count, and their group [n]."""

    tile: F32
    heat: F32
    weight: F32
    boxes: npt.NDArray[np.float64]
    groups: npt.NDArray[np.int64]


def pooled(scenes: SceneSet, indices: npt.NDArray[np.int64], encode: Encode) -> F32:
    """Mean of the last map [N,D] of whole images."""
    batches = (indices[start : start + BATCH] for start in range(0, len(indices), BATCH))
    found = [encode(np.stack([scenes.tile(int(i)) for i in part]))["c5"].mean(axis=(2, 3)) for part in batches]
    return np.concatenate(found)


class Ridge:
    """Ridge regression of standardised features [N,D] to one-hot labels; the penalty is chosen on a fifth of them."""

    def __init__(self, features_ND: F32, labels_N: npt.NDArray[np.int64], names: Sequence[str]) -> None:
        self._mean, self._std = features_ND.mean(axis=0), features_ND.std(axis=0) + 1e-6
        chooses = by_hash(names, 0.2)
        right = []
        for penalty in PENALTIES:
            self._fit(features_ND[~chooses], labels_N[~chooses], penalty)
            right.append(self.top1(features_ND[chooses], labels_N[chooses]))
        self.penalty = PENALTIES[int(np.argmax(right))]
        self._fit(features_ND, labels_N, self.penalty)

    def _inputs(self, features_ND: F32) -> npt.NDArray[np.float64]:
        return np.hstack([(features_ND - self._mean) / self._std, np.ones((len(features_ND), 1))])

    def _fit(self, features_ND: F32, labels_N: npt.NDArray[np.int64], penalty: float) -> None:
        x, y = self._inputs(features_ND), np.eye(labels_N.max() + 1)[labels_N]
        self._weights = np.linalg.solve(x.T @ x + penalty * np.eye(x.shape[1]), x.T @ y)

    def top1(self, features_ND: F32, labels_N: npt.NDArray[np.int64]) -> float:
        return float(((self._inputs(features_ND) @ self._weights).argmax(axis=1) == labels_N).mean())


@torch.inference_mode()
def scene_scores(model: Proxy, scenes: SceneSet, indices: npt.NDArray[np.int64], c5_ND: F32) -> dict[str, float]:
    """Scene top-1 and log loss, and mean average precision of the labels, from pooled features of these images."""
    features = torch.from_numpy(c5_ND)
    logits = model.labels(features)
    scene, said = logits["ucm_scene"], logits["ucm_labels"].numpy()
    labels = torch.tensor([scenes.class_index(int(i)) for i in indices])
    wanted = np.stack([multi_hot(scenes.scenes[int(i)]) for i in indices]) > 0
    present = np.flatnonzero(wanted.any(axis=0))
    return {
        "scene_top1": float((scene.argmax(dim=1) == labels).float().mean()),
        "scene_log_loss": float(F.cross_entropy(scene, labels)),
        "labels_map": float(np.mean([average_precision(said[:, k], wanted[:, k]) for k in present])),
    }


def average_precision(
    scores: npt.NDArray[np.floating], right: npt.NDArray[np.bool_], total: int | None = None
) -> float:
    """Mean over the ``total`` things to find (all that are right) of the precision at the score that finds each."""
    hits = right[np.argsort(-scores, kind="stable")]
    precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
    total = int(right.sum()) if total is None else total
    return float(precision[hits].sum() / total)


def dense_tiles(data: Path, cache: Path, seed: int = 0) -> Iterator[DenseTile]:
    """Tiles of all held-out images at their own scale, at most WITH_OBJECTS with objects and WITHOUT of each."""
    rng = np.random.default_rng(seed)
    for spec in SETS:
        part = DetectData(spec, data, cache)
        for name in sorted(held_out(spec.name)):
            left = {True: WITH_OBJECTS, False: WITHOUT}
            for corner in rng.permutation(_corners(part.store[name].shape[:2])):
                made = _dense_tile(part, name, corner)
                if left[len(made.boxes) > 0]:
                    left[len(made.boxes) > 0] -= 1
                    yield made


def _corners(hw: tuple[int, ...]) -> npt.NDArray[np.int64]:
    """Corners (x, y) of tiles that cover an image."""
    rows, columns = ([*range(0, max(n - CROP_PX, 0), CROP_PX), max(n - CROP_PX, 0)] for n in hw)
    return np.array([(x, y) for y in rows for x in columns])


def _dense_tile(part: DetectData, name: str, corner: npt.NDArray[np.int64]) -> DenseTile:
    x, y = map(float, corner)
    labels = part.labels[name]
    tile = cut(part.store[name], (x, y, x + CROP_PX, y + CROP_PX), (CROP_PX, CROP_PX), RGB_BANDS, U8_RANGE)
    boxes = labels.boxes - [x, y, x, y]
    heat, weight = targets(boxes, labels.classes, CROP_PX, part.spec)
    inside = np.clip(boxes, 0, CROP_PX)
    sides, seen = boxes[:, 2:] - boxes[:, :2], inside[:, 2:] - inside[:, :2]
    counts = (seen.prod(axis=1) >= KNOWN_VISIBLE * sides.prod(axis=1)) & (sides.min(axis=1) >= MIN_BOX_PX)
    group = np.array([_group(int(k)) for k in labels.classes], np.int64)
    counts &= group >= 0
    return DenseTile(tile, grouped(heat), grouped(weight), boxes[counts], group[counts])


def _group(class_index: int) -> int:
    """Index in GROUPS, or -1 for classes in none and for ignore regions."""
    names = [CLASSES[class_index] in members for members in GROUPS.values()] if class_index >= 0 else []
    return names.index(True) if any(names) else -1


@torch.inference_mode()
def dense_scores(model: Proxy, tiles: Sequence[DenseTile], encode: Encode) -> dict[str, float]:
    """Heat loss per object, and average precision of centres: a peak is right when it is the best inside a box of its
    group that no better one took."""
    total, found = 0.0, [_Found() for _ in GROUPS]
    for start in range(0, len(tiles), BATCH):
        part = tiles[start : start + BATCH]
        maps = encode(np.stack([t.tile for t in part]))
        logits = model.dense({name: torch.from_numpy(maps[name]) for name in model.dense.lateral})
        heat, weight = (torch.from_numpy(np.stack([getattr(t, n) for t in part])) for n in ("heat", "weight"))
        total += float(heat_loss(logits, heat, weight)) * max(_objects(part), 1)
        for tile, logits_Khw in zip(part, logits, strict=True):
            for k, group in enumerate(found):
                group.add(_peaks(logits_Khw[k], tile.weight[k]), tile.boxes[tile.groups == k])
    precision = {f"ap_{name}": group.average_precision() for name, group in zip(GROUPS, found, strict=True)}
    return {"heat_loss": total / _objects(tiles), **precision}


def _objects(tiles: Sequence[DenseTile]) -> int:
    return sum(int(((t.heat == 1) & (t.weight > 0)).sum()) for t in tiles)


@dataclass
class _Found:
    """Peaks of one group over all tiles, and how many boxes there were."""

    scores: list[float] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)
    boxes: int = 0

    def add(self, peaks: Sequence[Peak], boxes: npt.NDArray[np.float64]) -> None:
        self.scores.extend(score for score, _, _ in peaks)
        self.right.extend(_matched(peaks, boxes))
        self.boxes += len(boxes)

    def average_precision(self) -> float:
        return average_precision(np.array(self.scores), np.array(self.right, bool), self.boxes)


def _peaks(logits_hw: Tensor, weight_hw: F32) -> list[Peak]:
    """(score, x, y) in tile px of the local maxima above 0.01 on trusted cells, best first."""
    scores = logits_hw.sigmoid()
    highest = F.max_pool2d(scores[None, None], 3, 1, 1)[0, 0]
    rows, columns = torch.nonzero((scores == highest) & (scores > 0.01) & (torch.from_numpy(weight_hw) > 0)).T
    half = STRIDE / 2
    peaks = [
        (float(scores[r, c]), float(c) * STRIDE + half, float(r) * STRIDE + half)
        for r, c in zip(rows.tolist(), columns.tolist(), strict=True)
    ]
    return sorted(peaks, reverse=True)


def _matched(peaks: Sequence[Peak], boxes: npt.NDArray[np.float64]) -> list[bool]:
    """Of each peak, whether it lies in a box that no better one took."""
    taken = np.zeros(len(boxes), bool)
    right = []
    for _, x, y in peaks:
        inside = (boxes[:, 0] <= x) & (x <= boxes[:, 2]) & (boxes[:, 1] <= y) & (y <= boxes[:, 3]) & ~taken
        first = np.flatnonzero(inside)
        taken[first[:1]] = True
        right.append(len(first) > 0)
    return right
