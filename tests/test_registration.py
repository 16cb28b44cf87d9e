"""The shift between two dates: measured on made ground whose shift is known, and corrected on the way to the model."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import rasterio
from rasterio.transform import Affine
from rasterio.warp import Resampling, calculate_default_transform, reproject

from edge_rsvlm.budget import MemoryPlan
from edge_rsvlm.bundle import load_bundle
from edge_rsvlm.errors import InputError
from edge_rsvlm.pipeline.change import change
from edge_rsvlm.pipeline.outcome import Outcome
from edge_rsvlm.pipeline.runtime import Pace, Runtime
from edge_rsvlm.pipeline.session import Limits, Session
from edge_rsvlm.pipeline.stream import scene_batches
from edge_rsvlm.pipeline.views import demand, scene_view
from edge_rsvlm.raster.align import open_aligned
from edge_rsvlm.raster.moved import moved_boxes, moved_map, moved_window
from edge_rsvlm.raster.reader import open_raster
from edge_rsvlm.raster.registration import CONFIDENT, LIMIT_PX, correlate, estimate_shift
from edge_rsvlm.raster.shift import STILL, Shift
from edge_rsvlm.types import Window
from tests.fakes import FakeEngine, fake_engine, write_bundle
from tests.scenes import UTM, write

LIMITS = Limits(8 << 30)


def ground(height=300, width=420, dx=(0.0, 0.0), dy=(0.0, 0.0), seed=1, waves=400):
    """A sum of random waves in 0 .. 255, seen at (x + dx[0] + dx[1] * x, y + dy[0] + dy[1] * y): exact at any shift."""
    rng = np.random.default_rng(seed)
    length_px = rng.uniform(5, 40, waves)
    turn = rng.uniform(0, 2 * np.pi, waves)
    phase = rng.uniform(0, 2 * np.pi, waves)
    x, y = np.arange(width) + 0.5, np.arange(height) + 0.5
    x, y = x + dx[0] + dx[1] * x, y + dy[0] + dy[1] * y
    across = np.exp(2j * np.pi * np.outer(np.cos(turn) / length_px, x) + 1j * phase[:, None])
    down = np.exp(2j * np.pi * np.outer(y, np.sin(turn) / length_px))
    return np.clip(128 + 40 * (down @ across).real / np.sqrt(waves / 2), 0, 255)


def colours(plane_HW):
    return np.stack([plane_HW, 0.8 * plane_HW + 10, 0.9 * plane_HW]).astype(np.uint8)


def measured(tmp_path, before_CHW, after_CHW, **options):
    paths = [write(tmp_path / f"{i}.tif", image, **UTM, **options) for i, image in enumerate((before_CHW, after_CHW))]
    with open_raster(str(paths[1])) as later, open_aligned(str(paths[0]), later) as earlier:
        return estimate_shift(earlier, later)


# --- one window -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dx, dy", [(0, 0), (3, -2), (0.3, 0.7), (-1.45, 6.2), (-20, 11.5)])
def test_a_window_tells_its_shift_to_a_twentieth_of_a_pixel(dx, dy):
    """AFTER's (x, y) lies at BEFORE's (x + dx, y + dy)."""
    found = correlate(ground(128, 128), ground(128, 128, (dx, 0), (dy, 0)))
    assert found[:2] == pytest.approx((dx, dy), abs=0.06) and found[2] > CONFIDENT


def test_windows_that_are_not_alike_say_nothing():
    assert correlate(ground(128, 128), ground(128, 128, seed=2))[2] < CONFIDENT
    flat = np.full((128, 128), 7.0)
    assert correlate(flat, flat)[2] < CONFIDENT


def test_light_haze_and_what_is_not_valid_do_not_move_it():
    before, after = ground(128, 128), 0.5 * ground(128, 128, (2.5, 0)) + 90
    after[:40, :50] = np.nan
    assert correlate(before, after)[:2] == pytest.approx((2.5, 0), abs=0.06)
    assert correlate(before, 255 - after)[2] < CONFIDENT  # inverted contrast is no likeness


# --- a scene --------------------------------------------------------------------------------------------------------


def test_a_scene_against_itself_lies_still(tmp_path):
    image = colours(ground())
    shift = measured(tmp_path, image, image)
    assert not shift.corrected and shift.largest_px == 0 and shift.checked
    assert shift.record() == {
        "shift_px": [0.0, 0.0], "windows": 15, "agreeing": 15, "varies": False, "corrected": False,
    }  # fmt: skip


def test_one_shift_is_found_whatever_changed_and_in_any_light(tmp_path):
    before, after = colours(ground()), colours(ground(dx=(1.3, 0), dy=(-2.6, 0)))
    after = np.clip(after * np.array([0.7, 1.1, 0.9])[:, None, None] + 12, 0, 255).astype(np.uint8)
    after[:, :, :140] = colours(ground(seed=5))[:, :, :140]  # a third is another place altogether
    shift = measured(tmp_path, before, after)
    assert shift.at(210.0, 150.0) == pytest.approx((1.3, -2.6), abs=0.06)
    assert shift.corrected and not shift.varies and 6 <= shift.agreeing < shift.windows


def test_a_shift_that_varies_is_a_plane(tmp_path):
    shift = measured(tmp_path, colours(ground()), colours(ground(dx=(-1, 0.01), dy=(2, -0.004))))
    assert shift.varies and shift.agreeing == shift.windows
    for x, y in ((20.0, 20.0), (400.0, 20.0), (210.0, 280.0)):
        assert shift.at(x, y) == pytest.approx((-1 + 0.01 * x, 2 - 0.004 * y), abs=0.12)
    assert shift.record()["shift_px"] == pytest.approx([1.1, 1.4], abs=0.1)


def test_noise_about_one_shift_is_no_plane(tmp_path):
    rng = np.random.default_rng(3)
    dates = [colours(ground(dx=dx)) + rng.normal(0, 12, (3, 300, 420)) for dx in ((0, 0), (1, 0))]
    shift = measured(tmp_path, *(np.clip(date, 0, 255).astype(np.uint8) for date in dates))
    assert not shift.varies and shift.at(0.0, 0.0) == pytest.approx((1, 0), abs=0.1)


def test_what_lies_too_far_off_is_refused_with_the_shift(tmp_path):
    far = LIMIT_PX + 4
    with pytest.raises(InputError, match=r"12\.0 pixels to the right .* 0\.0 below .* up to 8 .*gdal_edit"):
        measured(tmp_path, colours(ground()), colours(ground(dx=(far, 0))))
    near = measured(tmp_path, colours(ground()), colours(ground(dx=(LIMIT_PX - 0.5, 0))))
    assert near.at(0.0, 0.0)[0] == pytest.approx(LIMIT_PX - 0.5, abs=0.06)


@pytest.mark.parametrize("kind", ["small", "other place", "water", "empty"])
def test_where_no_window_is_sure_nothing_is_moved(tmp_path, kind):
    before, after = colours(ground()), colours(ground(dx=(2, 0)))
    if kind == "small":
        before, after = before[:, :100, :100], after[:, :100, :100]
    elif kind == "other place":
        after = colours(ground(seed=9))
    elif kind == "water":
        before[:], after[:] = 30, 31
    else:
        after[:, :, 150:] = 0
        after[:, 120:] = 0
    shift = measured(tmp_path, before, after, **({"nodata": 0} if kind == "empty" else {}))
    assert not shift.checked and not shift.corrected and shift.record()["shift_px"] == [0, 0]


def test_it_is_found_across_another_resolution_and_crs(tmp_path):
    """BEFORE is coarser, in Web Mercator, and its coordinates are wrong by 1.5 m: three pixels of AFTER."""
    after = write(tmp_path / "after.tif", colours(ground()), **UTM)
    with rasterio.open(after) as data:
        a, b, c, d, e, f = data.transform[:6]
        wrong = Affine(a, b, c + 3 * a, d, e, f)
        transform, width, height = calculate_default_transform(
            data.crs, "EPSG:3857", data.width, data.height, *data.bounds, resolution=1.1
        )
        warped = np.zeros((3, height, width), np.uint8)
        reproject(
            data.read(), warped, src_transform=wrong, src_crs=data.crs, dst_transform=transform, dst_crs="EPSG:3857",
            resampling=Resampling.average, dst_nodata=0,
        )  # fmt: skip
    before = write(tmp_path / "before.tif", warped, crs="EPSG:3857", transform=transform, nodata=0)
    with open_raster(str(after)) as later, open_aligned(str(before), later) as earlier:
        shift = estimate_shift(earlier, later)
    assert shift.at(210.0, 150.0) == pytest.approx((3, 0), abs=0.15)


def test_overviews_are_measured_in_pixels_of_the_raster(tmp_path):
    images = (colours(ground(600, 840)), colours(ground(600, 840, (4, 0), (-2, 0))))
    paths = [write(tmp_path / f"{i}.tif", image, **UTM) for i, image in enumerate(images)]
    for path in paths:
        with rasterio.open(path, "r+") as data:
            data.build_overviews([2], Resampling.average)
    with open_raster(str(paths[1])) as later, open_aligned(str(paths[0]), later) as earlier:
        assert estimate_shift(earlier, later, 2).at(0.0, 0.0) == pytest.approx((4, -2), abs=0.15)


# --- moving ---------------------------------------------------------------------------------------------------------


def test_a_shift_in_other_pixels_is_the_same_shift():
    shift = Shift((1.0, 0.01, 0.002), (-2.0, 0.003, 0.004), 9, 9, (200.0, 150.0))
    halved = shift.in_units_of(2.0, 4.0)
    x, y = 120.0, 64.0
    assert np.multiply(halved.at(x / 2, y / 4), (2, 4)) == pytest.approx(shift.at(x, y))
    assert halved.centre_xy == (100, 37.5) and halved.largest_px == pytest.approx(max(abs(halved.corners.ravel())))


def test_windows_boxes_and_maps_are_moved():
    shift = Shift((2.6, 0.0, 0.0), (-1.2, 0.0, 0.0))
    assert moved_window(Window(10, 20, 30, 40), shift, (500, 500)) == Window(9, 15, 37, 47)
    assert moved_window(Window(0, 0, 30, 40), shift, (31, 40)) == Window(0, 0, 31, 40)
    boxes = np.array([[0.0, 0, 8, 8]])
    assert moved_boxes(boxes, shift, (500, 500)).tolist() == [[2.6, -1.2, 10.6, 6.8]]
    assert moved_boxes(boxes, STILL, (500, 500)) is boxes
    whole = Window(0, 0, 200, 150)
    map_HW = np.random.default_rng(0).integers(1, 9, (150, 200)).astype(np.uint8)
    moved = moved_map(map_HW, whole, whole, shift)
    np.testing.assert_array_equal(moved[1:, :197], map_HW[:-1, 3:])
    assert not moved[0].any() and not moved[:, 197:].any()
    part = Window(30, 40, 50, 60)
    np.testing.assert_array_equal(moved_map(map_HW, whole, part, shift), moved[40:100, 30:80])


# --- through the pipeline -------------------------------------------------------------------------------------------


def squares(offset=(0, 0), extra=(), seed=4):
    """Bright squares scattered over dark ground, moved by whole pixels."""
    image = np.full((3, 420, 520), 50, np.uint8)
    for col, row, side in [*np.random.default_rng(seed).integers((0, 0, 6), (500, 400, 16), (260, 3)), *extra]:
        top, left = max(row - offset[1], 0), max(col - offset[0], 0)
        image[:, top : max(row - offset[1] + side, 0), left : max(col - offset[0] + side, 0)] = 240
    return image


@pytest.fixture
def bundle(tmp_path):
    return load_bundle(write_bundle(tmp_path / "bundle"), allow_unsigned=True)


def compared(bundle, before, after):
    found, rows = [], []
    session = Session(bundle, LIMITS, fake_engine)
    outcome = session.change(str(before), str(after), lambda *r: found.append(r), lambda i, r: rows.append(r.copy()))
    return found, outcome, np.concatenate(rows)


def test_a_moved_scene_has_only_its_real_changes_and_where_after_shows_them(tmp_path, bundle):
    """The new square lies at (203, 104) of AFTER, which lies 3 to the right and 2 above of BEFORE's ground."""
    new = (200, 106, 40)
    before = write(tmp_path / "before.tif", squares(), **UTM)
    after = write(tmp_path / "after.tif", squares((-3, 2), [new]), **UTM)
    found, outcome, mask = compared(bundle, before, after)
    assert outcome.record()["registration"]["shift_px"] == pytest.approx([-3, 2], abs=0.05)
    assert any("-3.0 pixels to the right and +2.0 down, which was corrected" in w for w in outcome.warnings)
    assert "register" in outcome.timing_s
    truth = np.zeros(mask.shape, bool)
    truth[104:144, 203:243] = True
    assert not (mask[~truth] == 1).any() and (mask[truth] == 1).mean() > 0.6  # some of it was bright before
    record, _ = max(found, key=lambda r: r[0]["area_px"])
    ring = np.array(record["polygon"]["coordinates"][0])
    assert ring.min(axis=0) == pytest.approx([203, 104], abs=2) and ring.max(axis=0) == pytest.approx([243, 144], abs=2)
    # BEFORE does not reach there.
    assert (mask[:, :3] == 255).all() and (mask[-2:] == 255).all() and outcome.known_px == 517 * 418


