"""From a raster to results: the same places and the same bytes, however the raster lies and is read."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import rasterio
from rasterio.control import GroundControlPoint
from rasterio.crs import CRS
from rasterio.transform import Affine
from rasterio.warp import transform

from edge_rsvlm.budget import MemoryPlan
from edge_rsvlm.bundle import load_bundle
from edge_rsvlm.errors import BudgetError, InputError
from edge_rsvlm.geo import PixelMapper, apply, metres_per_pixel
from edge_rsvlm.pipeline.change import change
from edge_rsvlm.pipeline.consume import run_over
from edge_rsvlm.pipeline.detect import DetectQuery, detect
from edge_rsvlm.pipeline.outcome import Deadline, Outcome
from edge_rsvlm.pipeline.prefetch import prefetch
from edge_rsvlm.pipeline.runtime import Pace, Runtime
from edge_rsvlm.pipeline.scaling import radiometry
from edge_rsvlm.pipeline.session import Limits, Session
from edge_rsvlm.pipeline.views import scene_view
from edge_rsvlm.raster.reader import Raster, open_raster
from edge_rsvlm.types import Georeference
from tests.fakes import FakeEngine, fake_engine, write_bundle
from tests.scenes import SIZE, SQUARES, UTM, pixels, write


@pytest.fixture
def bundle(tmp_path):
    return load_bundle(write_bundle(tmp_path / "bundle"), allow_unsigned=True)


def session(bundle, **limits):
    return Session(bundle, Limits(**({"memory_bytes": 8 << 30} | limits)), engine_factory=fake_engine)


def detected(bundle, path, **limits):
    found = []
    outcome = session(bundle, **limits).detect(str(path), DetectQuery(), lambda *result: found.append(result))
    return found, outcome


def squares(found):
    return sorted(tuple(record["box"]) for record, _ in found)


EXPECTED = sorted((float(c), float(r), float(s), float(s)) for c, r, s in SQUARES)

# --- places ---------------------------------------------------------------------------------------------------------

CENTRE = (500_085.0, 5_299_925.0)  # of the scene, in UTM zone 33


def north_up(path, image):
    return write(path, image, **UTM)


def rotated(path, image):
    c, s = np.cos(0.5), np.sin(0.5)
    a, b, d, e = 0.5 * c, 0.5 * s, 0.5 * s, -0.5 * c
    x, y = origin(a, b, d, e)
    return write(path, image, crs="EPSG:32633", transform=Affine(a, b, x, d, e, y))


def origin(a, b, d, e):
    """Puts the middle of the scene at CENTRE."""
    col, row = SIZE[0] / 2, SIZE[1] / 2
    return CENTRE[0] - a * col - b * row, CENTRE[1] - d * col - e * row


def south_up(path, image):
    x, y = origin(0.5, 0, 0, 0.5)
    return write(path, image, crs="EPSG:32633", transform=Affine(0.5, 0, x, 0, 0.5, y))


def degrees(path, image):
    (lon,), (lat,) = transform("EPSG:32633", "EPSG:4326", [CENTRE[0]], [CENTRE[1]])
    step_x, step_y = 1.1e-5, 4e-6  # 0.8 m by 0.45 m
    at = Affine(step_x, 0, lon - step_x * SIZE[0] / 2, 0, -step_y, lat + step_y * SIZE[1] / 2)
    return write(path, image, crs="EPSG:4326", transform=at)


def control_points(path, image):
    at = Affine(0.5, 0.02, 500_000, 0.01, -0.5, 5_300_000)
    seen = np.array(list(itertools.product((0, 170, 340), (0, 150, 300))), float)
    gcps = [GroundControlPoint(row=r, col=c, x=x, y=y) for (c, r), (x, y) in zip(seen, apply(at, seen), strict=True)]
    return write(path, image, crs="EPSG:32633", gcps=gcps)


@pytest.mark.parametrize("lay", [north_up, rotated, south_up, degrees, control_points])
def test_the_same_objects_lie_at_the_same_places(tmp_path, bundle, lay):
    """Objects are put at known places on Earth; each georeferencing shows them at other pixels."""
    plain = Georeference(*SIZE, CRS.from_epsg(32633).to_wkt(), UTM["transform"])
    centres = np.array([(c + s / 2, r + s / 2) for c, r, s in SQUARES])
    places = PixelMapper(plain).to_lonlat(centres)
    path = lay(tmp_path / "scene.tif", pixels(()))
    with open_raster(str(path)) as raster:
        where = raster.georeference
    metres = metres_per_pixel(where)
    side_px = 6 / np.array(metres)
    # Where do these places lie in this raster? By search, so that no inverse of ours is trusted.
    rows, cols = np.mgrid[0 : SIZE[1], 0 : SIZE[0]]
    grid_xy = np.stack([cols.ravel() + 0.5, rows.ravel() + 0.5], axis=1)
    grid_lonlat = PixelMapper(where).to_lonlat(grid_xy)
    stretch = np.array([np.cos(np.radians(places[0, 1])), 1])
    image, shown = pixels(()), []
    for place in places:
        distance = np.linalg.norm((grid_lonlat - place) * stretch, axis=1) * 111_200
        near = grid_xy[distance.argmin()]
        inside = distance.min() < max(metres)
        low = np.floor(near - side_px / 2).astype(int)
        high = np.ceil(near + side_px / 2).astype(int)
        if inside and (low > 0).all() and (high < SIZE).all():
            image[:, low[1] : high[1], low[0] : high[0]] = 255
            shown.append(place)
    assert len(shown) >= 4
    found, _ = detected(bundle, lay(path, image))
    got = []
    for _, geometry in found:
        assert geometry["type"] == "Polygon"
        got.append(np.mean(geometry["coordinates"][0][:4], axis=0))
    assert len(got) == len(shown)
    for place in shown:
        off = np.abs((np.array(got) - place) * stretch * 111_200)
        assert np.linalg.norm(off, axis=1).min() < 2 * max(metres)


def test_boxes_are_exact_where_tiles_are_native(tmp_path, bundle):
    found, outcome = detected(bundle, write(tmp_path / "a.tif", pixels(), **UTM))
    assert squares(found) == EXPECTED
    assert outcome.complete and outcome.coverage == 1


@pytest.mark.parametrize("driver, suffix", [("PNG", "png"), ("GTiff", "tif")])
def test_without_a_crs_boxes_are_pixels(tmp_path, bundle, driver, suffix):
    found, _ = detected(bundle, write(tmp_path / f"a.{suffix}", pixels(), driver))
    assert squares(found) == EXPECTED
    assert found[0][1]["coordinates"][0][0] == found[0][0]["box"][:2]


@pytest.mark.parametrize("overviews", [False, True])
def test_a_finer_raster_is_looked_at_in_the_models_resolution(tmp_path, overviews):
    """Pixels of 0.5 m and a model of 2 m: boxes come back in the raster's own pixels."""
    coarse = load_bundle(write_bundle(tmp_path / "coarse", resolution_m=[2.0, 4.0]), allow_unsigned=True)
    big = [(4 * c, 4 * r, 4 * s) for c, r, s in SQUARES]
    path = write(tmp_path / "a.tif", pixels(big, (4 * SIZE[0], 4 * SIZE[1])), **UTM)
    if overviews:
        with rasterio.open(path, "r+") as data:
            data.build_overviews([2, 4], rasterio.enums.Resampling.average)
    with open_raster(str(path)) as raster:
        assert scene_view((raster,), coarse.manifest.tasks.detect.input, None).decimation == (4 if overviews else 1)
        assert scene_view((raster,), coarse.manifest.tasks.detect.input, 0.5).decimation == 1
    found, _ = detected(coarse, path)
    got = np.array(squares(found))
    np.testing.assert_allclose(got, np.array(EXPECTED) * 4, atol=5)


