"""Detection by examples: the objects of a tile whose appearance and size are most like theirs, for one thing looked
for or several.

``config.task_specs.Likeness`` states the score. Letters: N boxes, E examples in all their symmetries, D dimensions,
h, w cells of ``stride`` tile pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_rsvlm.config.task_specs import TextDetectTask
from edge_rsvlm.tasks.encode import Features
from edge_rsvlm.tasks.match import unit
from edge_rsvlm.tasks.text_detect import TextDetector
from edge_rsvlm.types import Boxes, InferenceSession

OUTPUTS = ("features",)
LEAST_OBJECTNESS = 0.01
OBJECTNESS_POWER, SIZE_WEIGHT = 0.1, 0.5
QUARTER_TURNS = 4
CHANNELS_AT_ONCE = 8
"""Bounds the memory of integral images."""
LEAST_SIDE_PX = 1e-6
"""A box without area is like nothing, rather than an error."""


@dataclass(frozen=True)
class Examples:
    """What is looked for: unit vectors [E, D], and the sides [E] in tile pixels of the boxes they are of."""

    vectors_ED: NDArray[np.float32]
    sides_E: NDArray[np.float64]

    @classmethod
    def joined(cls, parts: Sequence[Examples]) -> Examples:
        """All of ``parts``, in an order that does not depend on theirs."""
        vectors_ED = np.concatenate([part.vectors_ED for part in parts])
        sides_E = np.concatenate([part.sides_E for part in parts])
        order = np.lexsort((*vectors_ED.T, sides_E))
        return cls(vectors_ED[order], sides_E[order])


class LikeDetector:
    """Features of a batch and examples -> boxes per tile, not yet suppressed across cells.

    ``graph`` gives what things look like, ``detector`` finds things of ``classes_QD``.
    """

    def __init__(
        self, spec: TextDetectTask, graph: InferenceSession, detector: TextDetector, classes_QD: NDArray[np.float32]
    ) -> None:
        self._spec, self._graph, self._detector, self._classes_QD = spec, graph, detector, classes_QD

    def __call__(self, features: Features, things: Sequence[Examples], threshold: float) -> list[Boxes]:
        """In tile pixels, best first of each thing; labels are numbers of ``things``, each said by its examples.

        Appearance is computed once for all of them, and tile by tile: its maps are large.
        """
        objects = self._detector.objects(features, self._classes_QD, LEAST_OBJECTNESS)
        tiles = ({name: maps[n : n + 1] for name, maps in features.items()} for n in range(len(objects)))
        return [self._alike(tile, boxes, things, threshold) for tile, boxes in zip(tiles, objects, strict=True)]

    def vectors(self, features: Features, boxes_N4: NDArray[np.float64]) -> NDArray[np.float32]:
        """Unit vectors [N, D] of what boxes of the only tile show, in its pixels."""
        ((maps_Dhw,),) = self._graph.run({name: features[name] for name in self._spec.like.encoder_outputs}, OUTPUTS)
        return unit(box_means(maps_Dhw, boxes_N4 / self._spec.stride))

    def _alike(self, features: Features, objects: Boxes, things: Sequence[Examples], threshold: float) -> Boxes:
        if not len(objects.scores_N):
            return objects
        vectors_ND, sides_N = self.vectors(features, objects.xyxy_N4), sides(objects.xyxy_N4)
        alike_KN = np.stack([likeness(vectors_ND, sides_N, examples) for examples in things])
        scores_KN = (alike_KN * objects.scores_N**OBJECTNESS_POWER).astype(np.float32)
        order_KN = np.argsort(-scores_KN, axis=1, kind="stable")
        labels_N, rank_N = np.nonzero(np.take_along_axis(scores_KN, order_KN, axis=1) >= threshold)
        chosen_N = order_KN[labels_N, rank_N]
        return Boxes(objects.xyxy_N4[chosen_N], scores_KN[labels_N, chosen_N], labels_N)


def likeness(vectors_ND: NDArray[np.float32], sides_N: NDArray[np.float64], examples: Examples) -> NDArray[np.float64]:
    """Of each box with the example that it is most like: 1 at most, for the same appearance and size."""
    cosines_NE = np.clip(vectors_ND @ examples.vectors_ED.T, 0, 1)
    ratios_NE = np.log(sides_N)[:, None] - np.log(examples.sides_E)
    found: NDArray[np.float64] = (cosines_NE * np.exp(-SIZE_WEIGHT * np.abs(ratios_NE))).max(axis=1)
    return found


def sides(boxes_N4: NDArray[np.float64]) -> NDArray[np.float64]:
    """The sides [N] of squares of the same area."""
    areas_N = np.prod(boxes_N4[:, 2:] - boxes_N4[:, :2], axis=1)
    found: NDArray[np.float64] = np.maximum(np.sqrt(areas_N), LEAST_SIDE_PX)
    return found


def box_means(maps_Dhw: NDArray[np.float32], boxes_N4: NDArray[np.float64]) -> NDArray[np.float64]:
    """Means [N, D] over the parts of boxes inside the map, in cells: each cell counts by how much of it lies in the
    box. 0 where no part is inside."""
    height, width = maps_Dhw.shape[1:]
    clipped_N4 = np.clip(boxes_N4, 0, (width, height) * 2)
    areas_N = np.prod(clipped_N4[:, 2:] - clipped_N4[:, :2], axis=1)
    parts = [maps_Dhw[first : first + CHANNELS_AT_ONCE] for first in range(0, len(maps_Dhw), CHANNELS_AT_ONCE)]
    sums_ND = np.concatenate([_sums(part, clipped_N4) for part in parts]).T
    found: NDArray[np.float64] = np.divide(
        sums_ND, areas_N[:, None], out=np.zeros_like(sums_ND), where=areas_N[:, None] > 0
    )
    return found


def _sums(maps_Dhw: NDArray[np.float32], boxes_N4: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sums [D, N] over boxes, by an integral image (Crow 1984, "Summed-Area Tables for Texture Mapping"): a large box
    costs no more than a small one."""
    table = np.zeros((len(maps_Dhw), maps_Dhw.shape[1] + 1, maps_Dhw.shape[2] + 1))
    table[:, 1:, 1:] = maps_Dhw.cumsum(axis=1, dtype=np.float64).cumsum(axis=2)
    x0, y0, x1, y1 = boxes_N4.T
    found: NDArray[np.float64] = (
        _up_to(table, x1, y1) - _up_to(table, x0, y1) - _up_to(table, x1, y0) + _up_to(table, x0, y0)
    )
    return found


