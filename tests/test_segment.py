"""Masks for words: the right pixels, whatever the tiles; places, areas, colours and names."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rasterio
from rasterio.features import rasterize
from rasterio.transform import Affine

from edge_rsvlm.budget import MemoryPlan
from edge_rsvlm.bundle import load_bundle
from edge_rsvlm.config.task_specs import SegmentTask
from edge_rsvlm.engines.fake import FakeSession
from edge_rsvlm.pipeline.consume import run_over
from edge_rsvlm.pipeline.runtime import Pace, Runtime
from edge_rsvlm.pipeline.segment import MOST_LABELS, Segments
from edge_rsvlm.pipeline.session import Limits, Session
from edge_rsvlm.pipeline.views import scene_view
from edge_rsvlm.planning import plan_image
from edge_rsvlm.raster.reader import open_raster
from edge_rsvlm.tasks.segment import Segmenter
from tests.scenes import UTM, pixels, write
from tests.wide import LARGE, POOLED, SEGMENT, TEXT, WideEngine, half_bright, runner, use_engine, write_bundle

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
SQUARES = ((40, 32, 40), (228, 100, 56), (120, 240, 24))
"""(col, row, side); one across a border of tiles."""
PIXEL_M2 = 0.25


@pytest.fixture(autouse=True)
def engine(monkeypatch):
    use_engine(monkeypatch)


@pytest.fixture
def bundle(tmp_path):
    return write_bundle(tmp_path / "bundle", segment=SEGMENT)


@pytest.fixture
def run(bundle):
    return runner(bundle)


def scene(ground=128):
    """Bright squares and a dark one on grey ground, which is neither."""
    image = np.full((3, LARGE[1], LARGE[0]), ground, np.uint8)
    for col, row, side in SQUARES:
        image[:, row : row + side, col : col + side] = 255
    image[:, 160:260, 300:380] = 0
    return image


def read(path):
    with rasterio.open(path) as mask:
        return mask.read(1), mask.colormap(1), mask.tags(1), mask.profile


# --- the decoder ----------------------------------------------------------------------------------------------------


def test_scores_are_sigmoids_of_cosines_in_every_cell():
    words = np.array([[3.0, 0.0], [0.0, 2.0]], np.float32)
    text = FakeSession(lambda inputs: {"dense": words[inputs["input_ids"][:, 0]]})
    cells = np.array([[[5.0, 0.0]], [[0.0, 0.0]]], np.float32)[None]  # [N, D, h, w]
    head = FakeSession(lambda inputs: {"embeddings": inputs["c3"]})
    task = SegmentTask.model_validate(SEGMENT | {"text": TEXT | {"output": "dense"}})

    class Texts:
        def encode(self, texts):
            return {"input_ids": np.array([[["trees", "water"].index(t)] for t in texts])}

    segmenter = Segmenter(task, head, text, Texts(), ["trees", "water"])
    embeddings = segmenter.embeddings({"c3": cells, "c4": cells})
    found = segmenter.scores(embeddings[0])
    nothing = 1 / (1 + np.exp(8.0))  # a cell of zeros has no direction
    np.testing.assert_allclose(found[0], [[1 / (1 + np.exp(-2.0)), nothing]], rtol=1e-5)
    np.testing.assert_allclose(found[1], [[nothing, nothing]], rtol=1e-5)


# --- masks and polygons ---------------------------------------------------------------------------------------------


def test_segments_lie_where_they_are_and_have_geodesic_areas(run, tmp_path):
    path = write(tmp_path / "a.tif", scene(), **UTM)
    code, out, err = run("segment", path, "--labels", "bright,dark", "--json", "--mask", tmp_path / "m.tif",
                         "--output", tmp_path / "o.geojson")  # fmt: skip
    record = json.loads(out)
    assert (code, err) == (0, "") and set(record) == {"image", "segments", "labels", "coverage", "timing_ms"}
    found = record["segments"]
    assert [s["label"] for s in found].count("bright") == 3 and [s["label"] for s in found].count("dark") == 1
    sides = sorted(side for _, _, side in SQUARES)
    bright = sorted((s for s in found if s["label"] == "bright"), key=lambda s: s["area_px"])
    for each, side in zip(bright, sides, strict=True):
        assert (side - 2) ** 2 <= each["area_px"] <= (side + 3) ** 2
        # UTM zone 33 at its central meridian shrinks by 0.9996, so areas on the ellipsoid are larger.
        assert each["area_m2"] == pytest.approx(each["area_px"] * PIXEL_M2 / 0.9996**2, rel=2e-4)
        assert 0.5 < each["score"] <= 0.89
    mask, colours, tags, profile = read(tmp_path / "m.tif")
    shares = dict(record["labels"])
    assert [label for label, _ in record["labels"]] == ["dark", "bright"]
    assert shares["dark"] == pytest.approx((mask == 2).mean(), abs=1e-4)
    assert shares["bright"] == pytest.approx((mask == 1).mean(), abs=1e-4)
    assert (profile["dtype"], profile["nodata"], profile["crs"]) == ("uint8", 0, "EPSG:32633")
    assert profile["transform"] == UTM["transform"] and mask.shape == LARGE[::-1]
    assert (tags["LABEL_1"], tags["LABEL_2"]) == ("bright", "dark")
    assert len({colours[k][:3] for k in (0, 1, 2)}) == 3 and colours[0][3] == 0
    features = json.loads((tmp_path / "o.geojson").read_text())["features"]
    assert len(features) == len(found) and {f["properties"]["label"] for f in features} == {"bright", "dark"}
    assert all(14.9 < lon < 15.1 and 47 < lat < 48 for f in features for lon, lat in f["geometry"]["coordinates"][0])


def test_the_mask_is_what_the_polygons_outline(run, tmp_path):
    path = write(tmp_path / "a.tif", scene(), **UTM)
    run_json = json.loads(run("segment", path, "--labels", "dark,bright", "--json", "--mask", tmp_path / "m.tif")[1])
    mask, *_ = read(tmp_path / "m.tif")
    drawn = np.zeros_like(mask)
    for found in run_json["segments"]:
        value = {"dark": 1, "bright": 2}[found["label"]]
        inside = rasterize([found["polygon"]], out_shape=mask.shape, transform=Affine.identity())
        drawn = np.where(inside == 1, value, drawn)
        assert (mask[inside == 1] == value).all() and (inside == 1).sum() == found["area_px"]
    np.testing.assert_array_equal(drawn, mask)


def test_tile_borders_leave_no_trace(run, tmp_path):
    """Away from edges every pixel has the label of the ground, whichever tile owns it."""
    bright = np.zeros((3, 300, 400), np.uint8)
    bright[:, :, 200:] = 255
    path = write(tmp_path / "a.tif", bright, **UTM)
    found = json.loads(run("segment", path, "--labels", "bright,dark", "--json", "--mask", tmp_path / "m.tif")[1])
    mask, *_ = read(tmp_path / "m.tif")
    assert (mask[:, :197] == 2).all() and (mask[:, 203:] == 1).all()
    assert len(found["segments"]) == 2
    unlikely = json.loads(run("segment", path, "--labels", "bright", "--json")[1])
    assert [s["label"] for s in unlikely["segments"]] == ["bright"]
    assert unlikely["labels"][0][1] == pytest.approx(0.5, abs=0.01)


def test_what_is_not_valid_has_no_label_and_no_share(run, tmp_path):
    image = np.full((3, 256, 320), 255, np.uint8)
    image[:, :, 160:] = 7  # nodata
    image[:, 128:, :80] = 0
    path = write(tmp_path / "a.tif", image, nodata=7, **UTM)
    record = json.loads(run("segment", path, "--labels", "bright,dark", "--json", "--mask", tmp_path / "m.tif")[1])
    mask, *_ = read(tmp_path / "m.tif")
    assert (mask[:, 160:] == 0).all() and (mask[:124, :156] == 1).all() and record["coverage"] == 1
    assert dict(record["labels"]) == {"bright": pytest.approx(0.75, abs=0.02), "dark": pytest.approx(0.25, abs=0.02)}
    xs = [x for s in record["segments"] for ring in s["polygon"]["coordinates"] for x, _ in ring]
    assert max(xs) == 160
    empty = write(tmp_path / "empty.tif", np.full((3, 100, 100), 7, np.uint8), nodata=7, **UTM)
    record = json.loads(run("segment", empty, "--labels", "bright", "--json", "--mask", tmp_path / "e.tif")[1])
    assert record["segments"] == [] and record["labels"] == [["bright", 0.0]] and not read(tmp_path / "e.tif")[0].any()


def test_small_segments_are_left_out_of_the_vectors(tmp_path):
    path = write(tmp_path / "a.tif", scene(), **UTM)
    for least in ({"min_area_px": 1000}, {"min_area_m2": 250.0}):
        run = runner(write_bundle(tmp_path / next(iter(least)), segment=SEGMENT | least))
        found = json.loads(run("segment", path, "--labels", "bright", "--json")[1])["segments"]
        assert sorted(s["area_px"] > 1000 for s in found) == [True, True]


def test_results_do_not_depend_on_how_much_is_done_at_once(bundle, tmp_path):
    path = write(tmp_path / "a.tif", scene(), **UTM)
    task, runtime = SegmentTask.model_validate(SEGMENT), Runtime(load_bundle(bundle, allow_unsigned=True), WideEngine())
    found = []
    for batch, read_pixels in ((8, 4 << 20), (1, 1 << 14), (3, 1 << 15)):
        results, rows = [], []
        with open_raster(str(path)) as raster:
            view, pace = scene_view((raster,), task.input, None), Pace(MemoryPlan((), batch, read_pixels))
            segments = Segments(runtime, task, view, ["bright", "dark"], lambda *r, to=results: to.append(r),
                                lambda _, mask, to=rows: to.append(mask))  # fmt: skip
            run_over(view, pace, [segments])
        found.append((results, np.concatenate(rows).tolist()))
    assert found[0] == found[1] == found[2]


def test_degrees_and_no_crs(run, tmp_path):
    at = Affine(1.1e-5, 0, 15.0, 0, -4e-6, 47.5)  # 0.83 m by 0.44 m
    path = write(tmp_path / "a.tif", scene(), crs="EPSG:4326", transform=at)
    (dark,) = json.loads(run("segment", path, "--labels", "dark", "--json")[1])["segments"]
    assert dark["area_m2"] == pytest.approx(dark["area_px"] * 0.8288 * 0.4448, rel=0.01)
    plain = write(tmp_path / "a.png", scene(), "PNG")
    code, out, _ = run("segment", plain, "--labels", "dark", "--json", "--output", tmp_path / "o.geojson")
    (dark,) = json.loads(out)["segments"]
    assert code == 0 and dark["area_m2"] is None and 7900 <= dark["area_px"] <= 8400
    (feature,) = json.loads((tmp_path / "o.geojson").read_text())["features"]
    assert feature["properties"]["crs"] is None


PEAK = """
import sys, resource
sys.path.insert(0, {root!r})
from pathlib import Path
from edge_rsvlm.bundle import load_bundle
from edge_rsvlm.pipeline.session import Limits, Session
from tests.wide import WideEngine
engine = lambda threads, arena: WideEngine()
session = Session(load_bundle(Path({bundle!r}), allow_unsigned=True), Limits(1 << 29), engine_factory=engine)
outcome = session.segment({path!r}, ["bright", "dark"], lambda *r: None, lambda *r: None)
assert outcome.complete and outcome.labels[0][1] > 0.9, outcome.labels
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def test_memory_does_not_grow_with_the_raster(tmp_path):
    spec = SEGMENT["input"] | {"tile_px": 512, "overlap_px": 32}  # fewer tiles, for time
    wide, peaks = write_bundle(tmp_path / "wide", segment=SEGMENT | {"input": spec}), []
    for height in (2048, 3584):
        path = write(tmp_path / f"{height}.tif", half_bright((2048, height), 0), compress="deflate", **UTM)
        code = PEAK.format(root=str(Path(__file__).parents[1]), bundle=str(wide), path=str(path))
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout))
    assert peaks[1] < 1.3 * peaks[0]


