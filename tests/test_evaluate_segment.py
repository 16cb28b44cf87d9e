"""Masks are scored where objects are and around them."""

from __future__ import annotations

import json

import numpy as np
import pytest

from edge_rsvlm.errors import UsageError
from edge_rsvlm.evaluate.labels import read_points
from edge_rsvlm.evaluate.places import DIRECTIONS, Objects, ring_places
from edge_rsvlm.scoring import balanced_scores
from tests.scenes import pixels, write
from tests.test_evaluate import coco
from tests.wide import SEGMENT, runner, use_engine, write_bundle

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
SIZE = (200, 144)
SQUARES = ((20, 24, 24), (100, 80, 24))


@pytest.fixture
def run(tmp_path, monkeypatch):
    use_engine(monkeypatch)
    return runner(write_bundle(tmp_path / "bundle", segment=SEGMENT))


@pytest.fixture
def images(tmp_path):
    (tmp_path / "images").mkdir()
    write(tmp_path / "images" / "a.png", pixels(SQUARES, SIZE), "PNG")
    write(tmp_path / "images" / "b.png", pixels(SQUARES[:1], SIZE), "PNG")
    return tmp_path / "images"


def test_rings_are_round_a_point_and_outside_a_box():
    points = Objects.points(np.array([[50.0, 50.0], [62.0, 50.0], [1.0, 99.0]]))
    places = ring_places(points, (8, 16), (100, 100))
    distance = np.linalg.norm(places[:, None] - points.centres_P2, axis=2)
    assert (distance >= 8 - 1e-9).all() and np.isclose(distance.min(axis=1), 12).sum() > 20
    assert len(places) < 3 * DIRECTIONS  # one is in a corner, and two are close
    assert (places >= 0).all() and (places < 100).all()
    boxes = Objects.boxes(np.array([[40.0, 30.0, 20.0, 10.0]]))
    around = ring_places(boxes, (2, 4), (100, 100))
    assert len(around) == DIRECTIONS and boxes.centres_P2.tolist() == [[50.0, 35.0]]
    assert not ((around > (40, 30)) & (around < (60, 40))).all(axis=1).any()


def test_balanced_accuracy_is_pooled_and_has_an_interval():
    counts = np.array([[3, 4, 10, 10], [1, 4, 5, 10], [0, 0, 0, 0]])
    balanced, recall, specificity = balanced_scores(counts, "trees")
    assert (recall.value, specificity.value) == (0.5, 0.75) and balanced.value == 0.625
    assert balanced.samples == 2 and balanced.label == "trees"
    low, high = balanced.interval
    assert 0.375 <= low < 0.625 < high <= 0.875


def test_points_and_the_ring_around_them_are_scored(run, images, tmp_path):
    rows = [
        {"image": "a.png", "points": [[32, 36], [112, 92], [180, 20], [500, 20]]},  # the third is on the ground
        {"image": "b.png", "bright_xy": [[32.5, 36]]},
    ]
    labels = tmp_path / "l.jsonl"
    labels.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, err = run(
        "eval", "segment", labels, "--images", images, "--label", "bright", "--ring", "18,30", "--json"
    )
    scores = {s["metric"]: s for s in json.loads(out)["scores"]}
    assert (code, err) == (0, "") and scores["recall"]["value"] == 0.75 and scores["specificity"]["value"] == 1
    assert scores["balanced accuracy"]["value"] == 0.875 and scores["balanced accuracy"]["samples"] == 2
    code, out, _ = run("eval", "segment", labels, "--images", images, "--label", "bright", "--ring", "4,6")
    assert code == 0 and "balanced accuracy" in out and "bright" in out  # a ring within the square is no ground
    for wrong in ("8", "8,4", "a,b"):
        assert run("eval", "segment", labels, "--images", images, "--label", "bright", "--ring", wrong)[0] == 2
    labels.write_text('{"image": "a.png", "points": [[500, 500]]}')
    code, _, err = run("eval", "segment", labels, "--images", images, "--label", "bright")
    assert code == 2 and "no object 'bright'" in err
    labels.write_text('{"image": "a.png", "points": [[1, 2, 3]]}')
    assert "line 1" in run("eval", "segment", labels, "--images", images, "--label", "bright")[2]


def test_boxes_of_a_coco_file_are_scored(run, images, tmp_path):
    boxes = {"a.png": [("bright", (c, r, s, s)) for c, r, s in SQUARES], "b.png": [("dark", (20, 24, 24, 24))]}
    labels = coco(tmp_path / "l.json", boxes, ("bright", "dark"))
    ask = ("eval", "segment", labels, "--images", images, "--boxes", "--json", "--ring", "2,6", "--label")
    scores = {s["metric"]: s["value"] for s in json.loads(run(*ask, "bright")[1])["scores"]}
    assert scores == {"balanced accuracy": 1.0, "recall": 1.0, "specificity": 1.0}
    scores = {s["metric"]: s["value"] for s in json.loads(run(*ask, "dark")[1])["scores"]}
    assert scores["recall"] == 0 and scores["specificity"] == 0
    code, _, err = run(*ask, "trees")
    assert code == 2 and "bright, dark" in err


def test_points_of_trees_are_read_as_they_are_published(needs):
    points = read_points(needs("data", "naip_trees") / "train.jsonl", "trees")
    assert len(points) == 132 and points["claremont_2016_14.tif"][0] == (11.0, 70.0)
    with pytest.raises(UsageError, match="no list of points"):
        read_points(needs("data", "naip_trees") / "train.jsonl", "cars")
