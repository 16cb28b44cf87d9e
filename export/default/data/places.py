"""Answers that say where something is, as they read when the image is turned or mirrored.

An answer names cells of a 3 x 3 grid ("left and right", "top left corner", "minor diagonal"). The symmetries of the
square move these cells, and of the answers that name the cells they come to, the one that people give most often is
the answer about the turned image.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable

import numpy as np

from edge_rsvlm.export.default.data.views import dihedral

ROWS = {"top": 0, "up": 0, "upper": 0, "bottom": 2, "down": 2, "lower": 2}
COLUMNS = {"left": 0, "right": 2}
CENTER = frozenset({"center", "middle"})
SILENT = frozenset({"corner", "corners", "the", "of", "part"})
MAIN, MINOR = frozenset({(0, 0), (2, 2)}), frozenset({(0, 2), (2, 0)})
DIAGONALS = {"diagonal": MAIN, "main diagonal": MAIN, "minor diagonal": MINOR}
EITHER_WAY = frozenset({"everywhere", "four corners", "i cannot see it"})
"""Answers that hold whichever way an image lies."""
Cell = tuple[int, int]
Cells = frozenset[Cell]


def cells(answer: str) -> Cells | None:
    """The (row, column) cells that an answer names; None where it says anything else."""
    said = answer.lower().strip()
    if said in DIAGONALS:
        return DIAGONALS[said]
    found: set[Cell] = set()
    for part in re.split(r",|\band\b", said):
        row = column = None
        for word in (w for w in part.split() if w not in SILENT):
            starts_anew = (
                word in CENTER or (word in ROWS and row is not None) or (word in COLUMNS and column is not None)
            )
            if starts_anew and (row is not None or column is not None):
                found.add(_cell(row, column))
                row = column = None
            if word in CENTER:
                found.add((1, 1))
            elif word in ROWS:
                row = ROWS[word]
            elif word in COLUMNS:
                column = COLUMNS[word]
            else:
                return None
        if row is not None or column is not None:
            found.add(_cell(row, column))
    return frozenset(found) or None


def _cell(row: int | None, column: int | None) -> Cell:
    return 1 if row is None else row, 1 if column is None else column


def moved(named: Cells, view: int) -> Cells:
    """Where cells are in view 0..7 of the image (see ``dihedral``)."""
    before = dihedral(np.arange(9).reshape(3, 3), view)
    return frozenset(cell for cell in np.ndindex(3, 3) if divmod(int(before[cell]), 3) in named)


class Turned:
    """Answers about turned images, in the words of ``answers`` about images as they lie."""

    def __init__(self, answers: Iterable[str]) -> None:
        counts: dict[Cells, Counter[str]] = defaultdict(Counter)
        for answer in answers:
            if named := cells(answer):
                counts[named][answer] += 1
        self._words = {named: said.most_common(1)[0][0] for named, said in counts.items()}

    def __call__(self, answer: str, view: int) -> str | None:
        """The answer in this view; None where nobody gave one that means it."""
        if view == 0 or answer.lower() in EITHER_WAY:
            return answer
        named = cells(answer)
        return None if named is None else self._words.get(moved(named, view))
