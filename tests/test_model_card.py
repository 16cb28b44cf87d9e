"""What is said of the default model: its scores by commands that exist, its baselines, its card."""

from __future__ import annotations

import dataclasses
import io
import json
import shlex
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch", reason="needs torch: not installed")
pytest.importorskip("transformers", reason="needs transformers: not installed")

from edge_rsvlm.cli import eval_verb
from edge_rsvlm.export.default import robustness
from edge_rsvlm.export.default.baselines import Baselines, Captions, usual_answers
from edge_rsvlm.export.default.data.scenes import Scene
from edge_rsvlm.export.default.describe import Thresholds
from edge_rsvlm.export.default.model_card import CardFacts, write_card
from edge_rsvlm.export.default.robustness import Loss
from edge_rsvlm.export.default.score import BY_EXAMPLES, DATA, EVALUATIONS, LABELS, REPORTED, reported
from edge_rsvlm.export.default.truth import Truth, named, truth

ROOT = Path(__file__).parents[1]
ROW = {
    "task": "detect", "metric": "AP50", "value": 0.5, "interval": (0.25, 0.75), "samples": 4, "data": "toy",
    "command": "edge-rsvlm eval detect toy.json",
}  # fmt: skip


@pytest.mark.parametrize(("title", "pattern"), [*EVALUATIONS, *BY_EXAMPLES])
def test_commands_of_the_card_are_those_of_the_program(title, pattern):
    program, group, verb, *arguments = shlex.split(pattern.format(data=DATA, labels=LABELS))
    assert (program, group) == ("edge-rsvlm", "eval") and verb in REPORTED
    given = eval_verb.command.commands[verb].make_context(verb, arguments).params
    assert given["only"] is None or (ROOT / given["only"]).is_file(), title


def score(metric, label=None):
    return {"metric": metric, "label": label}


def test_what_is_told_of_scores():
    detect = [score("AP50", "car"), score("AP50"), score("precision")]
    assert reported("detect", detect) == [score("AP50")]
    assert reported("detect", [score("AP50 by 5 examples", "bus")]) == [score("AP50 by 5 examples", "bus")]
    asked = [score("accuracy", "count"), score("accuracy")]
    assert reported("ask", asked) == [score("accuracy"), score("accuracy, count", "count")]
    assert reported("segment", [score("AP50", "trees")]) == []


def scene(*asked):
    return Scene("toy", "0.png", "airport", (), (), asked)


def test_usual_answers_are_those_of_the_same_question_or_of_all():
    known = [
        scene(("Is it red?", "No"), ("Is it blue?", "yes"), ("Is it wide?", "no")),
        scene(("is it red", "yes"), ("is it wide", "no")),
        scene(("Is it red?", "yes")),
    ]
    assert usual_answers(known, [scene(("Is it red?", "Yes."), ("Is it wide?", "no"))]) == 1
    assert usual_answers(known, [scene(("Is it old?", "yes"), ("Is it new?", "no"))]) == 0.5
    known.append(scene(("How many  in it?", "zero")))
    assert usual_answers(known, [scene(("How many  in it?", "zero"))]) == 1, "a word is missing, which is usual"


