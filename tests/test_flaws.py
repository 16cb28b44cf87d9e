"""Clouds, their shadows and saturation: found where they are, nowhere else, whatever window is read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import rasterio

import edge_rsvlm
from edge_rsvlm.bundle import load_bundle
from edge_rsvlm.pipeline.outcome import Outcome
from edge_rsvlm.pipeline.scaling import find_flaws
from edge_rsvlm.pipeline.session import Limits, Session
from edge_rsvlm.raster.flaws import CLOUD, SATURATED, SHADOW, Flaws, Optics, cloudy, filled, grown, shaded
from edge_rsvlm.raster.reader import open_raster
from edge_rsvlm.raster.shift import STILL, Shift
from edge_rsvlm.types import Georeference, Pixels, Window
from tests.fakes import fake_engine, parsed, write_bundle
from tests.scenes import UTM, pixels, write

BGRN = Optics((0, 1, 2), (0, 1, 2, 3), 20_000, 1e-4)
LOOK = Flaws(BGRN, BGRN, (10.0, 10.0))
SIZE = 400
"""Pixels of 10 m."""


def land(seed=0):
    """Counts of reflectance of fields: blue, green, red and near infrared, uneven as fields are."""
    rng = np.random.default_rng(seed)
    field = np.kron(rng.uniform(0.7, 1.3, (1, SIZE // 20, SIZE // 20)), np.ones((1, 20, 20)))
    colours = np.array([700, 800, 900, 3000])[:, None, None]
    return (colours * field * rng.uniform(0.95, 1.05, (1, SIZE, SIZE))).astype(np.uint16)


def with_cloud(image, col, row, radius, thick=0.9, white=7000):
    """A blob whose edges thin out over a third of its radius."""
    y, x = np.mgrid[: image.shape[1], : image.shape[2]]
    share = thick * np.clip((radius - np.hypot(x - col, y - row)) / (radius / 3), 0, 1)
    return (image * (1 - share) + white * share).astype(image.dtype)


def of(image, window=None):
    window = window or Window(0, 0, image.shape[2], image.shape[1])
    part = image[:, window.row : window.row + window.height, window.col : window.col + window.width]
    return Pixels(part, np.ones(part.shape[1:], np.uint8), window, Georeference(image.shape[2], image.shape[1]))


# --- the tests of a pixel -------------------------------------------------------------------------------------------


def test_bright_white_haze_is_cloudy_and_ground_is_not():
    colours = {
        "cloud": ((0.5, 0.5, 0.5, 0.55), True),
        "thin cloud": ((0.25, 0.22, 0.21, 0.3), True),
        "sand": ((0.2, 0.27, 0.36, 0.42), False),
        "field": ((0.07, 0.09, 0.06, 0.4), False),
        "water": ((0.1, 0.08, 0.05, 0.03), False),
    }
    dark = np.full((4, 1, 1), 0.08, np.float32)
    for name, (values, expected) in colours.items():
        pixel = np.array(values, np.float32)[:, None, None]
        assert cloudy(pixel, dark).item() is expected, name
        assert not cloudy(pixel, pixel).any(), f"{name} on both dates is ground"


def test_a_shadow_is_darker_in_all_light_and_bare_soil_is_not_one():
    field = np.array([0.07, 0.09, 0.06, 0.4], np.float32)[:, None, None]
    shadow, ploughed = field * 0.4, np.array([0.1, 0.12, 0.14, 0.2], np.float32)[:, None, None]
    assert shaded(shadow, field).all() and not shaded(ploughed, field).any() and not shaded(field, shadow).any()


def test_squares_are_summed_as_they_say():
    mask = np.random.default_rng(2).random((37, 53)) < 0.5
    for half_x, half_y in ((1, 4), (20, 3), (60, 63)):
        share, near = np.zeros(mask.shape), np.zeros(mask.shape, bool)
        for row, col in np.ndindex(*mask.shape):
            box = mask[max(row - half_y, 0) : row + half_y + 1, max(col - half_x, 0) : col + half_x + 1]
            share[row, col], near[row, col] = box.mean(), box.any()
        np.testing.assert_array_equal(filled(mask, (half_x, half_y), 0.5), share >= 0.5 - 1e-6)
        np.testing.assert_array_equal(grown(mask, (half_x, half_y)), near)
    large = np.ones((300, 300), bool)  # sums that need all of 16 bits
    assert filled(large, (127, 127), 1.0).all()


# --- clouds and shadows ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cloudy_date", [0, 1])
def test_a_cloud_on_either_date_is_found_with_its_edges(cloudy_date):
    dates = [land(), land()]
    dates[cloudy_date] = with_cloud(dates[cloudy_date], 200, 150, 40)
    found = LOOK.find(*map(of, dates), STILL)
    changed = np.abs(dates[0].astype(int) - dates[1]).max(axis=0) > 100
    assert (found[changed] == CLOUD).all() and set(np.unique(found)) == {0, CLOUD}
    assert (found == CLOUD).mean() < 3 * changed.mean()


def test_roofs_and_what_is_white_on_both_dates_stay():
    before, after = land(), land()
    after[:, 100:112, 100:125] = 6000  # a new hall of 250 m by 120 m
    before, after = (with_cloud(date, 250, 250, 60) for date in (before, after))  # a salt lake
    assert not LOOK.find(of(before), of(after), STILL).any()


def test_a_shadow_near_its_cloud_is_found_and_darkness_elsewhere_is_not():
    before, after = land(), with_cloud(land(), 120, 120, 40)
    after[:, 200:230, 190:220] = after[:, 200:230, 190:220] * 0.4
    after[:, 350:380, 350:380] = after[:, 350:380, 350:380] * 0.4
    found = LOOK.find(of(before), of(after), STILL)
    assert (found[202:228, 192:218] == SHADOW).all() and not found[300:, 300:].any()
    assert (found == SHADOW).sum() < 45 * 45
    alone = land()
    alone[:, 200:230, 190:220] = alone[:, 200:230, 190:220] * 0.4
    assert not LOOK.find(of(before), of(alone), STILL).any()


def test_it_depends_on_no_window():
    before, after = land(), with_cloud(with_cloud(land(), 120, 120, 40), 300, 60, 25)
    after[:, 170:200, 150:180] = after[:, 170:200, 150:180] * 0.4
    whole = LOOK.find(of(before), of(after), STILL)
    (x, y), inner = LOOK.reach_xy(), Window(150, 160, 60, 50)
    assert x == y and {CLOUD, SHADOW} <= set(np.unique(whole[160:210, 150:210])) | {CLOUD}
    wide = Window(max(inner.col - x, 0), max(inner.row - y, 0), inner.width + 2 * x, inner.height + 2 * y)
    found = LOOK.find(of(before, wide), of(after, wide), STILL)
    rows, cols = inner.row - wide.row, inner.col - wide.col
    np.testing.assert_array_equal(found[rows : rows + inner.height, cols : cols + inner.width], whole[160:210, 150:210])
    assert whole[160:210, 150:210].any()


def test_a_date_that_was_moved_is_compared_where_it_shows_the_ground():
    image = with_cloud(land(), 200, 200, 60)  # the same white lake on both dates, seven pixels apart
    before, after = image, np.roll(image, 7, axis=2)
    assert LOOK.find(of(before), of(after), STILL).any()
    assert not LOOK.find(of(before), of(after), Shift((-7.0, 0.0, 0.0), (0.0, 0.0, 0.0), 9, 9))[:, 8:].any()


def test_what_is_not_valid_in_both_dates_is_no_flaw_and_hides_none():
    before, after = land(), with_cloud(land(), 200, 150, 40)
    valid_HW = np.ones((SIZE, SIZE), np.uint8)
    valid_HW[:, :200] = 0
    found = LOOK.find(replace(of(before), valid_HW=valid_HW), of(after), STILL)
    assert (found[140:160, 205:225] == CLOUD).all()


# --- saturation -----------------------------------------------------------------------------------------------------


def test_saturation_on_both_dates_or_over_more_than_a_roof():
    eight = Optics((0, 1, 2), None, 255)
    before, after = (np.full((3, 300, 300), 90, np.uint8) for _ in range(2))
    before[:, 10:20, 10:20] = after[:, 10:20, 10:20] = 255
    before[:2, 40:50, 10:20] = after[:2, 40:50, 10:20] = 255  # two bands of three
    before[:1, 70:80, 10:20] = after[:1, 70:80, 10:20] = 255
    after[:, 10:20, 60:70] = 255  # a roof that is new
    after[:, 150:220, 150:220] = 255  # a cloud
    found = Flaws(eight, eight, (5.0, 5.0)).find(of(before), of(after), STILL)
    assert (found[10:20, 10:20] == SATURATED).all() and (found[40:50, 10:20] == SATURATED).all()
    assert not found[70:80, 10:20].any() and not found[10:20, 60:70].any()
    assert (found[150:220, 150:220] == SATURATED).all()
    for metres in ((0.3, 0.3), None):  # where a roof cannot be told from a cloud by its size
        fine = Flaws(eight, eight, metres)
        assert fine.reach_xy() == (0, 0) and not fine.find(of(before), of(after), STILL)[150:220, 150:220].any()


# --- what is looked for ---------------------------------------------------------------------------------------------


def looks(tmp_path, dtype, bands=4, metres=10.0, **options):
    image = np.full((bands, 90, 90), 0.1 if dtype == "float32" else 100, dtype)
    transform = rasterio.Affine(metres, 0, 500_000, 0, -metres, 5_300_000)
    path = write(tmp_path / "a.tif", image, **({"crs": "EPSG:32633", "transform": transform} | options))
    with open_raster(str(path)) as raster:
        return find_flaws(parsed().tasks.change.input, (raster, raster), np.ones(2), Outcome())


@pytest.mark.parametrize(
    "dtype, bands, metres, expected",
    [("uint16", 4, 10, True), ("float32", 4, 30, True), ("uint16", 4, 1.2, False), ("uint8", 4, 10, False),
     ("uint16", 3, 10, False)],
)  # fmt: skip
def test_clouds_are_looked_for_in_reflectance_of_four_bands_and_coarse_pixels(tmp_path, dtype, bands, metres, expected):
    look = looks(tmp_path, dtype, bands, metres)
    assert look.clouds is expected and ("cloud" in look.reasons) is expected and "saturated" in look.reasons
    assert (min(look.reach_xy()) > 40) is expected


def test_without_a_place_nothing_is_known_of_size(tmp_path):
    assert not looks(tmp_path, "uint16", crs=None, transform=None).coarse


# --- through the pipeline -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scene():
    """Hong Kong, packaged: real ground of 10 m in four bands."""
    with rasterio.open(Path(edge_rsvlm.__file__).parent / "scenes" / "hongkong_2018.tif") as data:
        yield data


@pytest.mark.parametrize("cloudy_date", [0, 1])
def test_a_cloud_on_real_ground_gives_no_alert(tmp_path, scene, cloudy_date):
    """The packaged model sees a change where the cloud is, and none once it is masked."""
    clear = scene.read()
    cloud = with_cloud(clear, 120, 110, 45, white=6500)
    paths = []
    for name, image in (("clear", clear), ("cloud", cloud)):
        path = write(tmp_path / f"{name}.tif", image, crs=scene.crs, transform=scene.transform)
        with rasterio.open(path, "r+") as out:
            out.descriptions = scene.descriptions
        paths.append(str(path))
    before, after = paths if cloudy_date == 1 else paths[::-1]
    found, rows = [], []
    session = Session(load_bundle(), Limits(8 << 30))
    outcome = session.change(before, after, lambda *r: found.append(r), lambda i, r: rows.append(r.copy()))
    masked = outcome.record()["masked_px"]
    assert found == [] and outcome.changed_px == 0
    assert masked["cloud"] > 2000 and masked["saturated"] == 0
    assert (np.concatenate(rows) == 255).sum() == sum(masked.values())
    assert outcome.known_px + sum(masked.values()) == clear.shape[1] * clear.shape[2]


def test_reasons_that_were_not_looked_for_are_null_and_others_counted(tmp_path):
    bundle = load_bundle(write_bundle(tmp_path / "bundle"), allow_unsigned=True)
    path = str(write(tmp_path / "a.tif", pixels(), **UTM))
    outcome = Session(bundle, Limits(8 << 30), fake_engine).change(path, path, lambda *_: None)
    bright = int((pixels()[0] == 255).sum())
    assert outcome.record()["masked_px"] == {"cloud": None, "shadow": None, "saturated": bright}
    assert outcome.known_px == 340 * 300 - bright and outcome.coverage == 1
