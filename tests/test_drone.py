"""A drone's frame lies where its GPS and gimbal say, or says why it does not."""

from __future__ import annotations

import io
import math
import tarfile

import numpy as np
import pytest
import rasterio
from geographiclib.geodesic import Geodesic
from PIL import Image

from edge_rsvlm.bundle import load_bundle
from edge_rsvlm.errors import InputError
from edge_rsvlm.geo import PixelMapper, metres_per_pixel
from edge_rsvlm.pipeline.detect import DetectQuery
from edge_rsvlm.pipeline.session import Limits, Session
from edge_rsvlm.raster.align import open_aligned
from edge_rsvlm.raster.drone import NOTE, Camera
from edge_rsvlm.raster.inputs import list_inputs
from edge_rsvlm.raster.reader import open_raster
from edge_rsvlm.types import Window
from tests.drone_frames import (
    CAMERA,
    FLIGHT,
    FOCAL_35_MM,
    FOCAL_MM,
    FOCAL_PLANE_UNIT,
    FOCAL_PLANE_X,
    GPS,
    ORIENTATION,
    PIXEL_X,
    PIXEL_Y,
    SIZE,
    ZOOM,
    write_frame,
)  # fmt: skip
from tests.fakes import fake_engine, write_bundle

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
LAT, LON = 47 + 30 / 60 + 12 / 3600, 15 + 36 / 3600
METRES = 100 / (24 / math.hypot(36, 24) * math.hypot(*SIZE))


def placed(path):
    with open_raster(path) as raster:
        return raster.georeference, raster.notes


def seen_from(georeference, xy):
    """(bearing in degrees, metres) from the drone to a pixel."""
    ((lon, lat),) = PixelMapper(georeference).to_lonlat(np.array([xy], float))
    line = Geodesic.WGS84.Inverse(LAT, LON, lat, lon)
    return line["azi1"], line["s12"]


def test_straight_down_by_the_35_mm_equivalent(tmp_path):
    where, notes = placed(write_frame(tmp_path / "a.jpg"))
    assert notes == (NOTE,) and "32633" in where.crs_wkt
    np.testing.assert_allclose(metres_per_pixel(where), METRES, rtol=1e-3)
    assert seen_from(where, (300, 200))[1] < 0.05
    bearing, metres = seen_from(where, (300, 0))
    assert bearing == pytest.approx(0, abs=0.1) and metres == pytest.approx(200 * METRES, rel=1e-3)
    bearing, _ = seen_from(where, (600, 200))
    assert bearing == pytest.approx(90, abs=0.1)


def test_the_sensor_tells_the_focal_length(tmp_path):
    """13.2 mm of sensor for 5472 pixels, 8.8 mm focal length; the frame was made smaller."""
    sensor = {FOCAL_MM: 8.8, FOCAL_PLANE_X: 5472 / 1.32, FOCAL_PLANE_UNIT: 3, PIXEL_X: 5472, PIXEL_Y: 3648}
    wanted = 100 * 13.2 / 8.8 / 600
    for camera in (sensor, sensor | CAMERA, sensor | {FOCAL_PLANE_X: 5472 / 13.2 * 25.4, FOCAL_PLANE_UNIT: 2}):
        where, _ = placed(write_frame(tmp_path / "a.jpg", camera=camera))
        np.testing.assert_allclose(metres_per_pixel(where), wanted, rtol=2e-3)


@pytest.mark.parametrize(
    "flight, top",
    [
        ({"GimbalYawDegree": "+90.0"}, 90),
        ({"GimbalYawDegree": "-135.5"}, -135.5),
        ({"GimbalYawDegree": "30", "GimbalRollDegree": "180.0"}, -150),  # as written when the gimbal passes nadir
    ],
)
def test_the_top_of_the_frame_points_where_the_gimbal_did(tmp_path, flight, top):
    where, _ = placed(write_frame(tmp_path / "a.jpg", flight=FLIGHT | flight))
    assert seen_from(where, (300, 0))[0] == pytest.approx(top, abs=0.2)


