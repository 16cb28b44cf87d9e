"""Verbs of bundles of other families: any words, questions, classes, and images prepared by steps."""

from __future__ import annotations

import json

import numpy as np
import pytest

from edge_rsvlm.bundle import load_bundle
from edge_rsvlm.config.inputs import InputSpec
from edge_rsvlm.errors import UsageError
from edge_rsvlm.evaluate import evaluate_ask, evaluate_classify, evaluate_detect
from edge_rsvlm.evaluate.ground import all_found, evaluate_ground
from edge_rsvlm.evaluate.search import evaluate_search
from edge_rsvlm.pipeline.ask import Votes
from edge_rsvlm.pipeline.session import Limits, Session
from edge_rsvlm.pipeline.shapes import prepared_shape
from edge_rsvlm.planning import plan_image
from edge_rsvlm.tiles.prepare import prepare
from tests.scenes import UTM, pixels, write
from tests.wide import (
    ANSWER,
    DECODER,
    EVERYTHING,
    GENERATE,
    INPUT,
    LARGE,
    MATCH,
    MEMORY,
    OPEN,
    SMALL,
    half_bright,
    runner,
    use_engine,
    write_bundle,
    write_images,
)

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")


@pytest.fixture(autouse=True)
def engine(monkeypatch):
    use_engine(monkeypatch)


@pytest.fixture
def bundle(tmp_path):
    return write_bundle(tmp_path / "bundle", **EVERYTHING)


@pytest.fixture
def run(bundle):
    return runner(bundle)


@pytest.fixture
def images(tmp_path):
    return write_images(tmp_path / "images")


def session(bundle):
    return Session(load_bundle(bundle, allow_unsigned=True), Limits(memory_bytes=8 << 30))


def near(boxes, expected, within):
    assert len(boxes) == len(expected)
    for got, wanted in zip(sorted(boxes), sorted(expected), strict=True):
        np.testing.assert_allclose(got, wanted, atol=within)


# --- any words ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [SMALL, LARGE])
@pytest.mark.parametrize("driver, suffix", [("PNG", "png"), ("GTiff", "tif")])
def test_boxes_of_any_words_lie_where_the_objects_are(run, tmp_path, size, driver, suffix):
    """Steps change the aspect; the boxes come back in pixels of the input, whole or in tiles."""
    squares = [(30, 20, 40), (150, 70, 50)]
    path = write(tmp_path / f"a.{suffix}", pixels(squares, size), driver)
    code, out, err = run("detect", path, "--query", "square", "--query", "dark", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)["detections"]
    assert {d["label"] for d in found} == {"square"}
    near([d["box"] for d in found], [(c, r, s, s) for c, r, s in squares], 3)


def test_a_bundle_of_any_words_needs_some(run, tmp_path):
    path = write(tmp_path / "a.png", pixels((), SMALL), "PNG")
    code, _, err = run("detect", path)
    assert code == 2 and "--query" in err
    assert run("detect", path, "--query", " ")[0] == 2


@pytest.mark.parametrize("task", [OPEN, GENERATE], ids=["found", "written"])
@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_ground_gives_boxes_in_pixels_and_places(tmp_path, task, size):
    run = runner(write_bundle(tmp_path / "b", ground=task))
    path = write(tmp_path / "a.tif", pixels([(40, 30, 60)], size), **UTM)
    code, out, err = run("ground", path, "square", "--json", "--output", tmp_path / "o.geojson")
    assert (code, err) == (0, "")
    (found,) = json.loads(out)["detections"]
    near([found["box"]], [(40, 30, 60, 60)], 4)
    assert found["label"] == "square" and (found["score"] is None) == (task is GENERATE)
    (feature,) = json.loads((tmp_path / "o.geojson").read_text())["features"]
    assert all(14.9 < lon < 15.1 and 47 < lat < 48 for lon, lat in feature["geometry"]["coordinates"][0])
    empty = write(tmp_path / "empty.tif", pixels((), size), **UTM)
    assert json.loads(run("ground", empty, "square", "--json")[1])["detections"] == []


