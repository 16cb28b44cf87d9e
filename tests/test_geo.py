"""Places on Earth, against values known from elsewhere."""

from __future__ import annotations

import numpy as np
import pytest
from rasterio.crs import CRS
from rasterio.transform import Affine

from edge_rsvlm.geo import PixelMapper, apply, area_m2, box_ring, feature_geometry, metres_per_pixel, on_earth
from edge_rsvlm.types import Georeference, GroundControlPoint


def lonlat(transform, size=(360, 180), epsg=4326):
    return Georeference(*size, CRS.from_epsg(epsg).to_wkt(), transform)


WORLD = lonlat(Affine(1, 0, -180, 0, -1, 90))


def ring(x0, y0, x1, y1):
    return box_ring(np.array([x0, y0, x1, y1], float))


def signed_area(points):
    x, y = np.array(points).T
    return (x[:-1] * y[1:] - x[1:] * y[:-1]).sum()


def test_metres_of_a_degree_on_the_equator_and_at_sixty_north():
    equator = lonlat(Affine(1e-4, 0, 10, 0, -1e-4, 5e-3), (100, 100))
    assert metres_per_pixel(equator) == pytest.approx((11.1319, 11.0574), abs=1e-3)
    north = lonlat(Affine(1e-4, 0, 10, 0, -1e-4, 60.005), (100, 100))
    assert metres_per_pixel(north) == pytest.approx((5.5800, 11.1412), abs=1e-3)


def test_web_mercator_metres_are_not_ground_metres():
    transform = Affine(10, 0, 0, 0, -10, 8_399_738 + 500)  # 60 degrees north, where the projection doubles lengths
    x, y = metres_per_pixel(lonlat(transform, (100, 100), 3857))
    assert x == pytest.approx(5.01, abs=0.01) and y == pytest.approx(4.99, abs=0.02)


def test_rotation_does_not_change_the_size_of_a_pixel():
    c, s = np.cos(0.6), np.sin(0.6)
    turned = Affine(2 * c, 3 * s, 5e5, 2 * s, -3 * c, 5.3e6)
    x, y = metres_per_pixel(lonlat(turned, (100, 100), 32633))
    assert (x, y) == pytest.approx((2, 3), rel=1e-3)


def test_area_of_one_degree_at_the_equator_and_of_a_hole():
    mapper = PixelMapper(WORLD)
    # A cell of graticule, whose sides are parallels, from the authalic latitude of WGS 84.
    assert area_m2([ring(180, 89, 181, 90)], mapper) == pytest.approx(12_309.0e6, rel=2e-4)
    whole = area_m2([ring(10, 40, 20, 50)], mapper)
    assert area_m2([ring(10, 40, 20, 50), ring(12, 42, 15, 45)], mapper) == pytest.approx(
        whole - area_m2([ring(12, 42, 15, 45)], mapper)
    )
    assert area_m2([ring(0, 0, 1, 1)], PixelMapper(None)) is None


def test_a_long_side_follows_its_parallel():
    """The zone between 30 and 60 degrees north over 90 degrees of longitude; a great circle would bulge to the pole."""
    fine = lonlat(Affine(0.1, 0, -180, 0, -0.1, 90), (3600, 1800))
    zone = area_m2([ring(0, 300, 900, 600)], PixelMapper(fine))
    assert zone == pytest.approx(0.25 * 93_442_000e6, rel=2e-3)


@pytest.mark.parametrize("south_up", [False, True])
def test_exteriors_wind_counter_clockwise_and_holes_clockwise(south_up):
    transform = Affine(1, 0, -180, 0, 1, -90) if south_up else WORLD.transform
    geometry = feature_geometry([ring(10, 40, 20, 50), ring(12, 42, 15, 45)], PixelMapper(lonlat(transform)))
    exterior, hole = geometry["coordinates"]
    assert signed_area(exterior) > 0 > signed_area(hole)
    assert exterior[0] == exterior[-1] and hole[0] == hole[-1]