def test_the_flight_tells_the_heading_where_the_gimbal_does_not(tmp_path):
    flight = {name: value for name, value in FLIGHT.items() if name != "GimbalYawDegree"}
    where, _ = placed(write_frame(tmp_path / "a.jpg", flight=flight))
    assert seen_from(where, (300, 0))[0] == pytest.approx(12, abs=0.2)


def test_a_slightly_tilted_view_lies_ahead(tmp_path):
    where, (note,) = placed(write_frame(tmp_path / "a.jpg", flight=FLIGHT | {"GimbalPitchDegree": "-82"}))
    bearing, metres = seen_from(where, (300, 200))
    assert bearing == pytest.approx(0, abs=0.5) and metres == pytest.approx(100 * math.tan(math.radians(8)), rel=0.2)
    assert note.startswith(NOTE) and "8 degrees from straight down" in note


def test_rays_meet_the_ground_where_trigonometry_says():
    camera = Camera(0, 0, 50.0, 0, -45.0, 0, 1000.0, (2000, 1000))
    np.testing.assert_allclose(camera.ground(np.array([[1000.0, 500.0]])), [[50, 0]], atol=1e-9)
    below = 45 + math.degrees(math.atan(0.5))
    np.testing.assert_allclose(
        camera.ground(np.array([[1000.0, 1000.0]])), [[50 / math.tan(math.radians(below)), 0]], atol=1e-9
    )
    assert camera.off_nadir_deg == pytest.approx(45)


@pytest.mark.parametrize(
    "changed, why",
    [
        ({"flight": FLIGHT | {"GimbalPitchDegree": "-45.0"}}, "45 degrees from straight down"),
        ({"flight": FLIGHT | {"GimbalPitchDegree": "+12.0"}}, "above the horizon"),
        ({"flight": FLIGHT | {"GimbalPitchDegree": "-79", "GimbalRollDegree": "30"}}, "11 degrees from straight down"),
        ({"flight": FLIGHT | {"RelativeAltitude": "high"}}, "RelativeAltitude"),
        ({"flight": FLIGHT | {"RelativeAltitude": "-3"}}, "-3 m above its take-off"),
        ({"flight": {}}, "RelativeAltitude"),
        ({"flight": {"RelativeAltitude": "100"}}, "GimbalPitchDegree"),
        ({"flight": FLIGHT | {"GimbalYawDegree": "nan"}}, "GimbalYawDegree"),
        ({"camera": {}}, "FocalLengthIn35mmFilm"),
        ({"camera": {FOCAL_35_MM: 0}}, "FocalLengthIn35mmFilm"),
        ({"camera": CAMERA | {FOCAL_MM: 8.8, FOCAL_PLANE_X: 900.0, FOCAL_PLANE_UNIT: 3}}, "contradict"),
        ({"camera": CAMERA | {PIXEL_X: 4000, PIXEL_Y: 4000}}, "cropped"),
        ({"camera": CAMERA | {ZOOM: 2.0}}, "zoomed"),
        ({"base": {ORIENTATION: 6}}, "stored turned"),
        ({"gps": GPS | {2: (0.0, 0.0, 0.0), 4: (0.0, 0.0, 0.0)}}, "no position"),
        ({"gps": GPS | {2: (91.0, 0.0, 0.0)}}, "no position"),
        ({"gps": GPS | {2: (85.0, 0.0, 0.0)}}, "UTM"),
        ({"gps": GPS | {2: (47.503333, 0.0, 0.0)}}, "degrees, minutes and seconds"),
        ({"gps": GPS | {3: "X"}}, "GPSLongitude"),
        ({"gps": {2: (47.0, 30.0, 12.0)}}, "GPSLatitude"),
        ({"xmp": "<x:xmpmeta"}, "its XMP is left out"),
        ({"xmp": "<!DOCTYPE a [<!ENTITY b 'c'>]><a>&b;</a>"}, "document type"),
    ],
)
def test_what_cannot_be_placed_stays_in_pixels_and_says_why(tmp_path, changed, why):
    where, notes = placed(write_frame(tmp_path / "a.jpg", **changed))
    assert where.crs_wkt is None and where.transform is None
    assert why in " ".join(notes) and "pixel coordinates" in notes[-1]


def test_a_picture_of_no_drone_says_nothing(tmp_path):
    where, notes = placed(write_frame(tmp_path / "a.jpg", gps={}, flight={}, xmp=""))
    assert where.crs_wkt is None and notes == ()