# --- questions and classes ------------------------------------------------------------------------------------------


def test_ask_answers_per_tile_and_by_the_vote_of_the_area(run, tmp_path):
    path = write(tmp_path / "a.png", half_bright(LARGE, 0.7), "PNG")
    code, out, err = run("ask", path, "is it bright", "--json", "--output", tmp_path / "o.geojson")
    record = json.loads(out)
    assert (code, err, record["answer"]) == (0, "", "yes")
    assert {t["answer"] for t in record["tiles"]} == {"yes", "no"}
    assert set(record) == {"image", "tiles", "answer", "coverage", "timing_ms"}
    features = json.loads((tmp_path / "o.geojson").read_text())["features"]
    assert [f["properties"]["answer"] for f in features] == [t["answer"] for t in record["tiles"]]
    assert run("ask", path, "is it dark")[1] == f"{path}: no\n"
    whole = write(tmp_path / "whole.png", half_bright(SMALL, 0.2), "PNG")
    record = json.loads(run("ask", whole, path, "is it bright", "--json")[1].splitlines()[0])
    assert record["answer"] == "no" and [t["box"] for t in record["tiles"]] == [[0, 0, *SMALL]]


def test_ask_of_a_model_that_writes_takes_generation_options(tmp_path):
    run = runner(write_bundle(tmp_path / "b", ask=GENERATE, caption=GENERATE))
    path = write(tmp_path / "a.png", pixels([(40, 30, 60)], SMALL), "PNG")
    assert run("ask", path, "bright")[1] == f"{path}: yes\n"
    assert run("ask", path, "bright", "--temperature", "0.5", "--top-p", "0.9", "--seed", "7")[1] == f"{path}: yes\n"
    assert run("ask", path, "square", "--max-tokens", "1")[1] == f"{path}: [\n"
    code, _, err = run("ask", path, "bright", "--seed", "7")
    assert code == 2 and "--temperature" in err
    assert run("ask", path, "bright", "--max-tokens", "1000")[0] == 2


def test_votes_count_area_not_spelling():
    votes = Votes()
    for text, weight in (("Yes.", 2.0), ("no", 3.0), ("yes", 2.5)):
        votes.add([(text, 1.0)], weight)
    assert votes.winner() == "yes"
    assert Votes().winner() is None
    signs = Votes()
    signs.add([("?", 1.0)], 1.0)
    signs.add([("!", 1.0)], 2.0)
    assert signs.winner() == "!"


def test_classes_are_ranked_and_averaged_over_tiles(run, tmp_path):
    path = write(tmp_path / "a.png", half_bright(LARGE, 0.7), "PNG")
    code, out, _ = run("classify", path, "--labels", "dark, bright,dark", "--json")
    record = json.loads(out)
    assert code == 0 and [label for label, _ in record["labels"]] == ["bright", "dark"]
    assert sum(score for _, score in record["labels"]) == pytest.approx(1, abs=1e-3)
    assert {tile["labels"][0][0] for tile in record["tiles"]} == {"bright", "dark"}
    assert run("classify", path, "--labels", "bright,dark")[1].startswith(f"{path}: bright 0.")
    assert run("classify", path, "--labels", " ,")[0] == 2


def test_nothing_valid_has_no_answer_and_no_class(run, tmp_path):
    path = write(tmp_path / "a.tif", np.zeros((3, 200, 200), np.uint8), nodata=0)
    assert json.loads(run("ask", path, "is it dark", "--json")[1])["answer"] is None
    assert json.loads(run("classify", path, "--labels", "a,b", "--json")[1])["labels"] == []
    assert run("classify", path, "--labels", "a,b")[1] == f"{path}: no valid pixel\n"


@pytest.mark.parametrize("dtype, bright", [("uint8", 255), ("uint16", 4000), ("float32", 1.0)])
@pytest.mark.parametrize("bands", [1, 3])
def test_prepared_pixels_are_8_bits_of_any_kind_of_raster(run, tmp_path, dtype, bright, bands):
    image = np.full((bands, 100, 120), bright, dtype)
    path = write(tmp_path / "a.tif", image, photometric="MINISBLACK" if bands == 1 else "RGB")
    record = json.loads(run("classify", path, "--labels", "bright,dark", "--json")[1])
    assert record["labels"] == [["bright", 1.0], ["dark", 0.0]]