def test_what_cannot_be_checked_is_said(tmp_path, bundle):
    image = np.full((3, 200, 200), 90, np.uint8)
    path = write(tmp_path / "a.tif", image, **UTM)
    _, outcome, _ = compared(bundle, path, path)
    assert any("could not be checked" in w for w in outcome.warnings)
    assert outcome.record()["registration"] == {
        "shift_px": [0, 0], "windows": 4, "agreeing": 0, "varies": False, "corrected": False,
    }  # fmt: skip


@pytest.mark.parametrize("batch, read_pixels", [(1, 1), (3, 60_000), (8, 10**7)])
def test_a_shift_gives_the_same_bytes_however_it_is_read(tmp_path, bundle, batch, read_pixels):
    before = write(tmp_path / "before.tif", squares(), **UTM)
    after = write(tmp_path / "after.tif", squares((2, 1), [(60, 60, 50)]), **UTM)
    shift = Shift((2.0, 0.001, 0.0), (1.0, 0.0, -0.0008), 9, 9, (260.0, 210.0))

    def run(batch, read_pixels):
        found, rows = [], []
        with open_raster(str(after)) as later, open_aligned(str(before), later) as earlier:
            task = bundle.manifest.tasks.change
            view = replace(scene_view((earlier, later), task.input, None), shift=shift)
            pace = Pace(MemoryPlan((), batch, read_pixels))
            keep = lambda i, r: rows.append(r.copy())  # noqa: E731
            change(Runtime(bundle, FakeEngine()), task, view, pace, lambda *r: found.append(r), keep)
        return json.dumps(found), np.concatenate(rows).tobytes()

    assert run(batch, read_pixels) == run(2, 90_000)