def test_a_tiff_with_its_own_coordinates_keeps_them(tmp_path):
    path = tmp_path / "a.tif"
    with rasterio.open(path, "w", driver="GTiff", width=9, height=9, count=1, dtype="uint8", crs="EPSG:32633",
                       transform=rasterio.Affine(1, 0, 5e5, 0, -1, 5e6)) as out:  # fmt: skip
        out.update_tags(EXIF_GPSLatitude="(47) (30) (12)")
    assert placed(str(path))[1] == ()


def test_a_frame_in_an_archive_is_placed_too(tmp_path):
    data = open(write_frame(tmp_path / "a.jpg"), "rb").read()  # noqa: SIM115, PTH123
    with tarfile.open(tmp_path / "frames.tar", "w") as tar:
        member = tarfile.TarInfo("flight/a.jpg")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
    (source,) = list_inputs([str(tmp_path / "frames.tar")])
    with open_raster(source.path, source.name) as raster:
        assert raster.notes == (NOTE,) and raster.georeference.transform is not None


def test_boxes_of_a_frame_lie_on_the_ground_and_carry_the_note(tmp_path):
    image = np.full((SIZE[1], SIZE[0], 3), 50, np.uint8)
    image[190:210, 290:310] = 255
    path = write_frame(tmp_path / "a.jpg", image)
    bundle = load_bundle(write_bundle(tmp_path / "bundle", resolution_m=[0.01, 20.0]), allow_unsigned=True)
    session = Session(bundle, Limits(8 << 30), engine_factory=fake_engine)
    found = []
    outcome = session.detect(path, DetectQuery(), lambda *result: found.append(result))
    assert outcome.warnings == [NOTE]
    ((record, geometry),) = found
    np.testing.assert_allclose(record["box"], [290, 190, 20, 20], atol=2)
    lon, lat = np.mean(geometry["coordinates"][0][:4], axis=0)
    assert Geodesic.WGS84.Inverse(LAT, LON, lat, lon)["s12"] < 3 * METRES


def test_two_frames_are_laid_over_each_other(tmp_path):
    """The drone turned by 180 degrees between them: a mark right of the middle comes to lie left of it."""
    image = np.full((SIZE[1], SIZE[0], 3), 50, np.uint8)
    image[180:220, 380:420] = 250
    before = write_frame(tmp_path / "b.jpg", image, flight=FLIGHT | {"GimbalYawDegree": "180"})
    after = write_frame(tmp_path / "a.jpg")
    with open_raster(after) as later, open_aligned(before, later) as earlier:
        pixels = earlier.read(Window(0, 0, *SIZE))
    bright = np.argwhere(pixels.data_CHW[0] > 150)
    np.testing.assert_allclose(bright.mean(axis=0), [199.5, 199.5], atol=1.5)
    assert pixels.valid_HW[5:-5, 5:-5].all()


def test_pillow_reads_what_the_frames_say(tmp_path):
    """The frames of these tests are what another reader takes them for."""
    exif = Image.open(write_frame(tmp_path / "a.jpg")).getexif()
    assert exif.get_ifd(0x8825)[2] == (47.0, 30.0, 12.0) and exif.get_ifd(0x8769)[FOCAL_35_MM] == 24


def test_frames_that_do_not_lie_on_each_other_are_not_compared(tmp_path):
    rng = np.random.default_rng(0)
    ground = np.kron(rng.integers(0, 255, (60, 80), np.uint8), np.ones((10, 10), np.uint8))
    first, near, far = (
        write_frame(tmp_path / f"{name}.jpg", np.repeat(ground[100 : 100 + SIZE[1], x : x + SIZE[0], None], 3, 2))
        for name, x in (("first", 10), ("near", 13), ("far", 170))
    )
    session = Session(load_bundle(write_bundle(tmp_path / "b"), allow_unsigned=True), Limits(8 << 30), fake_engine)
    outcome = session.change(first, near, lambda *_: None)
    assert outcome.registration.record()["shift_px"] == pytest.approx([3, 0], abs=0.1)
    with pytest.raises(InputError, match="approximate"):
        session.change(first, far, lambda *_: None)
