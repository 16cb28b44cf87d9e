"""Objects by words and by examples, from maps of embeddings: each tile, and end to end by the verbs."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import rasterio
from affine import Affine

from edge_rsvlm.bundle import load_bundle
from edge_rsvlm.config.task_specs import TextDetectTask
from edge_rsvlm.engines.fake import FakeSession
from edge_rsvlm.errors import UsageError
from edge_rsvlm.pipeline.detect import DetectQuery
from edge_rsvlm.pipeline.examples import parse_example
from edge_rsvlm.pipeline.session import Limits, Session
from edge_rsvlm.tasks.like import Examples, LikeDetector, box_means, symmetries
from edge_rsvlm.tasks.text_detect import TextDetector
from tests import wide
from tests.coloured import DETECT, INPUT, Engine, things, use_engine, write_bundle
from tests.fakes import write_bundle as write_fixed
from tests.scenes import UTM, write
from tests.wide import runner

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")

SQUARES = (("red", 20, 16, 12), ("green", 92, 60, 16), ("blue", 200, 8, 8), ("red", 120, 120, 16), ("red", 300, 200, 8),
           ("blue", 31, 250, 12), ("green", 380, 280, 16), ("red", 64, 64, 8), ("blue", 190, 188, 12))  # fmt: skip
"""Some lie on borders of tiles, which begin every 64 pixels."""


@pytest.fixture(autouse=True)
def engine(monkeypatch):
    use_engine(monkeypatch)


@pytest.fixture
def bundle(tmp_path):
    return write_bundle(tmp_path / "bundle")


@pytest.fixture
def run(bundle):
    return runner(bundle)


@pytest.fixture
def scene(tmp_path):
    return write(tmp_path / "scene.tif", things(SQUARES))


@pytest.fixture
def example(tmp_path):
    """Another image: a red, a green and a blue thing side by side."""
    return write(tmp_path / "example.png", things((("red", 60, 50, 8), ("green", 68, 50, 8), ("blue", 76, 50, 8)),
                                                  (200, 160)), "PNG")  # fmt: skip


def boxes(colour):
    return sorted([col, row, side, side] for name, col, row, side in SQUARES if name == colour)


def found(out, label):
    return sorted(d["box"] for d in json.loads(out)["detections"] if d["label"] == label)


# --- one tile -------------------------------------------------------------------------------------------------------


def random_maps(count=2, dims=6, size=9):
    rng = np.random.default_rng(5)
    maps = {
        "embeddings": rng.normal(size=(count, dims, size, size)),
        "shift": rng.normal(size=(count, 1, size, size)),
        "scale": rng.uniform(1, 4, (count, 1, size, size)),
        "ltrb": rng.uniform(1, 9, (count, 4, size, size)),
    }
    queries = rng.normal(size=(3, dims))
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    return {name: values.astype(np.float32) for name, values in maps.items()}, queries.astype(np.float32)


def detector(maps, **changed):
    head = FakeSession(lambda inputs: maps)
    return TextDetector(TextDetectTask.model_validate(DETECT | changed), head)


FEATURES = {"c1": np.zeros((2, 3, 36, 36), np.float32)}


def test_scores_and_boxes_cell_by_cell():
    maps, queries = random_maps()
    given = detector(maps)(FEATURES, queries, 0.5)
    for n, boxes in enumerate(given):
        scores = np.zeros((3, 9, 9))
        for q, row, col in np.ndindex(scores.shape):
            vector = maps["embeddings"][n, :, row, col]
            cosine = vector @ queries[q] / np.linalg.norm(vector)
            logit = (cosine + maps["shift"][n, 0, row, col]) * maps["scale"][n, 0, row, col]
            scores[q, row, col] = 1 / (1 + np.exp(-logit))
        expected = []
        for q, row, col in np.ndindex(scores.shape):
            around = scores[q, max(row - 1, 0) : row + 2, max(col - 1, 0) : col + 2]
            if scores[q, row, col] >= max(0.5, around.max()):
                left, top, right, bottom = maps["ltrb"][n, :, row, col]
                x, y = col * 4 + 2, row * 4 + 2
                expected.append((scores[q, row, col], q, (x - left, y - top, x + right, y + bottom)))
        expected.sort(key=lambda box: -box[0])
        assert len(expected) > 5
        np.testing.assert_allclose(boxes.scores_N, [box[0] for box in expected], rtol=1e-4)
        assert boxes.labels_N.tolist() == [box[1] for box in expected]
        np.testing.assert_allclose(boxes.xyxy_N4, [box[2] for box in expected], rtol=1e-5)


def test_the_best_boxes_of_a_tile_are_kept_and_a_zero_vector_is_like_nothing():
    maps, queries = random_maps()
    every, few = (detector(maps, max_boxes_per_tile=most)(FEATURES, queries, 0.01) for most in (1000, 4))
    for all_boxes, kept in zip(every, few, strict=True):
        np.testing.assert_array_equal(kept.scores_N, all_boxes.scores_N[:4])
    maps["embeddings"][:], maps["shift"][:] = 0, 0
    with np.errstate(all="raise"):
        scores = np.concatenate([b.scores_N for b in detector(maps)(FEATURES, queries, 0.5)])
    assert (scores == 0.5).all()


def test_objects_are_what_any_query_finds_once():
    maps, queries = random_maps()
    every, once = detector(maps)(FEATURES, queries, 0.3), detector(maps).objects(FEATURES, queries, 0.3)
    for boxes, objects in zip(every, once, strict=True):
        assert not objects.labels_N.any() and 0 < len(objects.scores_N) < len(boxes.scores_N)
        assert objects.scores_N[0] == boxes.scores_N[0]
        assert {tuple(box) for box in objects.xyxy_N4} <= {tuple(box) for box in boxes.xyxy_N4}


# --- likeness in one tile -------------------------------------------------------------------------------------------


def test_means_count_each_cell_by_how_much_of_it_lies_in_the_box():
    rng = np.random.default_rng(0)
    maps = rng.normal(size=(11, 6, 8)).astype(np.float32)
    fine = maps.repeat(10, axis=1).repeat(10, axis=2)
    boxes = [
        (0, 0, 8, 6),
        (1.3, 2.1, 1.8, 2.9),
        (0.5, 0.2, 7.6, 5.9),
        (2, 3, 5, 4),
        (-4, 1.5, 2.5, 99),
        (7.9, 5.9, 9, 9),
    ]
    found = box_means(maps, np.array(boxes, np.float64))
    for mean, box in zip(found, boxes, strict=True):
        x0, y0, x1, y1 = (max(round(10 * v), 0) for v in box)
        np.testing.assert_allclose(mean, fine[:, y0:y1, x0:x1].mean(axis=(1, 2)), rtol=1e-5, atol=1e-6)
    nowhere = box_means(maps, np.array([(9, 1, 12, 2), (3, 3, 3, 5), (-3, -3, 0, 0)], np.float64))
    np.testing.assert_array_equal(nowhere, 0)


def test_boxes_turn_with_their_tile():
    tile = np.arange(2 * 6 * 9, dtype=np.float32).reshape(1, 2, 6, 9)
    seen = list(symmetries(tile, np.array([1.0, 2, 4, 4])))
    for turned, (x0, y0, x1, y1) in seen:
        part = turned[0, :, int(y0) : int(y1), int(x0) : int(x1)]
        assert sorted(part.ravel()) == sorted(tile[0, :, 2:4, 1:4].ravel())
    assert len({turned.tobytes() + bytes(turned.shape) for turned, _ in seen}) == 8


def like_detector(texture):
    """One object of score 0.5 ** 10 in each of some cells, with sides of 8, 8, 16 and 2 px, and textures."""
    rows, halves = np.array([2, 8, 14, 20]), np.array([4, 4, 8, 1])
    shift, ltrb = np.full((1, 1, 24, 24), -9.0, np.float32), np.ones((1, 4, 24, 24), np.float32)
    shift[0, 0, rows, rows], ltrb[0, :, rows, rows] = 0, halves[:, None]
    maps = {
        "embeddings": np.zeros((1, 2, 24, 24), np.float32),
        "shift": shift,
        "scale": np.ones_like(shift),
        "ltrb": ltrb,
    }
    features = np.zeros((1, 2, 24, 24), np.float32)
    for row, vector in zip(rows, texture, strict=True):
        features[0, :, row - 2 : row + 3, row - 2 : row + 3] = np.array(vector)[:, None, None]
    spec = TextDetectTask.model_validate(DETECT)
    return LikeDetector(
        spec, FakeSession(lambda _: {"features": features}), detector(maps), np.array([[1, 0], [0, 1]], np.float32)
    )


def test_scores_are_of_appearance_size_and_objectness():
    find = like_detector([(1, 0), (3, 4), (2, 0), (-1, 0)])
    one = {"c1": np.zeros((1, 3, 96, 96), np.float32)}
    examples = Examples(np.array([[1, 0]], np.float32), np.array([8.0]))
    (boxes,) = find(one, [examples], 0.05)
    objectness = 0.5**0.1
    np.testing.assert_allclose(boxes.scores_N, objectness * np.array([1, 0.5**0.5, 0.6]), rtol=1e-5)
    np.testing.assert_allclose(boxes.xyxy_N4[:, 2] - boxes.xyxy_N4[:, 0], [8, 16, 8])
    larger = Examples(np.array([[1, 0]], np.float32), np.array([16.0]))
    both = Examples.joined([examples, larger])
    np.testing.assert_allclose(find(one, [both], 0.05)[0].scores_N, objectness * np.array([1, 1, 0.6]), rtol=1e-5)
    unlike = Examples(np.array([[0, -1]], np.float32), np.array([8.0]))
    assert not len(find(one, [unlike], 0.05)[0].scores_N)
    assert find(one, [examples], 0.9)[0].scores_N.shape == (1,)
    (several,) = find(one, [unlike, larger, examples], 0.05)
    assert several.labels_N.tolist() == [1, 1, 1, 2, 2, 2], "each thing on its own"
    np.testing.assert_array_equal(several.scores_N[3:], boxes.scores_N)


def test_joined_examples_have_no_order():
    rng = np.random.default_rng(0)
    parts = [Examples(rng.normal(size=(8, 5)).astype(np.float32), rng.uniform(1, 9, 8)) for _ in range(3)]
    first, other = Examples.joined(parts), Examples.joined(parts[::-1])
    np.testing.assert_array_equal(first.vectors_ED, other.vectors_ED)
    np.testing.assert_array_equal(first.sides_E, other.sides_E)


# --- by words -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("driver, suffix", [("PNG", "png"), ("GTiff", "tif")])
def test_a_query_finds_exactly_its_objects_once_each(run, tmp_path, driver, suffix):
    path = write(tmp_path / f"a.{suffix}", things(SQUARES), driver)
    code, out, err = run("detect", path, "--query", "green", "--json")
    assert (code, err) == (0, "")
    assert found(out, "green") == boxes("green") and len(json.loads(out)["detections"]) == 2
    code, out, _ = run("detect", path, "--query", "blue", "--query", "red", "--json")
    assert (found(out, "red"), found(out, "blue")) == (boxes("red"), boxes("blue"))
    assert {d["score"] for d in json.loads(out)["detections"]} == {0.9959}


def test_without_a_query_the_classes_of_the_bundle_are_found(run, scene):
    code, out, _ = run("detect", scene, "--json")
    assert code == 0
    assert (found(out, "red"), found(out, "blue"), found(out, "green")) == (boxes("red"), boxes("blue"), [])


def test_thresholds(run, scene):
    assert json.loads(run("detect", scene, "--query", "red", "--score", "0.99", "--json")[1])["detections"]
    assert not json.loads(run("detect", scene, "--query", "thing", "--json")[1])["detections"]
    low = json.loads(run("detect", scene, "--query", "red green", "--json")[1])["detections"]
    assert {d["score"] for d in low} == {0.929} and len(low) == len(boxes("red") + boxes("green"))
    assert not json.loads(run("detect", scene, "--query", "red green", "--score", "0.95", "--json")[1])["detections"]


def test_words_that_were_never_learnt_are_refused(run, scene):
    code, out, err = run("detect", scene, "--query", "red", "--query", "gren thing", "--json")
    assert (code, out) == (2, "")
    assert "never learnt 'gren'" in err and "green" in err and "detect --like IMAGE#x,y,w,h" in err
    assert run("detect", scene, "--query", " ")[0] == 2
    code, _, err = run("classify", scene, "--labels", "red,purple")
    assert code == 2 and "'purple'" in err and "--like" in err
    assert run("classify", scene, "--labels", "red,green 2")[0] == 0


def test_a_bundle_without_examples_does_not_advise_them(tmp_path, scene):
    tasks = json.loads((write_bundle(tmp_path / "all") / "manifest.json").read_text())["tasks"]
    run = runner(write_bundle(tmp_path / "b", classify=tasks["classify"]))
    code, _, err = run("classify", scene, "--labels", "purple")
    assert code == 2 and "'purple'" in err and "--like" not in err


def test_plan_and_several_inputs(run, scene, example):
    code, out, _ = run("plan", scene, "--json")
    assert code == 0 and "detect" in {json.loads(line)["task"] for line in out.splitlines()}
    code, out, _ = run("detect", scene, example, "--query", "red")
    assert code == 0 and out == f"{scene}: 4 red\n{example}: 1 red\n"


# --- by examples ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("colour, x", [("red", 60), ("green", 68), ("blue", 76)])
def test_an_example_finds_its_kind_in_another_image(run, scene, example, colour, x):
    code, out, err = run("detect", scene, "--like", f"{example}#{x},50,8,8", "--json")
    assert (code, err) == (0, "")
    assert found(out, "like") == boxes(colour) and len(json.loads(out)["detections"]) == len(boxes(colour))


@pytest.mark.parametrize("n", range(len(SQUARES)))
def test_an_example_may_come_from_the_image_itself_and_lie_anywhere_in_it(run, scene, n):
    colour, col, row, side = SQUARES[n]
    code, out, _ = run("detect", scene, "--like", f"{scene}#{col},{row},{side},{side}", "--json")
    assert code == 0 and found(out, "like") == boxes(colour)


def test_several_examples_find_what_is_like_any_of_them(run, scene, example):
    red, green = (f"{example}#{x},50,8,8" for x in (60, 68))
    _, out, _ = run("detect", scene, "--like", red, "--like", green, "--json")
    assert found(out, "like") == sorted(boxes("red") + boxes("green"))
    _, again, _ = run("detect", scene, "--like", green, "--like", red, "--like", red, "--json")
    assert json.loads(again)["detections"] == json.loads(out)["detections"]


def test_what_has_the_size_of_the_example_is_most_like_it(run, scene, example):
    large = f"{scene}#120,120,16,16"
    _, out, _ = run("detect", scene, "--like", large, "--json")
    score = {tuple(d["box"]): d["score"] for d in json.loads(out)["detections"]}
    best = score[120, 120, 16, 16]
    assert best > 0.99 and score[20, 16, 12, 12] == pytest.approx(best * (12 / 16) ** 0.5, abs=1e-3)
    assert score[300, 200, 8, 8] == pytest.approx(best * 0.5**0.5, abs=1e-3)
    _, out, _ = run("detect", scene, "--like", large, "--like", f"{example}#60,50,8,8", "--json")
    assert {d["box"][2] for d in json.loads(out)["detections"] if d["score"] > 0.99} == {8, 16}


def test_a_turned_copy_is_as_like_as_the_example(run, tmp_path):
    """Things that brighten in one direction; one without a slope is less like them."""
    image = things([("red", col, 100, 16) for col in (60, 120, 180, 240, 300)])
    ramp = np.tile(np.linspace(195, 255, 16).astype(np.uint8), (16, 1))
    for col, thing in zip((60, 120, 180, 240), (ramp, ramp.T, ramp[:, ::-1], ramp.T[::-1]), strict=True):
        image[0, 100:116, col : col + 16] = thing
    path = write(tmp_path / "ramps.tif", image)
    for col in (60, 180):
        _, out, _ = run("detect", path, "--like", f"{path}#{col},100,16,16", "--json")
        score = {d["box"][0]: d["score"] for d in json.loads(out)["detections"]}
        assert all(score[other] == pytest.approx(score[col], abs=1e-3) for other in (60, 120, 180, 240))
        assert score[300] < 0.9 * score[col]


def test_scores_by_examples_have_a_threshold_of_their_own(tmp_path, scene, example):
    run = runner(write_bundle(tmp_path / "b", detect=DETECT | {"like": DETECT["like"] | {"threshold": 0.9}}))
    small = ("--like", f"{example}#60,50,8,8")
    assert found(run("detect", scene, *small, "--json")[1], "like") == [[64, 64, 8, 8], [300, 200, 8, 8]]
    assert found(run("detect", scene, *small, "--score", "0.5", "--json")[1], "like") == boxes("red")


def test_only_examples_open_the_graph_of_appearance(bundle, scene):
    session = Session(load_bundle(bundle, allow_unsigned=True), Limits(memory_bytes=8 << 30))
    opened = []
    session.engine_factory = lambda *_: SimpleNamespace(
        open=lambda path: opened.append(path.stem) or Engine().open(path)
    )
    session.detect(str(scene), DetectQuery(), lambda *_: None)
    assert opened and "looks" not in opened
    session.examples(str(scene), [(20, 16, 12, 12)])
    assert "looks" in opened


def test_what_likeness_reads_is_what_the_task_asks_of_the_encoder():
    with pytest.raises(ValueError, match="name them there too"):
        TextDetectTask.model_validate(DETECT | {"like": DETECT["like"] | {"encoder_outputs": ["c1", "c2"]}})


@pytest.mark.parametrize("overviews", [[], [2]])
def test_examples_are_seen_at_the_ground_resolution_of_the_task(tmp_path, overviews):
    """Pixels of 0.5 m, and a model that was made for 1 m: what is 16 pixels wide is 8 of the model's."""
    detect = DETECT | {"input": INPUT | {"resolution_m": [1.0, 1.0]}}
    run = runner(write_bundle(tmp_path / "b", detect=detect))
    squares = [("red", 100, 80, 16), ("green", 116, 80, 16), ("red", 300, 220, 16)]
    fine = write(tmp_path / "fine.tif", things(squares), **UTM)
    with rasterio.open(fine, "r+") as raster:
        raster.build_overviews(overviews)
    coarse = UTM | {"transform": Affine(1, 0, 500_000, 0, -1, 5_300_000)}
    half = write(tmp_path / "half.tif", things([("red", 40, 40, 8), ("green", 60, 40, 8)], (150, 140)), **coarse)
    for example, expected in ((f"{half}#40,40,8,8", 2), (f"{half}#60,40,8,8", 1), (f"{fine}#116,80,16,16", 1)):
        code, out, _ = run("detect", fine, "--like", example, "--score", "0.5", "--json")
        assert code == 0 and len(json.loads(out)["detections"]) == expected
    np.testing.assert_allclose(found(out, "like"), [[116, 80, 16, 16]], atol=2)