def test_the_card(tmp_path):
    graphs = {
        "encoder": {"precision": "int8", "tensorrt": {"file": "e"}},
        "text": {"precision": "f16", "tensorrt": None},
    }
    cost = {"task": "detect", "data": "toy", "metric": "AP50", "before": 0.6, "after": 0.5, "loss": 0.1, "bound": 0.2}
    fields = {
        "name": "toy-model", "graphs": graphs, "licence": "research only", "training_data": ("toys (CC0)",),
        "accuracy": [ROW, ROW | {"metric": "F1"}], "comparisons": [cost],
    }  # fmt: skip
    stage = {"stage": "vision", "config": {"minutes": 60.0}, "metrics": {"steps": 10}}
    cuts = Thresholds(0.35, 0.4, 0.2, {"pisa": 0.3})
    counted = {"stage": "appearance", "config": {"crops": 3}, "metrics": {}}
    told = {"this model": Truth(0.9, 0.4)}
    worse = [Loss("caption", "CIDEr", "haze", 2.0, 1.5), Loss("detect", "AP50", "haze", 0.8, 0.84)]
    beaten = Baselines(Captions(1, 0.5), Captions(0.7, 0.2), 0.25, 0.75, 0.1, Truth(1, 1))
    facts = CardFacts(
        fields, [stage, counted], cuts, beaten, told, worse, 61,
        {"car": 1237}, {"for objects": 42},
    )  # fmt: skip
    write_card(tmp_path / "card.md", facts)
    card = (tmp_path / "card.md").read_text()
    for said in (
        "# toy-model\n", "`encoder` int8, `text` f16", "TensorRT (encoder)",
        "Research only. Trained on:\n\n- toys (CC0)\n",
        "| toy | F1 | 0.500 | 0.250 - 0.750 | 4 |", "words (0.35) and examples", "0.30 for pisa",
        "| accuracy | 0.750 |", "RSICD: the same | CIDEr | 0.700 |",
        "| this model | 0.900 | 0.400 |", "| haze | 25.0% | -5.0% |",
        "## What fewer bits cost", "car 1,237", "42 words for objects", "- `vision`: 10 steps (minutes 60.0)",
        "- `appearance`: nothing is trained (crops 3)",
    ):  # fmt: skip
        assert said in card, said
    assert card.count(ROW["command"]) == 1 and "eval_sets" in card
    write_card(tmp_path / "wide.md", dataclasses.replace(facts, fields={**fields, "comparisons": ()}))
    assert "fewer bits" not in (tmp_path / "wide.md").read_text()


@pytest.mark.parametrize(
    ("caption", "labels"),
    [
        ("Two airplanes at the airport beside a road .", {"airplane", "pavement"}),
        ("It is a baseball field with lawn .", {"grass"}),
        ("a piece of farmland and a football field", {"field"}),
        ("A dense residential area .", set()),
    ],
)
def test_labels_that_a_caption_names(caption, labels):
    assert named(caption) == labels


def test_truth_counts_over_all_images():
    found = truth(["a plane and a car", "the sea"], [["airplane", "grass"], ["sea"]])
    assert (found.precision, found.recall) == (pytest.approx(2 / 3), pytest.approx(2 / 3))


def test_worse_images_keep_their_names_and_boxes_follow_their_size(tmp_path, monkeypatch):
    data = tmp_path / "data" / "hrplanes"
    data.mkdir(parents=True)
    with tarfile.open(data / "train.tar", "w") as tar:
        for name in ("kept.webp", "other.webp"):
            file = io.BytesIO()
            Image.new("RGB", (40, 20), "red").save(file, "WEBP", lossless=True)
            info = tarfile.TarInfo(name)
            info.size = file.tell()
            tar.addfile(info, io.BytesIO(file.getvalue()))
    coco = {
        "images": [{"id": 0, "file_name": "kept.webp"}, {"id": 1, "file_name": "other.webp"}],
        "annotations": [{"image_id": n, "bbox": [4, 2, 8, 6]} for n in (0, 1)],
    }
    (data / "train.json").write_text(json.dumps(coco))
    monkeypatch.setattr(robustness, "held_out", lambda _: frozenset({"kept.webp"}))
    half = next(how for how in robustness.DEGRADATIONS if how.scale == 0.5)
    command = robustness._boxed(tmp_path / "data", tmp_path / "worse", half)
    labels = json.loads((tmp_path / "worse.json").read_text())
    assert [a["bbox"] for a in labels["annotations"]] == [[2, 1, 4, 3]] and str(tmp_path / "worse.json") in command
    assert [path.name for path in (tmp_path / "worse").iterdir()] == ["kept.webp"]
    assert Image.open(tmp_path / "worse" / "kept.webp").size == (20, 10)


@pytest.mark.parametrize("how", robustness.DEGRADATIONS, ids=lambda how: how.name)
def test_every_degradation_changes_the_image(how):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    made = how.apply(Image.fromarray(pixels))
    assert made.size == (16 * how.scale, 16 * how.scale)
    assert how.scale != 1 or np.abs(np.asarray(made, int) - pixels).mean() > 5
