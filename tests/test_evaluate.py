"""Scores through the real pipeline, with an engine that finds bright squares and knows where it errs."""

from __future__ import annotations

import json
import tarfile

import numpy as np
import pytest
import rasterio
from click.testing import CliRunner

from edge_rsvlm.bundle import load_bundle
from edge_rsvlm.cli import eval_verb
from edge_rsvlm.errors import InputError, UsageError
from edge_rsvlm.evaluate import LabelRules, evaluate_caption, evaluate_change, evaluate_detect
from edge_rsvlm.pipeline.session import Limits, Session
from tests.fakes import fake_engine, write_bundle

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")


@pytest.fixture(autouse=True)
def libraries(needs):
    needs("pycocotools")
    needs("pycocoevalcap")


@pytest.fixture
def session(tmp_path):
    bundle = load_bundle(write_bundle(tmp_path / "bundle"), allow_unsigned=True)
    return Session(bundle, Limits(memory_bytes=8 << 30), engine_factory=fake_engine)


def write_image(path, squares=(), size=(128, 128), value=255):
    """A black RGB image with bright squares (x, y, w, h)."""
    data = np.zeros((3, *size), np.uint8)
    for x, y, w, h in squares:
        data[:, y : y + h, x : x + w] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    with rasterio.open(path, "w", driver="PNG", width=size[1], height=size[0], count=3, dtype="uint8") as raster:
        raster.write(data)


def coco(path, images, categories=("square",)):
    """``images`` maps a name to [(category, box), ...]."""
    ids = {name: i for i, name in enumerate(categories, start=7)}
    boxes = [(n, c, b) for n, name in enumerate(images) for c, b in images[name]]
    data = {
        "images": [{"id": n, "file_name": name} for n, name in enumerate(images)],
        "categories": [{"id": i, "name": name} for name, i in ids.items()],
        "annotations": [
            {"id": k, "image_id": n, "category_id": ids[c], "bbox": b} for k, (n, c, b) in enumerate(boxes)
        ],
    }
    path.write_text(json.dumps(data))
    return path


SQUARES = {"a.png": [(16, 16, 20, 20), (80, 60, 24, 24)], "b.png": [(40, 40, 16, 16)], "c.png": []}


@pytest.fixture
def labelled(tmp_path):
    """Three images whose labels are their squares, but for one false label."""
    for name, squares in SQUARES.items():
        write_image(tmp_path / "images" / name, squares)
    images = {name: [("square", box) for box in squares] for name, squares in SQUARES.items()}
    images["c.png"] = [("square", (5, 5, 30, 30))]
    return coco(tmp_path / "labels.json", images)


def detect(session, labels, images, only=None, **rules):
    return evaluate_detect(session, labels, str(images), only, LabelRules(**rules), None)


def value(evaluation, metric, label=None):
    return next(s.value for s in evaluation.scores if (s.metric, s.label) == (metric, label))


def test_detect_scores_what_the_pipeline_finds(session, labelled, tmp_path):
    found = detect(session, labelled, tmp_path / "images")
    assert found.samples == 3
    assert value(found, "precision") == 1.0
    assert value(found, "recall", "square") == 0.75
    assert value(found, "AP50") == pytest.approx(76 / 101)  # of 101 recall points, 0 to 0.75 are reached
    assert all(s.interval[0] <= s.value <= s.interval[1] for s in found.scores)