def test_regions_are_answered_without_an_image(tmp_path):
    run = runner(write_bundle(tmp_path / "b", ask=ANSWER | {"input": None, "graph": "regions"}))
    np.save(tmp_path / "r.npy", np.full((36, 8), 0.1, np.float32))
    code, out, err = run("ask", tmp_path / "r.npy", "is it bright", "--json", "--output", tmp_path / "o.geojson")
    assert (code, err) == (0, "") and json.loads(out)["answer"] == "yes"
    (feature,) = json.loads((tmp_path / "o.geojson").read_text())["features"]
    assert feature["geometry"] is None and feature["properties"]["crs"] is None
    assert run("plan", tmp_path / "r.npy")[0] == 0
    np.save(tmp_path / "bad.npy", np.array([{}], object), allow_pickle=True)
    np.save(tmp_path / "flat.npy", np.zeros(8, np.float32))
    (tmp_path / "none.npy").write_bytes(b"\x93NUMPY")
    picture = write(tmp_path / "a.png", pixels((), SMALL), "PNG")
    for wrong in ("bad.npy", "flat.npy", "none.npy", "missing.npy", picture.name):
        code, out, err = run("ask", tmp_path / wrong, "is it bright", "--json")
        assert (code, out) == (3, "") and ".npy of" in err


def test_a_bundle_says_what_it_can_do(run, tmp_path):
    path = write(tmp_path / "a.png", pixels((), SMALL), "PNG")
    code, out, err = run("caption", path)
    assert (code, out) == (2, "") and "has no caption task, it can do: detect, ask, ground, classify, search" in err
    assert run("change", path, path)[0] == 2
    assert run("plan", path, "--task", "caption")[0] == 2


# --- jobs, plans, scores --------------------------------------------------------------------------------------------


def test_a_job_asks_classifies_and_grounds(run, images, tmp_path):
    lines = ["version = 1", 'tasks = ["ask", "ground", "classify", "detect"]', 'inputs = ["images/1.png"]',
             'output = "out"', "[ask]", 'question = "is it bright"', "[ground]", 'phrase = "square"', "[classify]",
             'labels = ["dark", "bright"]', "[detect]", 'query = ["bright"]']  # fmt: skip
    job = tmp_path / "job.toml"
    job.write_text("\n".join(lines))
    assert run("run", job)[0] == 0
    records = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [next(k for k in r if k in ("answer", "detections", "labels")) for r in records] == [
        "answer", "detections", "labels", "detections",
    ]  # fmt: skip
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if p.is_dir()) == ["ask", "classify", "detect", "ground"]
    job.write_text("\n".join(line for line in lines if "question" not in line and line != "[ask]"))
    code, _, err = run("run", job)
    assert code == 2 and "'ask' without its question" in err


def test_plan_offers_what_the_bundle_does_and_counts_caches(images, tmp_path):
    large = GENERATE | {
        "decoder": DECODER | {"cache": {"layers": 32, "heads": 32, "head_dim": 128}}, "max_tokens": 512
    }  # fmt: skip
    run = runner(write_bundle(tmp_path / "b", ask=GENERATE, ground=large, classify=MATCH))
    code, out, _ = run("plan", images / "1.png", "--json", "--memory", "8GiB")
    plans = {p["task"]: p for p in map(json.loads, out.splitlines())}
    assert code == 0 and set(plans) == {"ask", "ground", "classify"}
    cache = 2 * 2 * 4 * 32 * 32 * 128 * (4 + 256 + 512)
    assert plans["ground"]["bytes"]["engine"] - plans["ask"]["bytes"]["engine"] == pytest.approx(cache, rel=0.01)
    code, out, _ = run("plan", images / "1.png", "--task", "ground", "--memory", "512MiB")
    assert code == 4 and "give --memory" in out
    assert run("ground", images / "1.png", "square", "--memory", "512MiB")[0] == 4