# --- the verb -------------------------------------------------------------------------------------------------------


def test_people_read_counts_and_shares_and_folders_take_many(run, tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        write(tmp_path / "in" / f"{name}.tif", scene(), **UTM)
    code, out, _ = run("segment", tmp_path / "in", "--labels", "bright, dark", "--mask", tmp_path / "masks")
    assert code == 0 and len(out.splitlines()) == 2
    assert out.splitlines()[0].endswith("a.tif: 1 dark on 7.0%, 3 bright on 4.8% of the valid area")
    assert run("segment", tmp_path / "in" / "a.tif", "--labels", "[PAD]")[1].endswith("a.tif: nothing found\n")
    assert sorted(p.name for p in (tmp_path / "masks").iterdir()) == ["a.tif", "b.tif"]
    assert run("segment", tmp_path / "in", "--labels", " ,")[0] == 2
    many = ",".join(f"l{i}" for i in range(MOST_LABELS + 1))
    code, _, err = run("segment", tmp_path / "in", "--labels", many)
    assert code == 2 and str(MOST_LABELS) in err


def test_an_experimental_task_says_so_once_and_in_every_record(tmp_path):
    run = runner(write_bundle(tmp_path / "b", segment=SEGMENT | {"experimental": True}))
    for name in ("a.png", "b.png"):
        write(tmp_path / name, pixels((), (200, 144)), "PNG")
    code, out, err = run("segment", tmp_path / "a.png", tmp_path / "b.png", "--labels", "bright", "--json")
    assert code == 0 and err.count("not yet to be relied on") == 1
    assert all("relied on" in json.loads(line)["warnings"][0] for line in out.splitlines())


def test_words_that_were_never_learnt_are_refused(tmp_path):
    folder = write_bundle(tmp_path / "b", segment=SEGMENT)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["tasks"]["segment"]["text"]["vocabulary"] = "answers.txt"  # yes, no, maybe
    (folder / "manifest.json").write_text(json.dumps(manifest))
    path = write(tmp_path / "a.png", pixels((), (200, 144)), "PNG")
    assert runner(folder)("segment", path, "--labels", "yes")[0] == 0
    code, _, err = runner(folder)("segment", path, "--labels", "yes,bright")
    assert code == 2 and "'bright'" in err


def test_a_job_segments_and_plans_count_the_rows(tmp_path):
    folder = write_bundle(tmp_path / "b", segment=SEGMENT, classify=POOLED)
    run = runner(folder)
    write(tmp_path / "a.tif", scene(), **UTM)
    job = ['version = 1', 'tasks = ["segment", "classify"]', 'inputs = ["a.tif"]', 'output = "out"', '[segment]',
           'labels = ["bright", "dark"]', '[classify]', 'labels = ["bright", "dark"]']  # fmt: skip
    (tmp_path / "job.toml").write_text("\n".join(job))
    assert run("run", tmp_path / "job.toml")[0] == 0
    first, second = map(json.loads, (tmp_path / "out" / "results.jsonl").read_text().splitlines())
    assert len(first["segments"]) == 4 and second["labels"][0][0] == "dark"
    assert sorted(p.name for p in (tmp_path / "out" / "segment").iterdir()) == ["a.geojson", "a.tif"]
    (tmp_path / "job.toml").write_text("\n".join([*job[:4], *job[6:]]))
    assert "[segment] with labels" in run("run", tmp_path / "job.toml")[2]
    session = Session(load_bundle(folder, allow_unsigned=True), Limits(8 << 30))
    plans = {
        verb: dict(plan_image(session, str(tmp_path / "a.tif"), verb).plan.items) for verb in ("segment", "classify")
    }
    assert plans["segment"]["results"] - plans["classify"]["results"] >= 2 * 3 * LARGE[0] * 256


def test_a_bundle_without_the_task_says_what_it_can_do(tmp_path):
    run = runner(write_bundle(tmp_path / "b", classify=POOLED))
    path = write(tmp_path / "a.png", half_bright((200, 144), 0.9), "PNG")
    code, _, err = run("segment", path, "--labels", "bright")
    assert code == 2 and "has no segment task, it can do: classify" in err
    assert run("classify", path, "--labels", "bright,dark")[1].startswith(f"{path}: bright")