def test_no_shift_leaves_the_tiles_as_they_were(tmp_path, bundle):
    """A still view cuts the same boxes with the same filter as one date alone does."""
    path = write(tmp_path / "a.tif", squares(), **UTM)
    spec = bundle.manifest.tasks.change.input
    with open_raster(str(path)) as raster:
        pace = Pace(MemoryPlan((), 4, 10**6))
        both, alone = scene_view((raster, raster), spec, None), scene_view((raster,), spec, None)
        with scene_batches(both, pace, Outcome()) as two, scene_batches(alone, pace, Outcome()) as one:
            for pair, single in zip(two, one, strict=True):
                kept = range(len(single))
                for date in pair.dates:
                    np.testing.assert_array_equal(date.pixels_NCHW(kept), single.dates[0].pixels_NCHW(kept))


def test_where_one_date_ends_the_model_sees_an_end_in_both(tmp_path, bundle):
    before, after = squares(), squares()
    before[:, :, :200] = 0
    paths = [write(tmp_path / f"{i}.tif", image, nodata=0, **UTM) for i, image in enumerate((before, after))]
    with open_raster(str(paths[0])) as earlier, open_raster(str(paths[1])) as later:
        view = scene_view((earlier, later), bundle.manifest.tasks.change.input, None)
        with scene_batches(view, Pace(MemoryPlan((), 4, 10**6)), Outcome()) as source:
            for tiles in source:
                first, last = (date.pixels_NCHW(range(len(tiles))) for date in tiles.dates)
                np.testing.assert_array_equal(first, last)
                assert (first[:, :, :, :][np.broadcast_to(first[:, 4:] == 0, first.shape)] == 0).all()