def test_examples_are_prepared_as_images_are(tmp_path, scene):
    steps = [{"op": "resize", "size": [96, 160], "filter": "bilinear"}]
    spec = INPUT | {"prepare": steps, "whole_px": 256, "resolution_m": None}
    run = runner(write_bundle(tmp_path / "b", detect=DETECT | {"input": spec}))
    whole = write(tmp_path / "w.png", things([("green", 150, 40, 16), ("red", 30, 100, 16)], (240, 144)), "PNG")
    for x, y, colour in ((150, 40, "green"), (30, 100, "red")):
        code, out, _ = run("detect", scene, "--like", f"{whole}#{x},{y},16,16", "--json")
        assert code == 0 and len(json.loads(out)["detections"]) == len(boxes(colour))
        np.testing.assert_allclose(found(out, "like"), boxes(colour), atol=3)


def test_jobs_take_examples_relative_to_the_job(run, tmp_path, scene, example):
    job = tmp_path / "job.toml"
    lines = ["version = 1", 'tasks = ["detect"]', 'inputs = ["scene.tif"]', 'output = "out"', "[detect]"]
    job.write_text("\n".join([*lines, 'like = ["example.png#68,50,8,8"]']))
    assert run("run", job)[0] == 0
    assert found((tmp_path / "out" / "results.jsonl").read_text(), "like") == boxes("green")
    job.write_text("\n".join([*lines, 'like = ["example.png#68,50,8,8"]', 'query = ["red"]']))
    assert run("run", job)[0] == 2
    job.write_text("\n".join([*lines, 'query = ["purple"]']))
    assert run("run", job)[0] == 2


