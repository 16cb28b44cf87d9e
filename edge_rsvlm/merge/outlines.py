"""Outlines of pixel regions as simple rings, straight from their runs.

Corners of a rectilinear outline pair up: along a row, sorted, first with second and so on, and along a column alike.
Following row and column pairs in turn walks a ring (after O'Rourke 1988, "Uniqueness of orthogonal connect-the-dots").
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from edge_rsvlm.merge.runs import Runs

Ring = NDArray[np.float64]


def outlines(runs: Runs, piece_R: NDArray[np.intp]) -> Iterator[tuple[int, list[Ring]]]:
    """(piece, rings) of every 4-connected piece: the exterior, then its holes; rings are closed and simple.

    ``piece_R`` names the piece of each run; pieces come sorted by that number.
    """
    corners = _corners(runs, piece_R)
    rings: list[Ring] = []
    current: int | None = None
    for piece, ring in _walk(*corners):
        if piece != current and current is not None:
            yield current, _exterior_first(rings)
            rings = []
        current = piece
        rings += _split(ring)
    if current is not None:
        yield current, _exterior_first(rings)


def _corners(
    runs: Runs, piece_R: NDArray[np.intp]
) -> tuple[NDArray[np.intp], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """(piece, y, x, turn) of every corner, sorted; where two pixels meet in a corner only, it is there twice.

    ``turn`` is the sum, over the runs that start or end there, of +1 or -1: 0 where an edge goes straight on, 2 where
    the pixels up left and down right meet, -2 where those up right and down left do.
    """
    piece = np.tile(piece_R, 4)
    y = np.concatenate([runs.row_R, runs.row_R, runs.row_R + 1, runs.row_R + 1])
    x = np.concatenate([runs.col_R, runs.end_R, runs.col_R, runs.end_R])
    turn = np.repeat(np.array([1, -1, -1, 1]), len(runs))
    order = np.lexsort((x, y, piece))
    piece, y, x, turn = piece[order], y[order], x[order], turn[order]
    new = np.ones(len(x), bool)
    new[1:] = (np.diff(piece) != 0) | (np.diff(y) != 0) | (np.diff(x) != 0)
    starts = np.flatnonzero(new)
    turn = np.add.reduceat(turn, starts)
    repeated = np.repeat(np.arange(len(starts)), np.abs(turn))
    at = starts[repeated]
    return piece[at], y[at], x[at], turn[repeated]


def _walk(
    piece: NDArray[np.intp], y: NDArray[np.int64], x: NDArray[np.int64], turn: NDArray[np.int64]
) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """(piece, corners (x, y)) of every ring, from its first corner; may pass one corner twice."""
    count = len(x)
    # Of a corner that is there twice the first copy ends the edge from the left and the second begins the edge to the
    # right. Pixels that meet in a corner only do not touch, so the left edge goes on upwards when the pixel up left is
    # inside, and downwards otherwise: then the copies change places along the column.
    copy = np.zeros(count, np.int64)
    copy[1:] = (np.abs(turn[1:]) == 2) & (np.diff(piece) == 0) & (np.diff(y) == 0) & (np.diff(x) == 0)
    down = np.lexsort((np.where(turn == -2, 1 - copy, copy), y, x, piece))
    across = np.arange(count) ^ 1
    along = np.empty(count, np.intp)
    along[down] = down[np.arange(count) ^ 1]
    across_list, along_list = across.tolist(), along.tolist()
    points, pieces = list(zip(x.tolist(), y.tolist(), strict=True)), piece.tolist()
    seen = bytearray(count)
    for start in range(count):
        if seen[start]:
            continue
        ring, at = [], start
        while not seen[at]:
            other = across_list[at]
            seen[at] = seen[other] = 1
            ring += [points[at], points[other]]
            at = along_list[other]
        yield pieces[start], ring


def _split(ring: list[tuple[int, int]]) -> list[Ring]:
    """Closed rings that pass no corner twice: a loop is cut off where the walk comes back to a corner."""
    if len(set(ring)) == len(ring):
        return [np.array([*ring, ring[0]], np.float64)]
    rings, path, position = [], list[tuple[int, int]](), dict[tuple[int, int], int]()
    for point in [*ring, ring[0]]:
        if point in position:
            loop = path[position[point] :]
            rings.append(np.array([*loop, point], np.float64))
            for passed in loop[1:]:
                del position[passed]
            del path[position[point] + 1 :]
        else:
            position[point] = len(path)
            path.append(point)
    return rings


def _exterior_first(rings: list[Ring]) -> list[Ring]:
    largest = max(range(len(rings)), key=lambda i: _area(rings[i]))
    return [rings[largest], *rings[:largest], *rings[largest + 1 :]]


def _area(ring: Ring) -> float:
    x, y = ring.T
    return abs(float((x[:-1] * y[1:] - x[1:] * y[:-1]).sum()))
