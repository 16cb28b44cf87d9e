"""Scores by examples, and of words that a bundle learnt, through the real pipeline."""

from __future__ import annotations

import json

import numpy as np
import pytest

from edge_rsvlm.bundle import load_bundle
from edge_rsvlm.errors import UsageError
from edge_rsvlm.evaluate import LabelRules, evaluate_detect
from edge_rsvlm.evaluate.few_shot import FewShot, evaluate_few_shot
from edge_rsvlm.pipeline.session import Limits, Session
from tests.coloured import DETECT, Engine, things, use_engine, write_bundle
from tests.fakes import fake_engine
from tests.fakes import write_bundle as write_fixed
from tests.scenes import write
from tests.test_evaluate import coco
from tests.wide import runner

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")

IMAGES = {
    "a.png": [("red", 20, 20, 8), ("red", 100, 60, 12), ("green", 60, 20, 8)],
    "b.png": [("red", 40, 90, 16), ("blue", 4, 4, 8)],
    "c.png": [("red", 8, 8, 8), ("red", 80, 80, 8), ("red", 40, 40, 8)],
    "d.png": [("green", 80, 80, 8)],
}


@pytest.fixture(autouse=True)
def libraries(needs):
    needs("pycocotools")


@pytest.fixture
def session(tmp_path):
    bundle = load_bundle(write_bundle(tmp_path / "bundle"), allow_unsigned=True)
    return Session(bundle, Limits(memory_bytes=8 << 30), engine_factory=lambda *_: Engine())


def labelled(folder, names=None, wrong=()):
    """Images of 128 x 128 and their labels, where red things are buses; ``wrong`` images show green ones instead."""
    images = {}
    for image, squares in IMAGES.items():
        shown = [("green" if image in wrong and c == "red" else c, *rest) for c, *rest in squares]
        write(folder / image, things(shown, (128, 128)), "PNG")
        images[image] = [({"red": "bus"}.get(c, c), (x, y, s, s)) for c, x, y, s in squares]
    return coco(folder / "labels.json", images, names or ("bus", "green", "blue"))


def few_shot(session, labels, wanted, **rules):
    return evaluate_few_shot(session, labels, str(labels.parent), None, LabelRules(**rules), wanted, None)


def test_a_kind_without_a_word_is_found_by_its_examples(session, tmp_path):
    found = few_shot(session, labelled(tmp_path), FewShot("bus", 1, 6))
    (score,) = found.scores
    assert (score.metric, score.label, score.samples) == ("AP50 by 1 example", "bus", 6)
    assert score.value == 1.0 and score.interval == (1.0, 1.0) and found.samples == 4


def test_images_that_gave_an_example_do_not_count(session, tmp_path, monkeypatch):
    gave, seen = [], []
    examples, detect = session.examples, session.detect
    monkeypatch.setattr(session, "examples", lambda path, boxes: gave.append((path, boxes)) or examples(path, boxes))
    monkeypatch.setattr(session, "detect", lambda path, *rest: seen.append(path) or detect(path, *rest))
    few_shot(session, labelled(tmp_path), FewShot("bus", 2, 1))
    assert sum(len(boxes) for _, boxes in gave) == 2
    assert not {path for path, _ in gave} & set(seen) and len(seen) + len(gave) == 4


def test_draws_are_the_same_each_time_and_differ_among_each_other(session, tmp_path):
    labels = labelled(tmp_path, wrong=("c.png",))
    first, again = (few_shot(session, labels, FewShot("bus", 1, 8)).scores[0] for _ in range(2))
    np.testing.assert_array_equal(first.draws_R, again.draws_R)
    assert len(set(first.draws_R)) > 1 and first.value == pytest.approx(first.draws_R.mean())
    low, high = first.interval
    assert first.draws_R.min() <= low < first.value < high <= first.draws_R.max()
    assert few_shot(session, labels, FewShot("bus", 1, 1)).scores[0].interval is None


def test_boxes_beyond_the_image_are_clipped_and_rules_hold(session, tmp_path):
    write(tmp_path / "a.png", things([("red", 120, 120, 8), ("red", 60, 60, 8)], (128, 128)), "PNG")
    write(tmp_path / "b.png", things([("red", 60, 60, 8), ("red", 8, 8, 8)], (128, 128)), "PNG")
    boxes = {"a.png": [("bus", (120, 120, 9, 10)), ("bus", (60, 60, 8, 8)), ("bus", (130, 0, 5, 5))],
             "b.png": [("coach", (60, 60, 8, 8)), ("blurred", (8, 8, 8, 8))]}  # fmt: skip
    labels = coco(tmp_path / "l.json", boxes, ("bus", "coach", "blurred"))
    merged = few_shot(session, labels, FewShot("bus", 1, 4), alias={"coach": "bus"}, ignore=("blurred",))
    assert merged.scores[0].value > 0.6
    with pytest.raises(UsageError, match="no category 'coach'"):
        few_shot(session, labels, FewShot("coach", 1, 1), alias={"coach": "bus"})


def test_what_cannot_be_drawn_is_refused(session, tmp_path):
    labels = labelled(tmp_path)
    with pytest.raises(UsageError, match=r"no category 'bust'.*did you mean 'bus'"):
        few_shot(session, labels, FewShot("bust", 1, 1))
    for label, examples in (("blue", 1), ("bus", 6), ("green", 2), ("bus", 7)):
        with pytest.raises(UsageError, match=rf"{examples} examples of .* '{label}' in .* leave nothing to find"):
            few_shot(session, labels, FewShot(label, examples, 1))
    fixed = load_bundle(write_fixed(tmp_path / "fixed"), allow_unsigned=True)
    with pytest.raises(UsageError, match="does not find by examples"):
        few_shot(Session(fixed, Limits(8 << 30), engine_factory=fake_engine), labels, FewShot("bus", 1, 1))


def test_words_that_were_not_learnt_are_not_scored_unless_renamed(session, tmp_path):
    labels = labelled(tmp_path)
    found = evaluate_detect(session, labels, str(tmp_path), None, LabelRules(), None)
    values = {(s.metric, s.label): s.value for s in found.scores}
    assert values["AP50", "green"] == values["AP50", "blue"] == 1 and found.not_scored == ("bus",)
    found = evaluate_detect(session, labels, str(tmp_path), None, LabelRules(alias={"bus": "red"}), None)
    values = {(s.metric, s.label): s.value for s in found.scores}
    assert values["AP50", "red"] == 1 and found.not_scored == ()
    found = evaluate_detect(session, labels, str(tmp_path), None, LabelRules(alias={"green": "blue"}), None)
    values = {(s.metric, s.label): s.value for s in found.scores}
    assert values["AP50", "blue"] < 1, "what is scored is asked for: the alias"


def test_the_verb_reports_draws(tmp_path, monkeypatch):
    use_engine(monkeypatch)
    run = runner(write_bundle(tmp_path / "b", detect=DETECT))
    labels = labelled(tmp_path)
    arguments = ("eval", "detect", labels, "--images", tmp_path)
    code, out, err = run(*arguments, "--like", "bus", "--examples", "2", "--draws", "3")
    assert (code, err) == (0, "") and "AP50 by 2 examples" in out and "bus  1.000 [1.000, 1.000]" in out
    code, out, _ = run(*arguments, "--like", "bus", "--examples", "1", "--json")
    (score,) = json.loads(out)["scores"]
    assert score == {
        "metric": "AP50 by 1 example", "value": 1.0, "interval": [1.0, 1.0], "samples": 10, "label": "bus",
    }  # fmt: skip
    code, _, err = run(*arguments, "--draws", "3")
    assert code == 2 and "--like" in err