@pytest.mark.parametrize(
    "text", ["a.tif", "a.tif#1,2,3", "a.tif#1,2,3,4,5", "#1,2,3,4", "a.tif#a,2,3,4", "a.tif#1,2,0,4", "a.tif#1,2,3,-4",
             "a.tif#nan,2,3,4", "a.tif#1,2,3,4 ", ""]
)  # fmt: skip
def test_what_names_no_box_is_refused(text):
    with pytest.raises(UsageError, match=r"write it like scene\.tif#120,80,32,24"):
        parse_example(text)


def test_names_may_have_hashes_and_boxes_fractions():
    assert parse_example("a#1.tif#1.5,2,3,4.25") == parse_example("a#1.tif#1.50,2,3,4.25")
    assert parse_example("a#1.tif#1.5,2,3,4").image == "a#1.tif"


def test_examples_that_cannot_be_used_say_how_to_give_one(run, tmp_path, scene):
    empty = write(tmp_path / "empty.tif", np.zeros((3, 200, 200), np.uint8), nodata=0)
    assert run("detect", scene, "--like", f"{scene}#380,280,20.01,20.02", "--json")[0] == 0  # rounded results
    for text, why in (
        (f"{scene}#390,290,20,5", "reaches beyond its 400 x 300 pixels"),
        (f"{scene}#-1,0,20,5", "reaches beyond"),
        (f"{tmp_path}/none.tif#1,2,3,4", "cannot be read"),
        (f"{tmp_path}#1,2,3,4", "is a folder"),
        (f"{empty}#1,2,3,4", "has no valid pixel"),
    ):
        code, out, err = run("detect", scene, "--like", text, "--json")
        assert (code, out) == (3, "") and why in err and "write it like scene.tif#120,80,32,24" in err
    assert run("detect", scene, "--like", f"{scene}#1,2,3")[0] == 2
    code, _, err = run("detect", scene, "--like", f"{scene}#20,16,12,12", "--query", "red")
    assert code == 2 and "exclude each other" in err


