"""What goes wrong, as one picture: ``python -m edge_rsvlm.export.default.failure_pictures``.

Of images held out of training and in the public domain: the captions that name most of what is not there (UC Merced's
validation part, by its multi-labels), and the images where most airplanes are missed or made up (Aerial Airport).
Nothing is chosen by hand.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_rsvlm.bundle import load_bundle, packaged_folder
from edge_rsvlm.evaluate.ground import overlaps
from edge_rsvlm.evaluate.labels import chosen, locate, read_coco
from edge_rsvlm.export.default.data.scenes import read_scenes
from edge_rsvlm.export.default.splits import FOLDER
from edge_rsvlm.export.default.truth import named
from edge_rsvlm.pipeline.detect import DetectQuery
from edge_rsvlm.pipeline.session import Limits, Session
from edge_rsvlm.raster.inputs import Source, list_inputs
from edge_rsvlm.raster.reader import open_raster
from edge_rsvlm.report.drawing import PNG_SCALE, Bitmap, Drawing, Item, Line, Text, to_image

CAPTIONS, SCENES = 6, 3
SIDE, GAP, TEXT_HIGH = 256, 12, 84
COLUMNS = 3
PAPER, INK, FAINT = "#fafbf8", "#16181d", "#5b6472"
RIGHT, WRONG, MISSED = "#2f9e44", "#e03131", "#f2b705"
SAME_IOU = 0.5
AIRPLANE = "airplane"
MEMORY_BYTES = 2 << 30
Box = tuple[float, float, float, float]
"""(x, y, width, height) in pixels."""


@dataclass(frozen=True)
class Failure:
    """A picture [H, W, 3], what is drawn on it by colour, and what is said below: in full, and in grey.

    Boxes are in pixels of an image whose longest side has ``longest_px``.
    """

    picture_HW3: NDArray[np.uint8]
    longest_px: int
    boxes: tuple[tuple[Box, str], ...]
    said: str
    truth: str


@dataclass(frozen=True)
class Matched:
    """Boxes of one image that were found and are there, found and are not, and were not found."""

    right: tuple[Box, ...]
    wrong: tuple[Box, ...]
    missed: tuple[Box, ...]

    @property
    def mistakes(self) -> int:
        return len(self.wrong) + len(self.missed)


def captions(session: Session, data: Path) -> list[Failure]:
    """Of those with most false names, the ones with the fewest true names first."""
    labels = {s.name: set(s.labels) for s in read_scenes(data / "ucm_captions" / "val.jsonl", "ucm_val")}
    ranked: list[tuple[tuple[int, int, str], Source, str, set[str]]] = []
    for source in list_inputs([str(data / "ucm_captions" / "val.tar")]):
        said = session.caption(source.path, lambda *_: None).caption or ""
        told, true = named(said), labels[Path(source.name).name]
        ranked.append(((-len(told - true), len(told & true), source.name), source, said, true))
    worst = sorted(ranked, key=lambda row: row[0])[:CAPTIONS]
    return [
        Failure(*_picture(source), (), said, f"it shows {', '.join(sorted(true))}") for _, source, said, true in worst
    ]


def airplanes(session: Session, data: Path) -> list[Failure]:
    """Images with most mistakes first."""
    folder = data / "aerial_airport"
    _, truth = read_coco(folder / "train.json")
    names = chosen(list(truth), FOLDER / "aerial_airport.txt", folder)
    found: list[tuple[int, Failure]] = []
    for source, name in zip(locate(str(folder / "train.tar"), names), names, strict=True):
        result = matched(_detected(session, source), [t.box for t in truth[name]])
        drawn = ((result.right, RIGHT), (result.wrong, WRONG), (result.missed, MISSED))
        outlined = tuple((box, colour) for group, colour in drawn for box in group)
        said = f"{len(result.right)} airplanes found, {len(result.missed)} missed, {len(result.wrong)} made up"
        found.append((result.mistakes, Failure(*_picture(source), outlined, said, "green, yellow, red")))
    return [failure for _, failure in sorted(found, key=lambda row: -row[0])[:SCENES]]


def _detected(session: Session, source: Source) -> list[Box]:
    """Best first."""
    boxes: list[tuple[float, Box]] = []

    def keep(record: dict[str, Any], _: object) -> None:
        x, y, width, height = record["box"]
        boxes.append((record["score"], (x, y, width, height)))

    session.detect(source.path, DetectQuery((AIRPLANE,)), keep)
    return [box for _, box in sorted(boxes, reverse=True)]


def matched(found: Sequence[Box], truth: Sequence[Box]) -> Matched:
    """Each found box, best first, takes the labelled one that it overlaps most, by half at least."""
    shared = overlaps(found, truth)
    right, wrong = [], []
    for box, row in zip(found, shared, strict=True):
        if row.max(initial=0.0) >= SAME_IOU:
            shared[:, row.argmax()] = -1  # taken
            right.append(box)
        else:
            wrong.append(box)
    missed = tuple(box for box, column in zip(truth, shared.T, strict=True) if not (column < 0).any())
    return Matched(tuple(right), tuple(wrong), missed)


def _picture(source: Source) -> tuple[NDArray[np.uint8], int]:
    with open_raster(source.path) as raster:
        longest_px = max(raster.georeference.width, raster.georeference.height)
        return raster.shrunk(2 * SIDE).data_CHW[:3].transpose(1, 2, 0), longest_px


def sheet(failures: Sequence[Failure]) -> Drawing:
    """In rows of COLUMNS."""
    items: list[Item] = []
    for n, failure in enumerate(failures):
        items += _one(failure, n % COLUMNS * (SIDE + GAP) + GAP, n // COLUMNS * (SIDE + TEXT_HIGH) + GAP)
    rows = -(-len(failures) // COLUMNS)
    return Drawing(COLUMNS * (SIDE + GAP) + GAP, rows * (SIDE + TEXT_HIGH) + GAP, PAPER, tuple(items))


def _one(failure: Failure, x: float, y: float) -> Iterator[Item]:
    high, wide = (SIDE * side / max(failure.picture_HW3.shape[:2]) for side in failure.picture_HW3.shape[:2])
    yield Bitmap((x, y, wide, high), failure.picture_HW3)
    for (left, top, width, height), colour in failure.boxes:
        corners = [(left, top), (left + width, top), (left + width, top + height), (left, top + height)]
        scale = SIDE / failure.longest_px
        yield Line([(x + u * scale, y + v * scale) for u, v in corners], colour, closed=True)
    lines = textwrap.wrap(failure.said, 42)
    for k, line in enumerate(lines):
        yield Text((x, y + high + 16 + 16 * k), line, 12, INK)
    for k, line in enumerate(textwrap.wrap(failure.truth, 50)):
        yield Text((x, y + high + 18 + 16 * len(lines) + 13 * k), line, 10.5, FAINT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("docs/pictures/failures.webp"))
    options = parser.parse_args()
    session = Session(load_bundle(packaged_folder()), Limits(MEMORY_BYTES))
    failures = [*captions(session, options.data), *airplanes(session, options.data)]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    to_image(sheet(failures)).reduce(PNG_SCALE).save(options.out, "WEBP", quality=80)
    for failure in failures:
        print(f"{failure.said} ({failure.truth})")


if __name__ == "__main__":
    main()
