"""The sheet of alerts that the docs show."""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="needs torch: not installed")

from dataclasses import replace
from itertools import islice

from PIL import Image

from edge_rsvlm.export.default.alert_pictures import GAP, SIDE, aerial_pairs, river_pairs, sheet
from edge_rsvlm.report.drawing import Bitmap, Text
from tests.made_alerts import alert


def test_each_alert_has_both_dates_and_what_is_told(tmp_path):
    files = []
    for name, size in (("before", (256, 128)), ("after", (256, 128))):
        files.append(str(tmp_path / f"{name}.webp"))
        Image.new("RGB", size, (90, 120, 60)).save(files[-1])
    told = [replace(alert(n), crops=tuple(files), sentence=f"About {n} m2 changed.") for n in (1, 2, 3)]
    drawing = sheet(told)
    pictures = [item for item in drawing.items if isinstance(item, Bitmap)]
    assert [p.box[2:] for p in pictures] == [(SIDE, SIDE / 2)] * 6
    assert drawing.height == 2 * (SIDE + GAP) + GAP, "two columns"
    texts = [item.text for item in drawing.items if isinstance(item, Text)]
    assert all(each.sentence in texts for each in told)


def test_pairs_are_first_and_last_of_a_site_and_neighbours_of_a_series(tmp_path):
    for folder, names in (("naip_trees/train", ("a_2016_1", "a_2018_1", "a_2020_1", "b_2016_1", "b_2020_1")),
                          ("series/landsat_ucayali", ("1985", "1990", "1995"))):  # fmt: skip
        (tmp_path / folder).mkdir(parents=True)
        for name in names:
            (tmp_path / folder / f"{name}.tif").touch()
    assert [(a.stem, b.stem) for a, b in aerial_pairs(tmp_path)] == [("a_2016_1", "a_2020_1"), ("b_2016_1", "b_2020_1")]
    assert [(a.stem, b.stem) for a, b in islice(river_pairs(tmp_path), 9)] == [("1985", "1990"), ("1990", "1995")]