# --- the same bytes -------------------------------------------------------------------------------------------------


def run_scene(bundle, task, paths, *, batch, read_pixels, threads=1, deadline=None, runtime=None):
    results = []
    runtime = runtime or Runtime(bundle, FakeEngine())
    pace = Pace(MemoryPlan((), batch, read_pixels), threads, deadline or Deadline(None))
    with open_raster(str(paths[0])) as first, open_raster(str(paths[-1])) as last:
        spec = getattr(bundle.manifest.tasks, task)
        if task == "detect":
            view = scene_view((first,), spec.input, None)
            boxes = detect(runtime, spec, view, DetectQuery(), lambda *r: results.append(r))
            run_over(view, pace, [boxes])
            return json.dumps(results), boxes.outcome, []
        rows = []
        view = scene_view((first, last), spec.input, None)
        keep = lambda i, r: rows.append((i, r.copy()))  # noqa: E731
        outcome = change(runtime, spec, view, pace, lambda *r: results.append(r), keep)
        return json.dumps(results), outcome, rows


@pytest.fixture
def dates(tmp_path):
    before = pixels()
    after = pixels(SQUARES[2:])
    after[:, 180:230, 20:90] = 255
    for image in (before, after):
        image[:, 100:160, 200:260] = 0
        image[:, 270:] = 255  # what both dates show alike, so that their radiometry agrees
    options = {"nodata": 0, **UTM}
    return write(tmp_path / "before.tif", before, **options), write(tmp_path / "after.tif", after, **options)