def test_sessions_that_other_tasks_left_open_count(bundle, images):
    opened, path = session(bundle), str(images / "1.png")
    fresh = plan_image(opened, path, "ask").plan
    opened.classify(path, ["bright"], lambda *_: None)
    after, again = (plan_image(opened, path, verb).plan for verb in ("ask", "classify"))
    assert dict(after.items)["process"] - dict(fresh.items)["process"] == MEMORY["session_bytes"]
    assert dict(again.items)["process"] == dict(fresh.items)["process"]


def test_a_large_image_that_is_decoded_whole_is_refused_by_its_size(run, tmp_path):
    path = write(tmp_path / "a.png", pixels((), (4000, 3000)), "PNG")
    code, _, err = run("classify", path, "--labels", "a,b", "--memory", "128MiB")
    assert code == 4 and "gdal_translate -of COG" in err


STEPS = [
    [{"op": "resize", "size": (50, 70), "filter": "bicubic"}],
    [{"op": "resize_shortest", "px": 30, "filter": "bicubic"}, {"op": "center_crop", "size": (30, 30)}],
    [{"op": "resize_shortest", "px": 32, "longest_px": 64, "multiple": 16, "filter": "bicubic"}],
    [{"op": "pad_square", "fill": (0, 0, 0), "place": "centre"}],
    [{"op": "resize_longest", "px": 64, "filter": "bicubic"}, {"op": "resize_to_tiles", "px": 32, "filter": "bicubic"},
     {"op": "split", "px": 32, "filter": "bicubic"}],
    [{"op": "smart_resize", "multiple": 28, "min_pixels": 3136, "max_pixels": 784 * 6, "filter": "bicubic"}],
]  # fmt: skip


@pytest.mark.parametrize("steps", STEPS, ids=lambda steps: "-".join(step["op"] for step in steps))
def test_the_plan_knows_what_the_steps_make_of_an_image(steps):
    spec = InputSpec.model_validate(INPUT | {"prepare": steps})
    for size in ((90, 40), (33, 120), (20, 30)):
        seen = prepared_shape(size, spec.prepare)
        made = prepare(np.zeros((*size, 3), np.uint8), spec.prepare, 0.5, 0.5).pixels_KCHW
        assert made.shape == (seen.views, 3, seen.height, seen.width) and seen.largest_px >= size[0] * size[1]


def test_an_image_that_the_steps_have_no_answer_for_does_not_stop_the_others(tmp_path):
    spec = INPUT | {"prepare": STEPS[-1]}
    run = runner(write_bundle(tmp_path / "b", classify=MATCH | {"input": spec}))
    thin = write(tmp_path / "thin.png", np.zeros((3, 1, 250), np.uint8), "PNG")
    good = write(tmp_path / "good.png", np.full((3, 60, 60), 255, np.uint8), "PNG")
    code, out, err = run("classify", thin, good, "--labels", "bright,dark")
    assert (code, out) == (3, f"{good}: bright 1.00, dark 0.00\n") and "thin.png" in err


def test_answers_are_scored_per_type(bundle, images, tmp_path):
    labels = tmp_path / "q.jsonl"
    rows = [("0.png", "is it bright", "No!", "tone"), ("0.png", "is it dark", "no", None), ("2.png", "is it bright",
            "YES", "tone")]  # fmt: skip
    labels.write_text("".join(
        json.dumps({"image": i, "questions": [{"question": q, "answer": a, **({"type": t} if t else {})}]}) + "\n"
        for i, q, a, t in rows
    ))  # fmt: skip
    found = evaluate_ask(session(bundle), labels, str(images), None, None)
    values = {score.label: score.value for score in found.scores}
    assert values == {"tone": 1.0, None: pytest.approx(2 / 3)} and found.samples == 2
    for broken in ('{"image": "0.png"}', '{"image": "0.png", "questions": []}', "[1]",
                   '{"image": "a", "questions": [1]}'):  # fmt: skip
        labels.write_text(broken)
        with pytest.raises(UsageError, match="line 1"):
            evaluate_ask(session(bundle), labels, str(images), None, None)


