"""The sheet of what goes wrong."""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="needs torch: not installed")

import numpy as np

from edge_rsvlm.export.default.failure_pictures import COLUMNS, GAP, SIDE, Failure, matched, sheet
from edge_rsvlm.report.drawing import Bitmap, Line, Text


def test_each_labelled_box_is_found_once_by_the_best():
    there, other = (0.0, 0.0, 10.0, 10.0), (50.0, 50.0, 10.0, 10.0)
    close, again, nowhere = (1.0, 0.0, 10.0, 10.0), (0.0, 1.0, 10.0, 10.0), (80.0, 0.0, 10.0, 10.0)
    found = matched([close, again, nowhere], [there, other])
    assert found.right == (close,) and found.wrong == (again, nowhere) and found.missed == (other,)
    assert found.mistakes == 3
    assert matched([], [there]).missed == (there,) and matched([close], []).wrong == (close,)


def test_boxes_lie_where_they_are_in_the_picture():
    picture = np.zeros((50, 100, 3), np.uint8)
    failures = [
        Failure(picture, 400, (((100.0, 0.0, 200.0, 200.0), "#e03131"),), f"said {n}", "true") for n in range(4)
    ]
    drawing = sheet(failures)
    bitmaps = [item for item in drawing.items if isinstance(item, Bitmap)]
    assert [b.box[2:] for b in bitmaps] == [(SIDE, SIDE / 2)] * 4
    assert bitmaps[COLUMNS].box[0] == GAP and bitmaps[COLUMNS].box[1] > bitmaps[0].box[1] + SIDE
    (x, y), _, (right, bottom), _ = next(item.points for item in drawing.items if isinstance(item, Line))
    assert (x - GAP, y - GAP, right - GAP, bottom - GAP) == (SIDE / 4, 0, SIDE * 3 / 4, SIDE / 2)
    said = [item.text for item in drawing.items if isinstance(item, Text)]
    assert said[::2] == [f"said {n}" for n in range(4)]