def test_only_names_are_scored_from_a_tar_alike(session, labelled, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("# held out\nb.png\n\na.png  # both squares\n")
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        for name in SQUARES:
            tar.add(tmp_path / "images" / name, arcname=f"deep/{name}")
    from_tar, from_folder = (detect(session, labelled, tmp_path / p, names) for p in ("images.tar", "images"))
    assert from_tar == from_folder
    assert from_tar.samples == 2 and value(from_tar, "AP50") == 1.0


def test_a_name_that_is_not_there_is_an_error(session, labelled, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("a.pgn\n")
    with pytest.raises(UsageError, match=r"'a\.pgn' is not in .*labels\.json; did you mean 'a\.png'"):
        detect(session, labelled, tmp_path / "images", names)
    names.write_text("# nothing\n")
    with pytest.raises(UsageError, match="names nothing"):
        detect(session, labelled, tmp_path / "images", names)


def test_an_image_that_is_not_there_is_an_error(session, labelled, tmp_path):
    (tmp_path / "images" / "b.png").unlink()
    with pytest.raises(InputError, match=r"1 of 3 images are not in it, such as 'b\.png'"):
        detect(session, labelled, tmp_path / "images")


def test_labels_are_renamed_ignored_or_named_as_not_scored(session, tmp_path):
    boxes = [("kwadrat", SQUARES["a.png"][0]), ("blurred", SQUARES["a.png"][1]), ("tree", (0, 100, 9, 9))]
    labels = coco(tmp_path / "l.json", {"a.png": boxes}, ("kwadrat", "blurred", "tree"))
    write_image(tmp_path / "images" / "a.png", SQUARES["a.png"])
    with pytest.raises(UsageError, match="no box of a class that the bundle knows"):
        detect(session, labels, tmp_path / "images")
    found = detect(session, labels, tmp_path / "images", alias={"kwadrat": "square"}, ignore=("blurred",))
    assert value(found, "precision") == value(found, "recall") == 1.0
    assert found.not_scored == ("tree",)
    assert value(detect(session, labels, tmp_path / "images", alias={"kwadrat": "square"}), "precision") == 0.5


def test_classes_can_be_scored_as_one(session, tmp_path):
    labels = coco(tmp_path / "l.json", {"a.png": [("car", b) for b in SQUARES["a.png"]]}, ("car",))
    write_image(tmp_path / "images" / "a.png", SQUARES["a.png"])
    assert value(detect(session, labels, tmp_path / "images"), "AP50") == 0.0  # the engine calls them squares
    merged = detect(session, labels, tmp_path / "images", alias={"square": "thing", "car": "thing"})
    assert value(merged, "AP50", "thing") == 1.0


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"ignore": ("sqare",)}, "no category 'sqare'"),
        ({"alias": {"plane": "square"}}, "no label 'plane'"),
        ({"alias": {"square": "sqare", "car": "car"}}, None),
        ({"alias": {"blob": "squares"}}, "'squares' is no class"),
    ],
)
def test_rules_name_labels_that_exist(session, tmp_path, rules, message):
    labels = coco(tmp_path / "l.json", {"a.png": [("square", (0, 0, 9, 9))]}, ("square", "blob"))
    write_image(tmp_path / "images" / "a.png")
    if message is None:
        detect(session, labels, tmp_path / "images", **rules)
        return
    with pytest.raises(UsageError, match=message):
        detect(session, labels, tmp_path / "images", **rules)


@pytest.mark.parametrize("text", ["{", "[]", '{"images": []}', '{"images": [], "annotations": [], "categories": []}'])
def test_a_file_that_is_not_coco_is_named(session, tmp_path, text):
    (tmp_path / "l.json").write_text(text)
    with pytest.raises(UsageError, match=r"l\.json"):
        detect(session, tmp_path / "l.json", tmp_path)


def write_pair(folder, before, after, changed, label_value=255):
    write_image(folder / "t1.png", before, (128, 200))
    write_image(folder / "t2.png", after, (128, 200))
    write_image(folder / "change.png", changed, (128, 200), label_value)


def test_change_counts_pixels_per_pair_and_pooled(session, tmp_path):
    pairs = tmp_path / "pairs"
    write_pair(pairs / "right", [], [(40, 40, 32, 32)], [(40, 40, 32, 32)], label_value=1)
    write_pair(pairs / "half", [], [(40, 40, 32, 32)], [(40, 40, 32, 64)])
    write_pair(pairs / "still", [(9, 9, 32, 32)], [(9, 9, 32, 32)], [])
    found = evaluate_change(session, pairs, None, None)
    assert found.samples == 3
    assert value(found, "F1", "right") == pytest.approx(1.0, abs=0.1)
    assert value(found, "recall", "half") == pytest.approx(0.5, abs=0.04)
    assert value(found, "F1", "still") == 0.0
    assert value(found, "recall") == pytest.approx(2 / 3, abs=0.04)  # 2048 of 3072 labelled pixels
    assert [s.interval is None for s in found.scores] == [s.label is not None for s in found.scores]
    only = tmp_path / "only.txt"
    only.write_text("right")
    assert evaluate_change(session, pairs, only, None).samples == 1


