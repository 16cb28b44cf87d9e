"""Phrases that mean one object, or some of them, made from boxes by rules: kind, side, size, count, relation.

A rule speaks only where it is clear: the leftmost must be leftmost by a margin, the largest by its area. Boxes are
x0, y0, x1, y1 in pixels of an image of ``size`` (width, height). ``every_phrase`` is all that the rules can say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np
import numpy.typing as npt

Boxes = npt.NDArray[np.float64]
MARGIN = 0.04
"""Of the image's side, by which an extreme must lead."""
AREA_RATIO = 1.25
ORDINALS = ("second", "third")
NUMBERS = ("two", "three", "four", "five", "six")
EXTREMES = {
    "left": (0, 1), "right": (0, -1), "top": (1, 1), "bottom": (1, -1),
}  # fmt: skip
"""Axis of the centre and the sign by which it is sorted."""
CORNERS = {"upper left": (0, 0), "upper right": (1, 0), "lower left": (0, 1), "lower right": (1, 1)}
RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}
NEAR = ("next to", "nearest to", "closest to")
NAMES = {
    "airplane": ("airplane", "plane"), "helicopter": ("helicopter",), "boat": ("boat", "ship"), "car": ("car",),
    "truck": ("truck",), "van": ("van",),
}  # fmt: skip
"""What phrases call the classes of the detect task, singular; the plurals end in s."""
ONLY = ("{name}", "the {name}", "the only {name}")
SEVERAL = ("the {number} {name}s", "all {name}s")
FIRST = (
    ("the {name} on the {side}", "the {side}most {name}"),
    ("the {name} at the {side}", "the {name} nearest the {side}"),
)
"""By axis."""
LATER = "the {ordinal} {name} from the {side}"
IN_CORNER, IN_CENTER = "the {name} in the {corner}", "the {name} in the center"
LARGEST, SMALLEST = ("the largest {name}", "the biggest {name}"), ("the smallest {name}",)
RELATED = "the {name} {relation} the {other}"


@dataclass(frozen=True)
class Phrase:
    """Words, and which boxes they mean."""

    words: str
    boxes: tuple[int, ...]


@dataclass(frozen=True)
class Objects:
    """Boxes [n,4] of an image of ``size`` with the names of their kinds, singular."""

    boxes: Boxes
    names: Sequence[str]
    size: tuple[float, float]

    @property
    def centres(self) -> Boxes:
        """[n,2] as shares of the image."""
        return np.asarray((self.boxes[:, :2] + self.boxes[:, 2:]) / 2 / np.array(self.size))

    def of(self, name: str) -> list[int]:
        return [i for i, other in enumerate(self.names) if other == name]


def phrases(objects: Objects) -> list[Phrase]:
    """Every phrase that a rule allows."""
    found: list[Phrase] = []
    for name in dict.fromkeys(objects.names):
        chosen = objects.of(name)
        for rule in RULES:
            found += rule(objects, name, chosen)
    return found


def every_phrase() -> list[str]:
    """All that the rules can say of objects with NAMES, for a tokenizer and for a list of words that are understood."""
    names = [name for names in NAMES.values() for name in names]
    related = [
        RELATED.format(name=name, relation=relation, other=other)
        for name, other in permutations(names, 2)
        for relation in (*NEAR, *RELATIONS)
    ]
    return [*(words.format(name=name) for name in names for words in _of_one_kind()), *related]


def _of_one_kind() -> Iterator[str]:
    """What is said without another kind, but for the name."""
    yield from (*ONLY, *LARGEST, *SMALLEST, IN_CENTER)
    for words in SEVERAL:
        yield from dict.fromkeys(words.format(number=number, name="{name}") for number in NUMBERS)
    for side, (axis, _) in EXTREMES.items():
        yield from (words.format(side=side, name="{name}") for words in FIRST[axis])
        yield from (LATER.format(ordinal=ordinal, side=side, name="{name}") for ordinal in ORDINALS)
    yield from (IN_CORNER.format(corner=corner, name="{name}") for corner in CORNERS)