def test_the_plan_counts_what_is_read_beyond_a_window(tmp_path, bundle):
    path = write(tmp_path / "a.tif", squares(), **UTM)
    task = bundle.manifest.tasks.change
    with open_raster(str(path)) as raster:
        two = demand("change", task, scene_view((raster, raster), task.input, None))
        one = demand("detect", bundle.manifest.tasks.detect, scene_view((raster,), task.input, None))
    assert min(two.margin_xy) > LIMIT_PX and one.margin_xy == (0, 0)


def test_disturbed_copies_are_moved_dimmed_and_keep_their_holes(tmp_path, needs):
    needs("scipy")
    needs("torch")
    from edge_rsvlm.export.default.disturbance import GAIN, SHIFT_PX, disturbed

    image = colours(ground())
    image[:, 50:90, 60:100] = 0
    source = write(tmp_path / "a.tif", image, nodata=0, **UTM)
    copy = disturbed(source, tmp_path / "out" / "b.tif", np.random.default_rng(7))
    with open_raster(str(source)) as later, open_aligned(str(copy), later) as earlier:
        shift = estimate_shift(earlier, later)
        whole = earlier.read(Window(0, 0, 420, 300))
    assert 0.1 < shift.largest_px <= SHIFT_PX + 0.1 and shift.agreeing >= 10
    assert (whole.valid_HW[60:80, 70:90] == 0).all() and 0.97 < whole.valid_HW.mean() + 40 * 40 / (300 * 420) < 1
    ratio = whole.data_CHW[:, :, 200:].mean(axis=(1, 2)) / image[:, :, 200:].mean(axis=(1, 2))
    assert (np.abs(ratio - 1) <= GAIN + 0.02).all() and np.ptp(ratio) > 0.01
