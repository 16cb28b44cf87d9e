"""Tasks of a job that look at a scene alike: one pass, one run of the encoder, and the same bytes as alone."""

from __future__ import annotations

import json

import numpy as np
import pytest

from edge_rsvlm.budget import joined, plan_memory
from edge_rsvlm.bundle import load_bundle
from edge_rsvlm.errors import BudgetError
from edge_rsvlm.pipeline import consume
from edge_rsvlm.pipeline.requests import classifying, embedding
from edge_rsvlm.pipeline.session import Limits, Session
from edge_rsvlm.pipeline.sharing import Shared
from edge_rsvlm.raster.reader import open_raster
from tests.scenes import UTM, pixels, write
from tests.wide import (
    ANSWER,
    LARGE,
    MATCH,
    OPEN,
    POOLED,
    SEGMENT,
    TILES,
    WideEngine,
    runner,
    write_bundle,
)

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
TASKS = {"segment": SEGMENT, "ask": ANSWER, "classify": POOLED, "detect": OPEN | {"input": TILES}}
JOB = """version = 1
tasks = ["segment", "ask", "classify", "detect"]
inputs = ["*.tif"]
output = "out"
[segment]
labels = ["bright", "dark"]
[ask]
question = "is it bright"
[classify]
labels = ["bright", "dark"]
[detect]
query = ["bright"]
"""


class Counted(WideEngine):
    """Remembers the sessions that it opened, which count their runs."""

    def __init__(self):
        self.sessions = {}

    def open(self, graph):
        return self.sessions.setdefault(graph.stem, super().open(graph))

    def runs(self):
        return {name: session.calls for name, session in self.sessions.items()}


@pytest.fixture
def engine(monkeypatch):
    counted, init = Counted(), Session.__init__
    make = lambda threads, arena: counted  # noqa: E731
    monkeypatch.setattr(Session, "__init__", lambda self, *a, **k: init(self, *a, **({"engine_factory": make} | k)))
    return counted


@pytest.fixture
def run(tmp_path):
    return runner(write_bundle(tmp_path / "bundle", **TASKS))


@pytest.fixture
def passes(monkeypatch):
    """How many consumers each pass over an image fed."""
    found, run_over = [], consume.run_over
    monkeypatch.setattr(
        "edge_rsvlm.pipeline.session.run_over",
        lambda view, pace, consumers: found.append(len(consumers)) or run_over(view, pace, consumers),
    )
    return found


@pytest.fixture
def scenes(tmp_path):
    """Two scenes of many tiles, one with nodata and a warning, and a job over them."""
    image = pixels([(40, 30, 60), (230, 180, 70)], LARGE)
    write(tmp_path / "a.tif", image, **UTM)
    image[:, :100, :150] = 9
    write(tmp_path / "b.tif", image, nodata=9)
    (tmp_path / "job.toml").write_text(JOB)
    return [tmp_path / "a.tif", tmp_path / "b.tif"]


def plain(lines):
    """Records without their times."""
    records = [json.loads(line) for line in lines.splitlines()]
    return [{key: value for key, value in record.items() if key != "timing_ms"} for record in records]


def alone(run, verb, scenes, folder, *options):
    """Records of a verb; its files are in ``folder``, as a job has them."""
    mask = ("--mask", folder / verb) if verb == "segment" else ()
    code, out, _ = run(verb, *scenes, *options, "--json", "--output", folder / verb, *mask)
    assert code == 0
    return plain(out)


def test_a_job_gives_the_bytes_of_its_tasks_and_encodes_once(engine, run, passes, scenes, tmp_path):
    folder = tmp_path / "alone"
    labels = ("--labels", "bright,dark")
    records = {verb: alone(run, verb, scenes, folder, *labels) for verb in ("segment", "classify")}
    each = engine.runs()
    assert each["maps"] % 2 == 0 and each["cells"] == each["pool"] == each["maps"] // 2 > 2
    records["detect"] = alone(run, "detect", scenes, folder, "--query", "bright")
    records["ask"] = plain(run("ask", *scenes, "is it bright", "--json", "--output", folder / "ask")[1])
    engine.sessions.clear()
    passes.clear()
    assert run("run", tmp_path / "job.toml")[0] == 0
    together = engine.runs()
    assert together["maps"] == together["cells"] == together["pool"] == together["boxes"] == each["maps"] // 2
    assert passes == [3, 1] * 2  # segment, classify and detect; ask prepares its images otherwise
    got = plain((tmp_path / "out" / "results.jsonl").read_text())
    order = [(scene, verb) for scene in range(2) for verb in ("segment", "ask", "classify", "detect")]
    assert [json.dumps(record) for record in got] == [json.dumps(records[verb][scene]) for scene, verb in order]
    assert "tiles" in got[1] and "warnings" not in got[0]
    files = sorted(path.relative_to(folder) for path in folder.rglob("*.*"))
    assert len(files) == 10
    for file in files:
        assert (tmp_path / "out" / file).read_bytes() == (folder / file).read_bytes(), file