def test_bundles_that_find_by_other_means_say_what_works(monkeypatch, tmp_path, scene):
    like = ("--like", f"{scene}#20,16,12,12")
    code, _, err = runner(write_fixed(tmp_path / "fixed"))("detect", scene, *like)
    assert code == 2 and "does not find by examples" in err and "leave --like out: it finds square, car" in err
    wide.use_engine(monkeypatch)
    code, _, err = runner(wide.write_bundle(tmp_path / "open", detect=wide.OPEN))("detect", scene, *like)
    assert code == 2 and "use --query" in err


def test_the_memory_of_an_example_is_planned(run, tmp_path, scene, example):
    large = write(tmp_path / "large.png", np.zeros((3, 6000, 6000), np.uint8), "PNG")  # decodes to 137 MiB
    advice = run("detect", scene, "--like", f"{scene}#20,16,12,12", "--memory", "1MiB")[2]
    memory = f"{int(re.findall(r'give --memory ([0-9]+)MiB', advice)[0]) + 60}MiB"
    code, out, err = run("detect", scene, "--like", f"{large}#20,20,8,8", "--memory", memory)
    assert (code, out) == (4, "") and "detect needs at least" in err
    assert run("detect", scene, "--like", f"{example}#60,50,8,8", "--memory", memory)[0] == 0


def test_examples_count_in_the_time_of_the_first_input(bundle, scene):
    session = Session(load_bundle(bundle, allow_unsigned=True), Limits(memory_bytes=8 << 30))
    began = session.started
    (red, green), warnings = session.examples(str(scene), [(20, 16, 12, 12), (92, 60, 16, 16)])
    for example, colour, side in ((red, 0, 12), (green, 1, 16)):
        np.testing.assert_allclose(example.vectors_ED, np.tile(np.eye(5)[colour], (8, 1)), atol=1e-6)
        np.testing.assert_allclose(example.sides_E, [side] * 8)
    assert session.started == began and warnings == []