def test_seven_decimals():
    mapper = PixelMapper(lonlat(Affine(1 / 3, 0, 7, 0, -1 / 3, 50)))
    for lon, lat in feature_geometry([ring(1, 1, 2, 2)], mapper)["coordinates"][0]:
        assert lon == round(lon, 7) and lat == round(lat, 7)
    assert feature_geometry([ring(1, 1, 2, 2)], mapper)["coordinates"][0][0][0] == pytest.approx(7 + 1 / 3, abs=1e-7)


@pytest.mark.parametrize("west", [170, -190])
def test_a_box_over_the_antimeridian_is_cut_in_two(west):
    mapper = PixelMapper(lonlat(Affine(1, 0, west, 0, -1, 10), (20, 20)))
    geometry = feature_geometry([ring(8, 2, 13, 4)], mapper)
    assert geometry["type"] == "MultiPolygon"
    spans = sorted((min(p[0] for p in part[0]), max(p[0] for p in part[0])) for part in geometry["coordinates"])
    assert spans == [(-180, -177), (178, 180)]
    assert all(signed_area(part[0]) > 0 for part in geometry["coordinates"])
    east = feature_geometry([ring(11, 2, 13, 4)], mapper)
    assert east["type"] == "Polygon" and min(p[0] for p in east["coordinates"][0]) == -179


def test_an_utm_box_over_the_antimeridian_is_cut_in_two():
    mapper = PixelMapper(lonlat(Affine(1000, 0, 790_000, 0, -1000, 200_000), (100, 100), 32660))
    geometry = feature_geometry([ring(0, 0, 100, 50)], mapper)
    assert geometry["type"] == "MultiPolygon" and len(geometry["coordinates"]) == 2


MARS = 'GEOGCS["Mars",DATUM["D",SPHEROID["Mars",3396190,169.8]],PRIMEM["R",0],UNIT["degree",0.0174532925199433]]'
LOCAL = 'LOCAL_CS["site",UNIT["metre",1]]'


@pytest.mark.parametrize("wkt", [MARS, LOCAL])
def test_a_crs_that_is_not_on_earth_gives_pixels_and_a_warning(wkt):
    mapper = PixelMapper(Georeference(10, 10, wkt, Affine.scale(2, -2)))
    assert not mapper.located and "not on Earth" in mapper.warning
    assert feature_geometry([ring(1, 2, 3, 4)], mapper)["coordinates"][0][0] == [1, 2]
    assert metres_per_pixel(Georeference(10, 10, wkt, Affine.scale(2, -2))) is None


@pytest.mark.parametrize("epsg", [4326, 4269, 3857, 32633, 28992, 2154, 3413, 3031, 27700])
def test_common_systems_are_on_earth(epsg):
    assert on_earth(CRS.from_epsg(epsg).to_wkt())


def test_a_crs_without_a_transform_is_not_located():
    mapper = PixelMapper(Georeference(10, 10, CRS.from_epsg(32633).to_wkt()))
    assert not mapper.located and "no transform" in mapper.warning


def test_a_corner_off_the_disk_has_no_place():
    geos = CRS.from_proj4("+proj=geos +h=35785831 +lon_0=0 +sweep=y +a=6378137 +b=6356752.314").to_wkt()
    mapper = PixelMapper(Georeference(100, 100, geos, Affine(1.1e5, 0, -5.5e6, 0, -1.1e5, 5.5e6)))
    assert feature_geometry([ring(0, 0, 2, 2)], mapper) is None and area_m2([ring(0, 0, 2, 2)], mapper) is None
    assert feature_geometry([ring(49, 49, 51, 51)], mapper) is not None


def test_control_points_map_as_the_transform_they_sample():
    transform = Affine(0.4, 0.1, 500_000, 0.15, -0.5, 5_300_000)
    wkt = CRS.from_epsg(32633).to_wkt()
    seen = np.array([[c, r] for c in (0, 50, 100) for r in (0, 40, 80)], float)
    points = tuple(GroundControlPoint(*p, *q) for p, q in zip(seen, apply(transform, seen), strict=True))
    xy = np.array([[3.5, 7.25], [99, 80]])
    by_points = PixelMapper(Georeference(100, 80, wkt, None, points)).to_lonlat(xy)
    by_transform = PixelMapper(Georeference(100, 80, wkt, transform)).to_lonlat(xy)
    np.testing.assert_allclose(by_points, by_transform, atol=1e-9)