def test_change_refuses_what_is_no_pair(session, tmp_path):
    pairs = tmp_path / "pairs"
    with pytest.raises(UsageError, match="not a folder"):
        evaluate_change(session, pairs, None, None)
    pairs.mkdir()
    with pytest.raises(UsageError, match="holds no pair"):
        evaluate_change(session, pairs, None, None)
    write_pair(pairs / "x", [], [], [])
    write_image(pairs / "x" / "change.png", [], (128, 128))
    with pytest.raises(InputError, match="differ in size"):
        evaluate_change(session, pairs, None, None)
    (pairs / "x" / "change.png").unlink()
    with pytest.raises(InputError, match="has no image 'change'"):
        evaluate_change(session, pairs, None, None)


def test_captions_are_scored_against_their_own_image(tmp_path):
    from tests.test_demo import caption_session

    write_image(tmp_path / "dark.png")
    write_image(tmp_path / "bright.png", [(0, 0, 128, 128)])
    records = [("dark.png", ["A dark b place .", "no light"]), ("bright.png", ["a bright b place with sun"])]
    lines = tmp_path / "c.jsonl"
    lines.write_text("\n".join(json.dumps({"image": n, "captions": c}) for n, c in records) + "\n\n")
    found = evaluate_caption(caption_session(tmp_path), lines, str(tmp_path), None, None)
    assert value(found, "BLEU-4") > 0.6
    swapped = [(n, c) for (n, _), (_, c) in zip(records, reversed(records), strict=True)]
    lines.write_text("\n".join(json.dumps({"image": n, "captions": c}) for n, c in swapped))
    wrong = evaluate_caption(caption_session(tmp_path), lines, str(tmp_path), None, None)
    assert value(wrong, "CIDEr") < value(found, "CIDEr") and value(wrong, "BLEU-4") < 0.01


@pytest.mark.parametrize(
    "line", ["{", '{"image": "a"}', '{"image": "a", "captions": "x"}', '{"image": "a", "captions": []}']
)
def test_a_line_that_is_no_captioned_image_is_named(tmp_path, line):
    from tests.test_demo import caption_session

    (tmp_path / "c.jsonl").write_text('{"image": "b", "captions": ["x"]}\n' + line)
    with pytest.raises(UsageError, match="line 2"):
        evaluate_caption(caption_session(tmp_path), tmp_path / "c.jsonl", str(tmp_path), None, None)


def test_command_prints_a_table_or_one_document(session, labelled, tmp_path, monkeypatch):
    monkeypatch.setattr(eval_verb, "open_session", lambda *_: session)
    arguments = ["detect", str(labelled), "--images", str(tmp_path / "images")]
    text = CliRunner().invoke(eval_verb.command, arguments).stdout
    assert "3 images, fake version 1" in text and "AP50:95" in text and "\nall " in text
    document = json.loads(CliRunner().invoke(eval_verb.command, [*arguments, "--json"]).stdout)
    assert document["samples"] == 3 and document["task"] == "detect"
    assert {(s["metric"], s["label"]) for s in document["scores"]} >= {("AP50", None), ("F1", "square")}
    wrong = CliRunner().invoke(eval_verb.command, [*arguments, "--alias", "square"])
    assert isinstance(wrong.exception, UsageError)


def test_labelled_grids_of_real_pairs_are_read(session, needs):
    found = evaluate_change(session, needs("data", "oscd/train"), None, None)
    assert found.samples == 8 and all(0 <= s.value <= 1 for s in found.scores)