@pytest.mark.parametrize("task", ["detect", "change"])
@pytest.mark.parametrize("batch, read_pixels, threads", [(1, 1, 1), (3, 40_000, 2), (8, 10**7, 2)])
def test_batches_windows_and_threads_do_not_show(bundle, dates, task, batch, read_pixels, threads):
    expected, _, rows = run_scene(bundle, task, dates, batch=2, read_pixels=60_000)
    got, _, other_rows = run_scene(bundle, task, dates, batch=batch, read_pixels=read_pixels, threads=threads)
    assert got == expected and len(json.loads(got)) >= 3
    if task == "change":
        np.testing.assert_array_equal(*(np.concatenate([r for _, r in part]) for part in (rows, other_rows)))
        assert [i for i, _ in rows] == np.cumsum([0, *(len(r) for _, r in rows)])[:-1].tolist()


def test_change_finds_what_came_and_what_went(bundle, dates):
    got, outcome, rows = run_scene(bundle, "change", dates, batch=4, read_pixels=10**6)
    mask = np.concatenate([r for _, r in rows])
    assert mask.shape == (300, 340)
    assert (mask[100:160, 200:260] == 255).all() and (mask == 255).sum() == 60 * 60
    truth = np.zeros((300, 340), bool)
    for c, r, s in SQUARES[:2]:
        truth[r : r + s, c : c + s] = True
    truth[180:230, 20:90] = True
    assert ((mask == 1) != truth).sum() < 60  # the fake answers per two pixels
    areas = sorted(record["area_px"] for record, _ in json.loads(got))
    assert len(areas) == 3 and areas[-1] == pytest.approx(3500, abs=60)
    assert all(record["area_m2"] == pytest.approx(record["area_px"] / 4, rel=2e-3) for record, _ in json.loads(got))
    assert outcome.changed_px == (mask == 1).sum() and outcome.known_px == (mask != 255).sum()


@pytest.mark.parametrize("side_px, told", [(2, 0), (6, 1)])
def test_a_change_of_a_single_cell_is_not_told(tmp_path, bundle, side_px, told):
    before = pixels()
    after = before.copy()
    after[:, 180 : 180 + side_px, 20 : 20 + side_px] = 255
    pair = [write(tmp_path / f"{name}.tif", image, **UTM) for name, image in (("t1", before), ("t2", after))]
    got, outcome, _ = run_scene(bundle, "change", pair, batch=4, read_pixels=10**6)
    assert len(json.loads(got)) == told and outcome.changed_px >= side_px**2


def test_blocks_are_decoded_once_but_for_halos(tmp_path, bundle, monkeypatch):
    path = write(tmp_path / "a.tif", pixels((), (2000, 1500)), **UTM)
    read, original = [], Raster.read
    monkeypatch.setattr(Raster, "read", lambda self, w, d=1: read.append(w.width * w.height) or original(self, w, d))
    run_scene(bundle, "detect", [path], batch=8, read_pixels=1 << 20)
    assert sum(read) < 1.25 * 2000 * 1500


