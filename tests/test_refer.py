"""Objects that a phrase means: chosen among all of a scene, end to end by the verbs."""

from __future__ import annotations

import json

import numpy as np
import pytest
from pydantic import ValidationError

from edge_rsvlm.bundle import load_bundle
from edge_rsvlm.config.task_specs import Tasks
from edge_rsvlm.engines.fake import FakeSession
from edge_rsvlm.pipeline.devices import with_gpu_memory
from edge_rsvlm.pipeline.session import Session
from edge_rsvlm.pipeline.vocabulary import understood
from edge_rsvlm.tasks import refer
from edge_rsvlm.types import Boxes
from tests.coloured import DETECT, REFER, Engine, things, use_engine, write_bundle
from tests.scenes import UTM, write
from tests.test_text_detect import SQUARES
from tests.wide import runner

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
REDS = [[120, 120, 16, 16], [20, 16, 12, 12], [64, 64, 8, 8], [300, 200, 8, 8]]
"""The larger first, and then as boxes end from the top."""


@pytest.fixture(autouse=True)
def engine(monkeypatch):
    use_engine(monkeypatch)


@pytest.fixture
def scene(tmp_path):
    """Of several tiles."""
    return write(tmp_path / "scene.tif", things(SQUARES), **UTM)


def bundle(folder, **changed):
    return write_bundle(folder, detect=DETECT, ground=REFER | changed)


@pytest.fixture
def run(tmp_path):
    return runner(bundle(tmp_path / "bundle"))


def record(run, scene, phrase):
    code, out, _ = run("ground", scene, phrase, "--json")
    assert code == 0
    return json.loads(out)


def boxes(found):
    return [item["box"] for item in found["detections"]]


def test_a_phrase_chooses_among_the_objects_of_the_whole_scene_the_best_first(run, scene, tmp_path):
    found = record(run, scene, "the red")
    assert boxes(found) == REDS and "warnings" not in found
    scores = [item["score"] for item in found["detections"]]
    assert scores == sorted(scores, reverse=True) and {item["label"] for item in found["detections"]} == {"the red"}
    assert boxes(record(run, scene, "the largest red")) == REDS[:1]
    assert boxes(record(run, scene, "the leftmost red")) == [[20, 16, 12, 12]]
    assert boxes(record(run, scene, "the leftmost blue")) == [[31, 250, 12, 12]]
    code, out, _ = run("ground", scene, "the largest red", "--output", tmp_path / "found.geojson")
    assert (code, out) == (0, f"{scene}: 1 the largest red\n")
    (feature,) = json.loads((tmp_path / "found.geojson").read_text())["features"]
    assert feature["geometry"]["type"] == "Polygon"


def test_nothing_is_meant_where_nothing_of_the_kind_was_found(run, scene, tmp_path):
    assert boxes(record(run, scene, "the green")) == [], "which the detect task does not look for"
    empty = write(tmp_path / "empty.tif", things(()), **UTM)
    assert run("ground", empty, "the red")[:2] == (0, f"{empty}: nothing found\n")


def test_objects_below_the_threshold_are_not_meant(tmp_path, scene):
    run = runner(bundle(tmp_path / "b", threshold=0.57))
    assert boxes(record(run, scene, "the red")) == REDS[:2]


def test_only_the_surest_objects_are_read_and_the_user_is_told(tmp_path, scene):
    found = record(runner(bundle(tmp_path / "few", most_objects=3)), scene, "the red")
    assert len(found["detections"]) < len(REDS)
    assert "3 surest of 7 objects" in found["warnings"][0]
    assert "warnings" not in record(runner(bundle(tmp_path / "all", most_objects=7)), scene, "the red")


def test_words_that_phrases_never_had_are_refused(run, scene):
    code, out, err = run("ground", scene, "the largest thing", "--json")
    assert (code, out) == (2, "") and "never learnt 'thing'" in err and "detect --like" in err


def test_one_pass_and_one_run_of_the_encoder_serve_detect_and_ground(run, scene, tmp_path, monkeypatch):
    sessions, init = {}, Session.__init__

    class Counted(Engine):
        def open(self, path):
            return sessions.setdefault(path.stem, super().open(path))

    engine = Counted()
    make = lambda threads, arena: engine  # noqa: E731
    monkeypatch.setattr(Session, "__init__", lambda self, *a, **k: init(self, *a, **(k | {"engine_factory": make})))
    alone = {"detect": run("detect", scene, "--json")[1], "ground": run("ground", scene, "the red", "--json")[1]}
    assert sessions["eye"].calls % 2 == 0
    calls = sessions["eye"].calls // 2
    sessions.clear()
    (tmp_path / "job.toml").write_text(
        'version = 1\ntasks = ["detect", "ground"]\ninputs = ["scene.tif"]\noutput = "out"\n'
        '[ground]\nphrase = "the red"\n'
    )
    assert run("run", tmp_path / "job.toml")[0] == 0
    assert sessions["eye"].calls == calls and sessions["choice"].calls == 1
    together = map(json.loads, (tmp_path / "out" / "results.jsonl").read_text().splitlines())
    assert [item["detections"] for item in together] == [json.loads(out)["detections"] for out in alone.values()]


def test_a_task_that_refers_needs_a_detect_task_by_words_that_sees_alike():
    other = DETECT | {"input": DETECT["input"] | {"tile_px": 64}}
    for tasks in ({"ground": REFER}, {"ground": REFER, "detect": other}):
        with pytest.raises(ValidationError, match="refers to objects"):
            Tasks.model_validate(tasks)


def test_on_a_gpu_it_takes_the_engines_of_the_detect_task_too(tmp_path):
    folder = bundle(tmp_path / "b")
    resident = dict.fromkeys(("eye", "cells", "looks", "names", "choice"), 1000)
    tasks = with_gpu_memory(load_bundle(folder, allow_unsigned=True), resident).manifest.tasks
    assert (tasks.detect.memory.session_bytes, tasks.ground.memory.session_bytes) == (4000, 5000)


def test_texts_that_a_task_understands_are_told_from_others(tmp_path):
    texts = ("the red", "a photo of a thing", "Blue, largest!")
    made = load_bundle(bundle(tmp_path / "b"), allow_unsigned=True)
    assert understood(made, "ground", texts) == (texts[0], texts[2]) and understood(made, "detect", texts) == texts[1:2]


def test_no_object_needs_no_run():
    graph = FakeSession(lambda inputs: {})
    none = Boxes(np.zeros((0, 4)), np.zeros(0, np.float32), np.zeros(0, np.int64))
    assert refer.Referrer(graph, None, 2)("the red", none, (10, 10)).shape == (0,) and graph.calls == 0