def test_tasks_that_do_not_fit_together_run_apart(engine, run, passes, scenes, tmp_path, monkeypatch):
    run("run", tmp_path / "job.toml")
    expected, alone = plain((tmp_path / "out" / "results.jsonl").read_text()), Session.together

    def refusing(self, path, requests, progress=None):
        if len(requests) > 1:
            raise BudgetError("too large", fix="give more")
        return alone(self, path, requests, progress)

    monkeypatch.setattr(Session, "together", refusing)
    passes.clear()
    code, _, err = run("run", tmp_path / "job.toml")
    assert (code, "error" in err) == (0, False) and passes == [1] * 8
    assert plain((tmp_path / "out" / "results.jsonl").read_text()) == expected


def test_tasks_together_need_the_memory_of_all_their_results(tmp_path, scenes):
    session = Session(load_bundle(write_bundle(tmp_path / "b", **TASKS), allow_unsigned=True), Limits(8 << 30))
    with open_raster(str(scenes[0])) as raster:
        needs = [session.demand(verb, raster)[1] for verb in ("segment", "classify")]
    both = joined(needs)
    assert both.verbs == ("segment", "classify") and joined(needs[:1]) is needs[0]
    plans = [dict(plan_memory([d], limit_bytes=8 << 30, base_bytes=0).items) for d in (*needs, both)]
    assert plans[2]["engine"] == plans[0]["engine"] + plans[1]["engine"]
    assert plans[2]["results"] == plans[0]["results"] > plans[1]["results"]
    with pytest.raises(BudgetError, match=r"segment \+ classify needs"):
        plan_memory([both], limit_bytes=1 << 20, base_bytes=0)


def test_what_cannot_be_read_is_said_once_for_all_tasks(engine, run, scenes, tmp_path):
    scenes[0].write_text("no image")
    code, _, err = run("run", tmp_path / "job.toml")
    assert code == 3 and err.count("error:") == 2  # one line of each pass
    assert len((tmp_path / "out" / "results.jsonl").read_text().splitlines()) == 4


def test_an_encoder_is_run_again_for_other_tiles_and_other_outputs(tmp_path):
    asked, shared = [], Shared()

    def run(inputs, outputs):
        asked.append(tuple(outputs))
        return [inputs["tiles"] + i for i, _ in enumerate(outputs)]

    tiles = np.arange(6.0).reshape(1, 6)
    assert shared.run(run, {"tiles": tiles}, ["c3"])[0].tolist() == tiles.tolist()
    shared.keep(("c3", "c4"))
    for _ in range(2):
        assert shared.run(run, {"tiles": tiles.copy()}, ["c4"])[0].tolist() == (tiles + 1).tolist()
        assert shared.run(run, {"tiles": tiles}, ["c3"])[0].tolist() == tiles.tolist()
    assert shared.run(run, {"tiles": tiles + 1}, ["c3"])[0].tolist() == (tiles + 1).tolist()
    shared.run(run, {"tiles": tiles + 1}, ["c5"])
    shared.keep(())
    shared.run(run, {"tiles": tiles + 1}, ["c3"])
    assert asked == [("c3",), ("c3", "c4"), ("c3", "c4"), ("c5",), ("c3",)]


def test_a_task_without_a_head_of_its_own_shares_what_the_encoder_gives(engine, tmp_path, scenes):
    folder = write_bundle(tmp_path / "b", classify=MATCH, search=MATCH)
    session = Session(load_bundle(folder, allow_unsigned=True), Limits(8 << 30))
    vectors = []
    requests = [
        classifying(session.bundle, ["bright", "dark"], lambda *_: None),
        embedding(session.bundle, lambda vector, _: vectors.append(vector)),
    ]
    classes, embedded = session.together(str(scenes[0]), requests)
    assert classes.labels[0][0] == "dark" and embedded.mean_D is not None and vectors
    batches = engine.runs()["eye"]
    session.embed(str(scenes[0]), lambda *_: None)
    assert engine.runs()["eye"] == 2 * batches
