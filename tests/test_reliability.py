"""What scores of changes are worth, on changes whose labels are known."""

from types import SimpleNamespace

import numpy as np
import pytest

from edge_rsvlm.raster.shift import Shift
from tests.scenes import UTM, write

pytest.importorskip("torch", reason="needs torch: not installed")

from edge_rsvlm.export.default.reliability import Told, banded, calibration_error, told


def test_scores_that_are_shares_have_no_error():
    bands = banded([Told(0.25, 100, 25), Told(0.75, 300, 225)])
    assert [(b.changes, b.area_px) for b in bands] == [(1, 100), (1, 300)]
    assert calibration_error(bands) == pytest.approx(0)


def test_a_band_is_weighed_by_area_and_holds_its_lower_edge():
    (band,) = banded([Told(0.4, 100, 100), Told(0.45, 300, 0)])
    assert (band.low, band.high, band.changes) == (0.4, 0.5, 2)
    assert band.share == 0.25 and band.score == pytest.approx((40 + 135) / 400)
    assert calibration_error([band]) == pytest.approx((40 + 135) / 400 - 0.25)
    assert [b.high for b in banded([Told(1.0, 1, 1)])] == [1.0]
    assert calibration_error(banded([])) == 0


def test_labels_are_those_under_the_polygon_where_the_dates_lie_on_each_other(tmp_path):
    labels = np.zeros((1, 40, 50), np.uint8)
    labels[0, 10:20, 14:24] = 1  # on the earlier date, which lies 4 pixels to the right of the later one
    write(tmp_path / "change.tif", labels, **UTM)
    square = {"type": "Polygon", "coordinates": [[[10, 10], [30, 10], [30, 20], [10, 20], [10, 10]]]}

    def change(before, after, emit):
        emit({"score": 0.5, "polygon": square}, None)
        return SimpleNamespace(registration=Shift(dx=(4.0, 0.0, 0.0), windows=3, agreeing=3, centre_xy=(25.0, 20.0)))

    assert list(told(SimpleNamespace(change=change), tmp_path)) == [Told(0.5, 200, 100)]