def test_all_nodata_is_covered_and_empty(tmp_path, bundle):
    path = write(tmp_path / "a.tif", np.zeros((3, 200, 200), np.uint8), nodata=0, **UTM)
    found, outcome = detected(bundle, path)
    assert found == [] and outcome.coverage == 1 and outcome.skipped_tiles["nodata"] > 0
    result, outcome, rows = run_scene(bundle, "change", [path], batch=4, read_pixels=10**6)
    assert result == "[]" and (np.concatenate([r for _, r in rows]) == 255).all()


@pytest.mark.parametrize(
    "dtype, brightest, kind",
    [("uint8", 255, "uint8"), ("uint16", 3000, "uint16"), ("int16", 3000, "uint16"), ("int32", 3000, "uint16"),
     ("float32", 1.0, "float32"), ("float32", 255.0, "uint8"), ("float64", 3000.0, "uint16")],
)  # fmt: skip
def test_values_are_scaled_as_their_kind_suggests_and_that_is_said(tmp_path, bundle, dtype, brightest, kind):
    image = pixels(SQUARES, dtype=dtype, bright=brightest)
    path = write(tmp_path / "a.tif", image, **UTM)
    spec, outcome = bundle.manifest.tasks.detect.input, Outcome()
    with open_raster(str(path)) as raster:
        assert radiometry(spec, raster, outcome) == tuple(spec.ranges[kind])
    assert bool(outcome.warnings) == (dtype != kind)
    assert squares(detected(bundle, path)[0]) == EXPECTED


def test_an_image_brighter_than_the_model_knows_is_read_with_a_warning(tmp_path, bundle):
    path = write(tmp_path / "a.tif", pixels(dtype="uint16", bright=60_000), **UTM)
    _, outcome = detected(bundle, path)
    assert any("exceed 4000" in w and "gdal_translate" in w for w in outcome.warnings)


@pytest.mark.parametrize("bands", [1, 2, 4])
def test_gray_and_more_bands(tmp_path, bundle, bands):
    image = pixels(bands=bands)
    options = {"photometric": "MINISBLACK"} | ({"alpha": "yes"} if bands == 2 else {})
    if bands == 2:
        image[1] = 255
    assert squares(detected(bundle, write(tmp_path / "a.tif", image, **options, **UTM))[0]) == EXPECTED


def test_real_edge_cases_are_read(needs, bundle):
    folder = needs("data", "geotiff_edge_cases")
    task = bundle.manifest.tasks.change
    spec = task.input.model_copy(update={"resolution_m": (0.1, 1e5)})
    large = ("cog_cmap", "cog_hirise_mars", "cog_int16", "cog_nodata")
    small = [p for p in sorted(folder.glob("*.tif")) if p.stem not in large]
    assert len(small) == 10
    for path in small:
        rows: list[np.ndarray] = []
        pace = Pace(MemoryPlan((), 8, 1 << 20))
        with open_raster(str(path)) as raster:
            view = scene_view((raster, raster), spec, None)
            runtime = Runtime(bundle, FakeEngine())
            outcome = change(runtime, task, view, pace, lambda *r: None, lambda i, r, rows=rows: rows.append(r))
        mask = np.concatenate(rows)
        assert mask.shape == (raster.georeference.height, raster.georeference.width) and not (mask == 1).any()
        located = PixelMapper(raster.georeference).located
        assert located == ("nonearth" not in path.name and "mars" not in path.name)
        assert any("not on Earth" in w for w in outcome.warnings) != located


# --- limits ---------------------------------------------------------------------------------------------------------


class Slow(FakeEngine):
    """Each batch takes a tenth of a second."""

    def open(self, graph):
        inner = super().open(graph)
        run, seconds = inner.run, 0.1 if graph.name == "encoder.onnx" else 0
        inner.run = lambda inputs, outputs: time.sleep(seconds) or run(inputs, outputs)
        return inner