def _up_to(table: NDArray[np.float64], x_N: NDArray[np.float64], y_N: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sums [D, N] left of and above points, which is linear between the corners of cells."""
    col, row = (np.minimum(v.astype(int), size - 2) for v, size in ((x_N, table.shape[2]), (y_N, table.shape[1])))
    x, y = x_N - col, y_N - row
    upper = table[:, row, col] * (1 - x) + table[:, row, col + 1] * x
    lower = table[:, row + 1, col] * (1 - x) + table[:, row + 1, col + 1] * x
    found: NDArray[np.float64] = upper * (1 - y) + lower * y
    return found


def symmetries(
    tile_NCHW: NDArray[np.float32], box_xyxy: NDArray[np.float64]
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float64]]]:
    """The tile and a box in it in the eight symmetries of the square: what is seen from above lies any way."""
    for _ in range(2):
        for _ in range(QUARTER_TURNS):
            yield np.ascontiguousarray(tile_NCHW), box_xyxy
            x0, y0, x1, y1 = box_xyxy
            width = tile_NCHW.shape[-1]
            tile_NCHW, box_xyxy = np.rot90(tile_NCHW, axes=(-2, -1)), np.array([y0, width - x1, y1, width - x0])
        x0, y0, x1, y1 = box_xyxy
        width = tile_NCHW.shape[-1]
        tile_NCHW, box_xyxy = tile_NCHW[..., ::-1], np.array([width - x1, y0, width - x0, y1])