def by_kind(objects: Objects, name: str, chosen: list[int]) -> list[Phrase]:
    """The only one of its kind, or all of a few."""
    if len(chosen) == 1:
        return [Phrase(words.format(name=name), (chosen[0],)) for words in ONLY]
    if len(chosen) - 2 < len(NUMBERS):
        number = NUMBERS[len(chosen) - 2]
        return [Phrase(words.format(number=number, name=name), tuple(chosen)) for words in SEVERAL]
    return []


def by_side(objects: Objects, name: str, chosen: list[int]) -> list[Phrase]:
    """First, second and third from a side, and what is alone in a corner or in the centre."""
    found: list[Phrase] = []
    if len(chosen) < 2:
        return found
    centres = objects.centres[chosen]
    for side, (axis, sign) in EXTREMES.items():
        order = np.argsort(sign * centres[:, axis], kind="stable")
        along = sign * centres[order, axis]
        clear = np.diff(along, append=np.inf) > MARGIN
        if clear[0]:
            found += [Phrase(words.format(name=name, side=side), (chosen[order[0]],)) for words in FIRST[axis]]
        for rank, ordinal in enumerate(ORDINALS, start=1):
            if rank < len(chosen) and clear[rank - 1] and clear[rank]:
                words = LATER.format(ordinal=ordinal, name=name, side=side)
                found.append(Phrase(words, (chosen[order[rank]],)))
    cells = (centres * 2).astype(int)
    for corner, (column, row) in CORNERS.items():
        inside = [i for i, cell in zip(chosen, cells, strict=True) if tuple(cell) == (column, row)]
        if len(inside) == 1:
            found.append(Phrase(IN_CORNER.format(name=name, corner=corner), (inside[0],)))
    middle = [i for i, c in zip(chosen, centres, strict=True) if np.abs(c - 0.5).max() < 1 / 6]
    if len(middle) == 1:
        found.append(Phrase(IN_CENTER.format(name=name), (middle[0],)))
    return found


def by_size(objects: Objects, name: str, chosen: list[int]) -> list[Phrase]:
    """The largest and the smallest."""
    if len(chosen) < 2:
        return []
    areas = np.prod(objects.boxes[chosen, 2:] - objects.boxes[chosen, :2], axis=1)
    order = np.argsort(-areas, kind="stable")
    found = []
    if areas[order[0]] > AREA_RATIO * areas[order[1]]:
        found += [Phrase(words.format(name=name), (chosen[order[0]],)) for words in LARGEST]
    if areas[order[-2]] > AREA_RATIO * areas[order[-1]]:
        found += [Phrase(words.format(name=name), (chosen[order[-1]],)) for words in SMALLEST]
    return found


def by_relation(objects: Objects, name: str, chosen: list[int]) -> list[Phrase]:
    """Beside the only one of another kind: nearest to it, or alone on one side of it."""
    found: list[Phrase] = []
    centres = objects.centres
    for other in dict.fromkeys(objects.names):
        anchors = objects.of(other)
        if other == name or len(anchors) != 1:
            continue
        away = centres[chosen] - centres[anchors[0]]
        far = np.linalg.norm(away, axis=1)
        order = np.argsort(far, kind="stable")
        if len(chosen) == 1 or far[order[1]] - far[order[0]] > MARGIN:
            near = [RELATED.format(name=name, relation=relation, other=other) for relation in NEAR]
            found += [Phrase(words, (chosen[order[0]],)) for words in near]
        for relation, (axis, sign) in RELATIONS.items():
            beyond = [i for i, d in zip(chosen, away, strict=True) if sign * d[axis] > MARGIN]
            if len(beyond) == 1:
                words = RELATED.format(name=name, relation=relation, other=other)
                found.append(Phrase(words, (beyond[0],)))
    return found


Rule = Callable[[Objects, str, list[int]], list[Phrase]]
RULES: tuple[Rule, ...] = (by_kind, by_side, by_size, by_relation)