def test_classes_are_scored(bundle, images, tmp_path):
    labels = tmp_path / "l.jsonl"
    truth = {"0.png": "dark", "2.png": "bright", "1.png": "dark", "scene.tif": "dark"}
    labels.write_text("".join(json.dumps({"image": i, "label": c}) + "\n" for i, c in truth.items()))
    found = evaluate_classify(session(bundle), labels, str(images), None, None)
    values = {score.label: score.value for score in found.scores}
    assert values["bright"] == 1 and 0 < values[None] < 1 and found.samples == 4
    low, high = next(score.interval for score in found.scores if score.label is None)
    assert low < values[None] < high
    labels.write_text('{"image": "0.png", "label": 3}')
    with pytest.raises(UsageError, match="line 1"):
        evaluate_classify(session(bundle), labels, str(images), None, None)


def test_boxes_of_phrases_are_scored(bundle, images, tmp_path):
    boxes = []
    session(bundle).ground(str(images / "1.png"), "square", lambda record, _: boxes.append(record["box"]))
    right, wrong = boxes[0], [1.0, 1.0, 3.0, 3.0]
    labels = tmp_path / "p.jsonl"
    rows = [{"phrase": "square", "boxes": [right]}, {"phrase": "square", "boxes": [wrong]}]
    labels.write_text(json.dumps({"image": "1.png", "phrases": rows}))
    (score,) = evaluate_ground(session(bundle), labels, str(images), None, None).scores
    assert (score.metric, score.value) == ("Pr@0.5", 0.5)
    for broken in ([], [{"phrase": "a", "boxes": []}], [{"phrase": "a", "boxes": [[1, 2, 3]]}], [{"boxes": [right]}]):
        labels.write_text(json.dumps({"image": "1.png", "phrases": broken}))
        with pytest.raises(UsageError, match="line 1"):
            evaluate_ground(session(bundle), labels, str(images), None, None)


def test_several_boxes_of_a_phrase_are_met_one_to_one():
    one, other = (0.0, 0.0, 10.0, 10.0), (20.0, 0.0, 10.0, 10.0)
    shifted = (2.0, 0.0, 10.0, 10.0)
    assert all_found([one, other], [other, shifted]) and all_found([one, other], [one])
    assert not all_found([one, shifted], [one, other]) and not all_found([one], [one, other])
    assert not all_found([(6.0, 0.0, 10.0, 10.0)], [one]) and not all_found([(0.0, 0.0, 0.0, 0.0)], [one])


def test_retrieval_is_scored_both_ways(bundle, images, tmp_path):
    labels = tmp_path / "c.jsonl"
    rows = {"0.png": ["dark"], "2.png": ["bright", "bright"]}
    labels.write_text("".join(json.dumps({"image": i, "captions": c}) + "\n" for i, c in rows.items()))
    values = {s.metric: s.value for s in evaluate_search(session(bundle), labels, str(images), None, None).scores}
    assert values["image to text R@1"] == values["text to image R@1"] == values["mean recall"] == 100


def test_any_words_are_scored_by_the_names_of_the_labels(bundle, tmp_path, needs):
    needs("pycocotools")
    from edge_rsvlm.evaluate import LabelRules
    from tests.test_evaluate import coco

    write(tmp_path / "a.png", pixels([(30, 20, 40)], SMALL), "PNG")
    labels = coco(tmp_path / "l.json", {"a.png": [("square", (30, 20, 40, 40)), ("dark", (150, 70, 50, 50))]},
                  ("square", "dark"))  # fmt: skip
    found = evaluate_detect(session(bundle), labels, str(tmp_path), None, LabelRules(), None)
    values = {(s.metric, s.label): s.value for s in found.scores}
    assert values["AP50", "square"] == 1 and values["recall", "dark"] == 0 and found.not_scored == ()
