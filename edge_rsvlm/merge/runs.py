"""Runs: the pixels of regions as maximal stretches of columns in a row, and which of them touch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Runs:
    """R runs of pixels of one value: row, first column, column after the last, and the sum of their probabilities."""

    row_R: NDArray[np.int64]
    col_R: NDArray[np.int64]
    end_R: NDArray[np.int64]
    value_R: NDArray[np.uint8]
    probability_R: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.row_R)

    @property
    def length_R(self) -> NDArray[np.int64]:
        return self.end_R - self.col_R

    @classmethod
    def none(cls) -> Runs:
        nothing = np.zeros(0, np.int64)
        return cls(nothing, nothing, nothing, np.zeros(0, np.uint8), np.zeros(0))

    @classmethod
    def of(cls, first_row: int, value_HW: NDArray[np.uint8], probability_HW: NDArray[np.float32]) -> Runs:
        """The runs of values other than 0, in raster order.

        Each sum is of its own pixels alone, however the raster was cut.
        """
        padded = np.pad(value_HW, ((0, 0), (1, 1)))
        before, after = padded[:, :-1], padded[:, 1:]
        edge = before != after
        row_R, col_R = np.nonzero(edge & (after != 0))
        end_R = np.nonzero(edge & (before != 0))[1]
        if not len(row_R):
            return cls.none()
        inside = probability_HW[value_HW != 0].astype(np.float64)
        starts = np.cumsum(end_R - col_R) - (end_R - col_R)
        return cls(row_R + first_row, col_R, end_R, value_HW[row_R, col_R], np.add.reduceat(inside, starts))


def take(runs: Runs, chosen: NDArray[np.generic]) -> Runs:
    return Runs(*(getattr(runs, field.name)[chosen] for field in fields(Runs)))


def concatenate(parts: Sequence[Runs]) -> Runs:
    return Runs(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Runs)))


def links(
    runs: Runs, width: int, *, diagonal: bool, since_row: int | None = None
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Pairs (upper, lower) of runs of one value in adjacent rows that touch; ``runs`` are in raster order.

    ``since_row``: only pairs whose lower run lies in this row or below.
    """
    reach = 1 if diagonal else 0
    row_span = width + 2
    start_R, stop_R = runs.row_R * row_span + runs.col_R, runs.row_R * row_span + runs.end_R
    lower = np.arange(len(runs)) if since_row is None else np.flatnonzero(runs.row_R >= since_row)
    # In the row above: those that stop beyond our start and start before our stop, corners counted when diagonal.
    first = np.searchsorted(stop_R, start_R[lower] - row_span + (1 - reach))
    after = np.searchsorted(start_R, stop_R[lower] - row_span + reach)
    counts = np.maximum(after - first, 0)
    lower_E = np.repeat(lower, counts)
    upper_E = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts) + np.repeat(first, counts)
    same = runs.value_R[upper_E] == runs.value_R[lower_E]
    return upper_E[same], lower_E[same]


def components(count: int, a_E: NDArray[np.intp], b_E: NDArray[np.intp]) -> NDArray[np.intp]:
    """For each of ``count`` nodes the smallest node that links (a, b) connect it to.

    Roots are hooked onto smaller ones and paths halved until nothing moves (after Shiloach & Vishkin 1982).
    """
    label = np.arange(count)
    while True:
        a, b = label[a_E], label[b_E]
        apart = a != b
        if not apart.any():
            return label
        a_E, b_E, a, b = a_E[apart], b_E[apart], a[apart], b[apart]
        np.minimum.at(label, np.maximum(a, b), np.minimum(a, b))
        while not np.array_equal(jumped := label[label], label):
            label = jumped
