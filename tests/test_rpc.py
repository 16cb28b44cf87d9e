"""Rasters with rational polynomials: placed at their height, said to be approximate, and never laid over wrongly."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import rasterio
from rasterio.control import GroundControlPoint
from rasterio.rpc import RPC
from rasterio.transform import Affine

from edge_rsvlm.bundle import load_bundle
from edge_rsvlm.errors import InputError
from edge_rsvlm.geo import PixelMapper, affine_through, apply, fitted, metres_per_pixel, spread_over
from edge_rsvlm.pipeline.detect import DetectQuery
from edge_rsvlm.pipeline.session import Limits, Session
from edge_rsvlm.raster.align import open_aligned
from edge_rsvlm.raster.reader import open_raster
from edge_rsvlm.sinks.mask import MaskWriter
from edge_rsvlm.types import Georeference, Window
from tests.fakes import fake_engine, write_bundle
from tests.scenes import UTM, write

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
SIZE = WIDTH, HEIGHT = 200, 100
LON, LAT, HEIGHT_M = 15.0, 47.0, 400.0
LON_SCALE, LAT_SCALE = 0.002, 0.001
"""Degrees of half the raster: a pixel is 2e-5 degrees on both axes."""
ONE = [1.0] + [0.0] * 19


def rpcs(*, bend=0.0, by_height=0.0, shift_px=0.0, **changed):
    """North up: sample grows with longitude, line falls with latitude.

    A height of 100 m above the middle moves samples by ``by_height`` half widths, ``bend`` curves the columns.
    """
    line, sample = [0.0] * 20, [0.0] * 20
    line[2] = -1.0  # latitude
    sample[1], sample[3], sample[8] = 1.0, by_height, bend  # longitude, height, latitude squared
    middle = (WIDTH - 1) / 2 + shift_px, (HEIGHT - 1) / 2  # the centre of the first pixel is 0
    facts = {
        "height_off": HEIGHT_M, "height_scale": 100.0, "lat_off": LAT, "lat_scale": LAT_SCALE, "long_off": LON,
        "long_scale": LON_SCALE, "line_off": middle[1], "line_scale": HEIGHT / 2, "samp_off": middle[0],
        "samp_scale": WIDTH / 2, "line_num_coeff": line, "line_den_coeff": ONE, "samp_num_coeff": sample,
        "samp_den_coeff": ONE,
    }  # fmt: skip
    return RPC(**(facts | changed))


def image(seed=0):
    return np.random.default_rng(seed).integers(20, 200, (3, HEIGHT, WIDTH)).astype(np.uint8)


def raster(path, polynomials, data=None):
    return str(write(path, image() if data is None else data, rpcs=polynomials))


def opened(path):
    with open_raster(path) as found:
        return found.georeference, found.notes


def aligned(before, after):
    with open_raster(after) as later, open_aligned(before, later) as earlier:
        found = earlier.read(Window(0, 0, *SIZE))
        return found.data_CHW, found.valid_HW


def test_places_and_resolution_are_those_of_the_polynomials(tmp_path):
    where, (note,) = opened(raster(tmp_path / "a.tif", rpcs(by_height=0.3)))
    assert "approximate" in note and "400 m" in note and "terrain" in note
    mapper = PixelMapper(where)
    corners = mapper.to_lonlat(np.array([[0, 0], [WIDTH, HEIGHT], [WIDTH / 2, HEIGHT / 2]], float))
    np.testing.assert_allclose(corners, [[14.998, 47.001], [15.002, 46.999], [15.0, 47.0]], atol=1e-9)
    across, down = metres_per_pixel(where)
    assert across == pytest.approx(2e-5 * 111_320 * np.cos(np.radians(47)), rel=5e-3)
    assert down == pytest.approx(2e-5 * 111_170, rel=5e-3)
    # 100 m higher, what is seen in a column lies 0.3 half widths farther west.
    higher = PixelMapper(dataclasses.replace(where, height_m=500.0)).to_lonlat(np.array([[WIDTH / 2, 0.0]]))
    assert higher[0, 0] == pytest.approx(LON - 0.3 * LON_SCALE, abs=1e-9)


@pytest.mark.parametrize(
    "changed",
    [
        {"line_scale": 0.0}, {"lat_off": 1234.0}, {"line_num_coeff": [0.0] * 20}, {"samp_den_coeff": [0.0] * 20},
        {"long_off": float("inf")},
    ],
)  # fmt: skip
def test_polynomials_that_lead_nowhere_leave_pixels_and_say_so(tmp_path, changed):
    where, (note,) = opened(raster(tmp_path / "a.tif", rpcs(**changed)))
    assert where.rpcs is None and where.crs_wkt is None and "pixel coordinates" in note


def test_a_transform_of_its_own_comes_first(tmp_path):
    where, notes = opened(str(write(tmp_path / "a.tif", image(), rpcs=rpcs(), **UTM)))
    assert where.transform == UTM["transform"] and where.rpcs is None and notes == ()


def test_objects_lie_where_the_polynomials_say_and_the_note_travels(tmp_path):
    data = np.full((3, HEIGHT, WIDTH), 50, np.uint8)
    data[:, 40:52, 120:132] = 255
    bundle = load_bundle(write_bundle(tmp_path / "bundle"), allow_unsigned=True)
    session = Session(bundle, Limits(8 << 30), engine_factory=fake_engine)
    found = []
    path = raster(tmp_path / "a.tif", rpcs(), data)
    outcome = session.detect(path, DetectQuery(), lambda *result: found.append(result))
    assert any("approximate" in warning for warning in outcome.warnings)
    ((_, geometry),) = found
    lon, lat = np.mean(geometry["coordinates"][0][:4], axis=0)
    np.testing.assert_allclose([lon, lat], [14.998 + 126 * 2e-5, 47.001 - 46 * 2e-5], atol=2e-5)


# --- two dates ------------------------------------------------------------------------------------------------------


def test_the_same_polynomials_are_one_grid(tmp_path):
    seen, bent = image(1), rpcs(bend=0.2)
    data, valid = aligned(raster(tmp_path / "b.tif", bent, seen), raster(tmp_path / "a.tif", bent))
    np.testing.assert_array_equal(data, seen)
    assert valid.all()


def test_other_polynomials_are_warped_over_each_other_at_one_height(tmp_path):
    """BEFORE looks from the side and names another height, at which its columns would be off by 60 pixels."""
    seen = image(1)
    before = raster(tmp_path / "b.tif", rpcs(by_height=0.3, height_off=200.0, shift_px=10 + 0.3 * 2 * WIDTH / 2), seen)
    data, valid = aligned(before, raster(tmp_path / "a.tif", rpcs()))
    wanted_shift = 10 + 60 + 60  # its own middle, and 200 m of height
    np.testing.assert_array_equal(data[:, :, : WIDTH - wanted_shift], seen[:, :, wanted_shift:])
    assert valid[:, : WIDTH - wanted_shift].all() and not valid[:, WIDTH - wanted_shift + 1 :].any()


def test_polynomials_and_a_transform_are_warped_over_each_other(tmp_path):
    north_up = {"crs": "EPSG:4326", "transform": Affine(2e-5, 0, 14.998, 0, -2e-5, 47.001)}
    seen = image(1)
    plain, by_rpc = str(write(tmp_path / "p.tif", seen, **north_up)), raster(tmp_path / "r.tif", rpcs(), seen)
    for before, after in ((plain, by_rpc), (by_rpc, plain)):
        data, valid = aligned(before, after)
        assert valid.all() and np.abs(data.astype(int) - seen).max() <= 1


def test_a_bent_grid_is_refused_with_the_way_out(tmp_path):
    bent, plain = raster(tmp_path / "b.tif", rpcs(bend=0.2)), raster(tmp_path / "a.tif", rpcs())
    for before, after in ((bent, plain), (plain, bent)):
        with pytest.raises(InputError, match=r"b\.tif.*bend its grid by .* px.*gdalwarp"):
            aligned(before, after)


def test_control_points_of_before_are_heeded(tmp_path):
    """GDAL's warper reads such a file by its pixels when it is given a grid."""
    at, seen = UTM["transform"], image(1)
    points = spread_over(WIDTH, HEIGHT)
    gcps = [
        GroundControlPoint(row=r, col=c, x=x, y=y) for (c, r), (x, y) in zip(points, apply(at, points), strict=True)
    ]
    before = str(write(tmp_path / "b.tif", seen, crs=UTM["crs"], gcps=gcps))
    data, valid = aligned(before, str(write(tmp_path / "a.tif", image(), **UTM)))
    assert valid.all()
    np.testing.assert_array_equal(data, seen)


def test_a_mask_keeps_the_polynomials(tmp_path):
    where, _ = opened(raster(tmp_path / "a.tif", rpcs(by_height=0.3)))
    with MaskWriter(tmp_path / "m.tif", where) as writer:
        writer.write_rows(0, np.ones((HEIGHT, WIDTH), np.uint8))
    with rasterio.open(tmp_path / "m.tif") as mask:
        assert mask.rpcs.samp_num_coeff == rpcs(by_height=0.3).samp_num_coeff and (mask.read(1) == 1).all()
    assert opened(str(tmp_path / "m.tif"))[0] == where


# --- affine transforms ----------------------------------------------------------------------------------------------


def test_the_affine_fit_and_how_far_it_is_off():
    points = np.array([(0, 0), (10, 0), (0, 10), (10, 10)], float)
    transform = Affine(0.5, 0.1, 500_000, -0.2, -0.5, 5_300_000)
    moved = apply(transform, points)
    np.testing.assert_allclose(affine_through(points, moved)[:6], transform[:6], atol=1e-9)
    with pytest.raises(ValueError, match="one line"):
        affine_through(points, points[:, :1] @ np.ones((1, 2)))
    assert fitted(Georeference(10, 10, "x", transform)) == (transform, 0.0)