@pytest.mark.parametrize("task", ["detect", "change"])
def test_a_deadline_gives_part_of_the_result_in_time(bundle, dates, task):
    begun = time.monotonic()
    runtime = Runtime(bundle, Slow())
    _, outcome, rows = run_scene(bundle, task, dates, batch=1, read_pixels=1, deadline=Deadline(1.0), runtime=runtime)
    assert time.monotonic() - begun < 1.3
    assert not outcome.complete and 0 < outcome.coverage < 1 and outcome.skipped_tiles["deadline"] > 0
    if task == "change":
        assert sum(len(r) for _, r in rows) == 300  # the mask is whole; what was not seen is not known


def test_no_time_at_all_is_no_error(bundle, dates):
    result, outcome, _ = run_scene(bundle, "detect", dates, batch=1, read_pixels=1, deadline=Deadline(0.0))
    assert result == "[]" and outcome.coverage == 0


def test_what_does_not_fit_is_refused_before_any_pixel_is_read(tmp_path, bundle, monkeypatch):
    path = write(tmp_path / "a.tif", pixels(dtype="float32", bright=1), **UTM)
    monkeypatch.setattr(Raster, "read", lambda *a: pytest.fail("read a pixel"))
    with pytest.raises(BudgetError, match="--memory"):
        detected(bundle, path, memory_bytes=1 << 20)


def test_a_failure_of_the_engine_stops_the_reader(tmp_path, bundle):
    class Broken(FakeEngine):
        def open(self, graph):
            raise InputError("no", fix="none")

    before = threading.active_count()
    path = write(tmp_path / "a.tif", pixels((), (1500, 1500)), **UTM)
    with pytest.raises(InputError):
        run_scene(bundle, "detect", [path], batch=1, read_pixels=1, runtime=Runtime(bundle, Broken()))
    assert threading.active_count() == before


def test_prefetch_keeps_order_bounds_and_errors():
    made = []

    def items():
        for i in range(20):
            made.append(i)
            yield i
        raise InputError("broken at the end", fix="none")

    source = prefetch(items(), 2)
    assert next(source) == 0
    time.sleep(0.3)
    assert len(made) <= 5  # one taken, two waiting, one in hand, and one being made
    with pytest.raises(InputError, match="broken"):
        assert list(itertools.islice(source, 19)) == list(range(1, 20)) and next(source)
    assert not any(t.name == "prefetch" for t in threading.enumerate())


def test_a_block_broken_in_the_middle_of_a_scene_is_an_input_error(tmp_path, bundle):
    rng = np.random.default_rng(0)
    path = write(tmp_path / "a.tif", rng.integers(0, 255, (3, 600, 600), dtype=np.uint8), compress="deflate", **UTM)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 20_000] = bytes(20_000)
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"a\.tif: cannot be read"):
        detected(bundle, path)


PEAK = """
import sys, resource
sys.path.insert(0, {root!r})
from pathlib import Path
from edge_rsvlm.bundle import load_bundle
from edge_rsvlm.pipeline.detect import DetectQuery
from edge_rsvlm.pipeline.session import Limits, Session
from tests.fakes import FakeEngine, fake_engine
session = Session(load_bundle(Path({bundle!r}), allow_unsigned=True), Limits(1 << 29), engine_factory=fake_engine)
outcome = session.{task}
assert outcome.complete
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.parametrize("task", ["detect", "change"])
def test_memory_does_not_grow_with_the_raster(tmp_path, task):
    peaks = []
    wide = write_bundle(tmp_path / "wide", tile_px=512, overlap_px=32)  # fewer tiles, for time
    for height in (2048, 3584):
        path = str(write(tmp_path / f"{height}.tif", pixels((), (2048, height)), compress="deflate", **UTM))
        calls = {"detect": f"detect({path!r}, DetectQuery(), lambda *r: None)",
                 "change": f"change({path!r}, {path!r}, lambda *r: None)"}  # fmt: skip
        code = PEAK.format(root=str(Path(__file__).parents[1]), bundle=str(wide), task=calls[task])
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout))
    assert peaks[1] < 1.3 * peaks[0]
