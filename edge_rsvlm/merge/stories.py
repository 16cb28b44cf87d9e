"""Changes of many dates linked into stories: where ground changed, between which dates, and whether it changed back.

Dates are 0 ... K, and pair p compares dates p and p + 1. Patches of ground that changed in one pair are laid onto cells
one by one, in the order of pairs, so that memory follows the cells and the number of patches. A patch goes on with the
story of earlier patches that it overlaps or lies along. A cell belongs to the story that changed it last, so that
stories never overlap. Letters: H, W rows and columns of cells, N cells of a story.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MOST_PAIRS = 63
"""A bit for each."""
LINKED_SHARE = 0.4
"""Of the shorter rim of two patches: so much of the grown later one must lie on the earlier one."""
GRADUAL_SHARE = 0.5
"""Of a patch between the first and the last date that no pair has seen change: then it changed little by little."""
GRADUAL = -1
"""The pair of such a patch."""


@dataclass(frozen=True)
class Patch:
    """Ground that changed in one pair: ``cells`` of it, and ``rim`` of them at its edge."""

    pair: int
    cells: int
    rim: int


@dataclass(frozen=True)
class Story:
    """``patches`` are numbers of patches as they were added. ``mask_HW`` are its cells from (``row``, ``col``) on, and
    ``steps_HW`` has bit p on those that changed in pair p.

    ``different_D``: of dates 0 ... K, how many of its cells differ from date 0; of a gradual story, one that no pair
    has seen, only the last is known and others are -1. ``confirmed`` cells differ between date 0 and date K when those
    two are compared.
    """

    patches: tuple[int, ...]
    row: int
    col: int
    mask_HW: NDArray[np.bool_]
    steps_HW: NDArray[np.uint64]
    different_D: NDArray[np.int64]
    confirmed: int

    @property
    def cells(self) -> int:
        return int(self.mask_HW.sum())

    def changed_HW(self, pair: int) -> NDArray[np.bool_]:
        """Its cells that changed in a pair."""
        changed: NDArray[np.bool_] = (self.steps_HW >> np.uint64(pair)) & np.uint64(1) > 0
        return changed


class Ledger:
    """Cells of ``height`` x ``width``, and what changed on them in ``pairs`` pairs."""

    BYTES_PER_CELL = 8 + 4 + 1 + 5 * 8
    """As kept, and as sorted in the end."""

    def __init__(self, height: int, width: int, pairs: int) -> None:
        if not 1 <= pairs <= MOST_PAIRS:
            raise ValueError(f"a ledger has 1 to {MOST_PAIRS} pairs, not {pairs}")
        self._pairs = pairs
        self._steps_HW = np.zeros((height, width), np.uint64)
        self._latest_HW = np.zeros((height, width), np.int32)  # number of a patch, from 1
        self._ended_HW: NDArray[np.bool_] | None = None
        self._patches: list[Patch] = []
        self._parents: list[int] = []

    def add(self, pair: int, row: int, col: int, mask_HW: NDArray[np.bool_]) -> int | None:
        """Lay down a patch of a pair, the cells of ``mask_HW`` from (row, col) on; its number, None where it has none.

        Pairs come in order.
        """
        patch = Patch(pair, int(mask_HW.sum()), _rim(mask_HW))
        if not patch.cells:
            return None
        number = self._append(patch)
        for earlier in self._neighbours(number, row, col, mask_HW):
            self._parents[self._root(number)] = self._root(earlier)
        self._lay(number, row, col, mask_HW)
        window = self._steps_HW[row : row + mask_HW.shape[0], col : col + mask_HW.shape[1]]
        window[mask_HW] |= np.uint64(1 << pair)
        return number

    def compared_ends(self) -> None:
        """The first and the last date were compared: what ``add_overall`` does not name is as it was."""
        if self._ended_HW is None:
            self._ended_HW = np.zeros(self._steps_HW.shape, bool)

    def add_overall(self, row: int, col: int, mask_HW: NDArray[np.bool_]) -> int | None:
        """Lay down what differs between the first and the last date, after all pairs.

        The number of a patch of its own where most of it changed so slowly that no pair showed it.
        """
        self.compared_ends()
        assert self._ended_HW is not None
        part = slice(row, row + mask_HW.shape[0]), slice(col, col + mask_HW.shape[1])
        self._ended_HW[part] |= mask_HW
        unseen_HW = mask_HW & (self._latest_HW[part] == 0)
        count = int(unseen_HW.sum())
        if not count or count < GRADUAL_SHARE * mask_HW.sum():
            return None
        number = self._append(Patch(GRADUAL, count, _rim(unseen_HW)))
        self._lay(number, row, col, unseen_HW)
        return number

    def stories(self) -> Iterator[Story]:
        """In the order of their first patches; those that later ones cover whole are left out."""
        if not self._patches:
            return
        roots_P = np.array([self._root(number) for number in range(len(self._patches))])
        at_N = np.flatnonzero(self._latest_HW)
        root_N = roots_P[self._latest_HW.ravel()[at_N] - 1]
        order = np.argsort(root_N, kind="stable")
        at_N, root_N = at_N[order], root_N[order]
        starts = np.flatnonzero(np.diff(root_N, prepend=-1))
        cells = dict(zip(root_N[starts].tolist(), np.split(at_N, starts[1:]), strict=True))
        _, first_R = np.unique(roots_P, return_index=True)
        for first in sorted(first_R.tolist()):
            root = int(roots_P[first])
            if root in cells:
                yield self._story(tuple(np.flatnonzero(roots_P == root).tolist()), cells[root])

    def _story(self, patches: tuple[int, ...], at_N: NDArray[np.intp]) -> Story:
        rows, cols = np.divmod(at_N, self._latest_HW.shape[1])
        row, col = int(rows.min()), int(cols.min())
        mask_HW = np.zeros((int(rows.max()) - row + 1, int(cols.max()) - col + 1), bool)
        mask_HW[rows - row, cols - col] = True
        steps_N = self._steps_HW.ravel()[at_N]
        steps_HW = np.zeros(mask_HW.shape, np.uint64)
        steps_HW[mask_HW] = steps_N
        ended_N = None if self._ended_HW is None else self._ended_HW.ravel()[at_N]
        confirmed = 0 if ended_N is None else int(ended_N.sum())
        if all(self._patches[number].pair == GRADUAL for number in patches):
            different_D = np.full(self._pairs + 1, -1, np.int64)
            different_D[0], different_D[-1] = 0, len(at_N)
        else:
            different_D = different(steps_N, ended_N, self._pairs)
        return Story(patches, row, col, mask_HW, steps_HW, different_D, confirmed)

    def _neighbours(self, number: int, row: int, col: int, mask_HW: NDArray[np.bool_]) -> Iterator[int]:
        """Earlier patches that a new one goes on with."""
        grown_HW = _grown(np.pad(mask_HW, 1))
        top, left = max(row - 1, 0), max(col - 1, 0)
        latest_HW = self._latest_HW[top : row + mask_HW.shape[0] + 1, left : col + mask_HW.shape[1] + 1]
        grown_HW = grown_HW[top - row + 1 :, left - col + 1 :][: latest_HW.shape[0], : latest_HW.shape[1]]
        numbers, counts = np.unique(latest_HW[grown_HW & (latest_HW > 0)] - 1, return_counts=True)
        patch = self._patches[number]
        for other, count in zip(numbers.tolist(), counts.tolist(), strict=True):
            earlier = self._patches[other]
            if earlier.pair < patch.pair and count >= LINKED_SHARE * min(patch.rim, earlier.rim):
                yield other

    def _append(self, patch: Patch) -> int:
        self._patches.append(patch)
        self._parents.append(len(self._parents))
        return len(self._patches) - 1

    def _lay(self, number: int, row: int, col: int, mask_HW: NDArray[np.bool_]) -> None:
        window = self._latest_HW[row : row + mask_HW.shape[0], col : col + mask_HW.shape[1]]
        window[mask_HW] = number + 1

    def _root(self, number: int) -> int:
        while self._parents[number] != number:
            self._parents[number] = self._parents[self._parents[number]]
            number = self._parents[number]
        return number


def different(steps_N: NDArray[np.uint64], ended_N: NDArray[np.bool_] | None, pairs: int) -> NDArray[np.int64]:
    """[K + 1]: on each date, how many of N cells differ from date 0.

    ``steps_N`` has bit p where pair p changed, ``ended_N`` says whether dates 0 and K differ (None: not compared, then
    every second change is one back). A cell that is as it was in the end differed from its first change to its last
    one. Where that is one change alone, it differed until some time before the last date; of the last pair alone, what
    the pair says is believed.
    """
    bits_PN = (steps_N[None] >> np.arange(pairs, dtype=np.uint64)[:, None]) & np.uint64(1) > 0
    count_N = bits_PN.sum(axis=0)
    first_N = bits_PN.argmax(axis=0) + 1
    last_N = pairs - bits_PN[::-1].argmax(axis=0)
    ended_N = count_N % 2 == 1 if ended_N is None else ended_N
    back_N = np.where(count_N >= 2, last_N, np.maximum(pairs, first_N + 1))
    stop_N = np.where(ended_N, pairs + 1, back_N)
    change_D = np.zeros(pairs + 2, np.int64)
    np.add.at(change_D, first_N[count_N > 0], 1)
    np.add.at(change_D, stop_N[count_N > 0], -1)
    return np.cumsum(change_D)[:-1]


def _grown(mask_HW: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """With the 8 neighbours of every cell, as far as the mask reaches."""
    across: NDArray[np.bool_] = mask_HW.copy()
    across[:, 1:] |= mask_HW[:, :-1]
    across[:, :-1] |= mask_HW[:, 1:]
    grown: NDArray[np.bool_] = across.copy()
    grown[1:] |= across[:-1]
    grown[:-1] |= across[1:]
    return grown


def _rim(mask_HW: NDArray[np.bool_]) -> int:
    """Cells of a mask that have a neighbour (of 8) outside."""
    padded = np.pad(mask_HW, 1)
    return int((padded & _grown(~padded)).sum())
