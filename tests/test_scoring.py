"""Scores against the libraries that define them, and intervals against plain repetition of images."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from edge_rsvlm import scoring
from edge_rsvlm.errors import UsageError
from edge_rsvlm.scoring import Found, Truth, captions, detection


@pytest.fixture(autouse=True)
def libraries(needs):
    needs("pycocotools")
    needs("pycocoevalcap")


def random_scene(rng, images=12, classes=("car", "boat")):
    """Boxes, and detections that are shaken copies of most of them among false ones; many scores are tied."""
    truth, found = [], []
    for _ in range(images):
        boxes = [(*rng.uniform(0, 300, 2), *rng.uniform(8, 60, 2)) for _ in range(rng.integers(0, 9))]
        labels = rng.choice(classes, len(boxes))
        truth.append(
            [Truth(str(k), tuple(map(float, b)), bool(rng.random() < 0.15)) for k, b in zip(labels, boxes, strict=True)]
        )
        seen = [
            (k, np.array(b) + rng.normal(0, 3, 4)) for k, b in zip(labels, boxes, strict=True) if rng.random() < 0.8
        ]
        seen += [(rng.choice(classes), (*rng.uniform(0, 300, 2), *rng.uniform(8, 60, 2))) for _ in range(4)]
        found.append([Found(str(k), float(np.round(rng.random(), 1)), tuple(map(float, b))) for k, b in seen])
    return truth, found


def coco_ap(truth, found, name):
    """AP50 and AP50:95 of pycocotools' own accumulate()."""
    coco, cocoeval = scoring.detection_libraries()
    labelled = detection._dataset(coco, truth, [name])
    evaluation = cocoeval.COCOeval(labelled, detection._results(labelled, found, [name]), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    precision_TR = evaluation.eval["precision"][:, :, 0, 0, -1]
    return float(precision_TR[0].mean()), float(precision_TR.mean())


@pytest.mark.parametrize("seed", range(4))
def test_average_precision_is_that_of_pycocotools(seed):
    truth, found = random_scene(np.random.default_rng(seed))
    matches = scoring.match_detections(truth, found, ["car", "boat"])
    for name in ("car", "boat"):
        ap_T = matches[name].average_precision(np.ones(len(truth), np.int64))
        assert (ap_T[0], ap_T.mean()) == pytest.approx(coco_ap(truth, found, name), abs=1e-12)


def test_weights_equal_repeating_images():
    rng = np.random.default_rng(9)
    truth, found = random_scene(rng, images=6)
    # Equal scores across images have no order of their own: make them differ.
    found = [[f._replace(score=float(rng.random())) for f in boxes] for boxes in found]
    matches = scoring.match_detections(truth, found, ["car"])["car"]
    for weights in ([0, 3, 1, 0, 2, 0], [1, 0, 0, 0, 0, 5]):
        index = np.repeat(np.arange(6), weights)
        expected = coco_ap([truth[i] for i in index], [found[i] for i in index], "car")
        ap_T = matches.average_precision(np.array(weights))
        assert (ap_T[0], ap_T.mean()) == pytest.approx(expected, abs=1e-12)


def test_more_than_100_detections_per_image_count():
    boxes = [(float(x), float(y), 4.0, 4.0) for x in range(0, 200, 10) for y in range(0, 100, 10)]
    truth, found = [[Truth("car", b) for b in boxes]], [[Found("car", 0.9, b) for b in boxes]]
    scores = {s.metric: s for s in scoring.detection_scores(scoring.match_detections(truth, found, ["car"]), 0.5)}
    assert scores["AP50:95"].value == scores["recall"].value == 1.0
    assert scores["AP50"].interval is None  # one image says nothing about others


def test_rates_are_those_at_the_threshold():
    truth = [[Truth("car", (0, 0, 10, 10)), Truth("car", (50, 0, 10, 10))], [Truth("car", (0, 0, 10, 10))]]
    found = [
        [Found("car", 0.9, (0, 0, 10, 10)), Found("car", 0.8, (100, 0, 10, 10)), Found("car", 0.1, (50, 0, 10, 10))],
        [],
    ]
    scores = scoring.detection_scores(scoring.match_detections(truth, found, ["car"]), 0.5)
    values = {s.metric: s.value for s in scores if s.label == "car"}
    assert (values["precision"], values["recall"], values["F1"]) == pytest.approx((1 / 2, 1 / 3, 2 / 5))


def test_what_lies_on_an_ignored_region_counts_neither_way():
    truth = [[Truth("car", (0, 0, 10, 10)), Truth(None, (40, 0, 60, 60), ignore=True)]] * 2
    found = [[Found("car", 0.9, (0, 0, 10, 10)), Found("car", 0.95, (50, 20, 10, 10))]] * 2
    scores = scoring.detection_scores(scoring.match_detections(truth, found, ["car", "boat"]), 0.5)
    assert {s.label for s in scores} == {"car", None}  # no boat to find
    assert {s.value for s in scores} == {1.0}
    strict = [[box for box in boxes if not box.ignore] for boxes in truth]
    scores = scoring.detection_scores(scoring.match_detections(strict, found, ["car"]), 0.5)
    assert next(s.value for s in scores if s.metric == "precision") == 0.5


def test_nothing_detected_is_zero_and_not_an_error():
    truth = [[Truth("car", (0, 0, 10, 10))], []]
    scores = scoring.detection_scores(scoring.match_detections(truth, [[], []], ["car"]), 0.5)
    assert {s.value for s in scores} == {0.0}


def test_intervals_are_reproducible_and_hold_the_score():
    truth, found = random_scene(np.random.default_rng(3), images=30)
    matches = scoring.match_detections(truth, found, ["car", "boat"])
    first, again = (scoring.detection_scores(matches, 0.5) for _ in range(2))
    assert first == again
    assert all(s.interval[0] <= s.value <= s.interval[1] and s.interval[0] < s.interval[1] for s in first)


def test_interval_width_is_that_of_a_proportion():
    hits_I3 = np.array([[1, 0, 0]] * 300 + [[0, 0, 1]] * 100)
    recall = next(s for s in scoring.rate_scores(hits_I3) if s.metric == "recall")
    half_width = 1.96 * np.sqrt(0.75 * 0.25 / 400)
    assert recall.interval == pytest.approx((0.75 - half_width, 0.75 + half_width), abs=0.006)


def test_unknown_pixels_are_left_out():
    mask = np.array([[1, 1, 0, 0, 255, 255]], np.uint8)
    changed = np.array([[1, 0, 1, 0, 1, 0]], bool)
    assert scoring.change_counts(mask, changed).tolist() == [1, 1, 1]
    assert scoring.rates(np.zeros(3)).tolist() == [0, 0, 0]


CAPTIONS = [
    ("Two planes are parked at the airport.", ["two planes parked", "Some planes are at an airport ."]),
    ("a river", ["A river runs through the forest.", "there is a winding river"]),
    ("many cars in a parking lot", ["Many cars are parked in the parking lot", "lots of cars, in a parking lot!"]),
    ("", ["a baseball diamond"]),
]


def test_captions_score_as_pycocoevalcap_does():
    said, references = [c for c, _ in CAPTIONS], [r for _, r in CAPTIONS]
    cider, bleu, scorer = scoring.caption_libraries()
    scores = {s.metric: s for s in scoring.caption_scores(said, references)}
    clean = {i: [scoring.words(t) for t in r] for i, r in enumerate(references)}
    hypotheses = {i: [scoring.words(c)] for i, c in enumerate(said)}
    assert scores["CIDEr"].value == pytest.approx(cider.Cider().compute_score(clean, hypotheses)[0])
    assert scores["BLEU-4"].value == pytest.approx(bleu.Bleu(4).compute_score(clean, hypotheses, verbose=0)[0][3])
    counts = np.array([captions._bleu_counts(scorer, hypotheses[i][0], clean[i]) for i in clean], float)
    assert scoring.bleu4(counts.sum(axis=0)) == pytest.approx(scores["BLEU-4"].value)
    perfect = scoring.caption_scores([r[0] for r in references[1:3]], [[r[0]] for r in references[1:3]])
    assert [s.value for s in perfect] == pytest.approx([10.0, 1.0], abs=1e-6)


def test_tokens_have_no_case_and_no_punctuation():
    assert scoring.words("  There's a WELL-kept lawn , and 2 trees. ") == "there s a well kept lawn and 2 trees"


def test_a_missing_library_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
    with pytest.raises(UsageError, match=r"pip install 'edge-rsvlm\[eval\]'"):
        scoring.detection_libraries()


def test_recall_counts_images_that_find_their_texts_and_texts_that_find_their_image():
    owner = np.array([0, 0, 1, 1, 2, 2])
    cosine = np.array([[0.9, 0.1, 0.8, 0.2, 0.0, 0.0], [0.0, 0.3, 0.7, 0.9, 0.1, 0.2], [0.5, 0.6, 0.4, 0.1, 0.3, 0.2]])
    values = {score.metric: score.value for score in scoring.recall_scores(cosine, owner)}
    assert values["image to text R@1"] == pytest.approx(100 * 2 / 3)
    assert values["image to text R@5"] == 100
    # Texts 0 and 3 rank their image first, 4 and 5 as well as their rivals allow, 1 is third and 2 second.
    assert values["text to image R@1"] == pytest.approx(100 * np.mean([1, 0, 0, 1, 1, 0.5]), abs=9)
    assert values["text to image R@5"] == values["text to image R@10"] == 100
    assert values["mean recall"] == pytest.approx(np.mean([v for name, v in values.items() if name != "mean recall"]))


def test_a_caption_of_two_images_counts_for_its_own_only():
    cosine = np.tile([[1.0, 1.0]], (2, 1))
    values = {score.metric: score.value for score in scoring.recall_scores(cosine, np.array([0, 1]))}
    assert values["image to text R@1"] == 50 and values["text to image R@1"] == 50
