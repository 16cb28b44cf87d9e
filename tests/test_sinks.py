"""Files that appear whole or not at all."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import rasterio
from rasterio.crs import CRS
from rasterio.transform import Affine

from edge_rsvlm.errors import UsageError
from edge_rsvlm.sinks.geojson import GeoJsonWriter
from edge_rsvlm.sinks.mask import MaskWriter
from edge_rsvlm.sinks.records import RecordSpool
from edge_rsvlm.types import Georeference, GroundControlPoint

POINT = {"type": "Point", "coordinates": [1.5, 2.5]}
WKT = CRS.from_epsg(32633).to_wkt()


@pytest.mark.parametrize("count", [0, 1, 3])
def test_geojson_is_a_feature_collection_without_crs_member(tmp_path, count):
    path = tmp_path / "größe.geojson"
    with GeoJsonWriter(path, properties={"image": "münchen.tif"}, located=True) as writer:
        for i in range(count):
            writer.write(POINT, {"score": i})
        assert not path.exists()
    data = json.loads(path.read_text(encoding="utf-8"))
    assert data.keys() == {"type", "features"} and data["type"] == "FeatureCollection"
    assert [f["properties"] for f in data["features"]] == [{"image": "münchen.tif", "score": i} for i in range(count)]
    assert all(f.keys() == {"type", "geometry", "properties"} for f in data["features"])
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_geojson_says_when_it_is_not_located_and_when_a_feature_has_no_place(tmp_path):
    with GeoJsonWriter(tmp_path / "a.geojson", properties={}, located=False) as writer:
        writer.write(None, {"n": 1})
    (feature,) = json.loads((tmp_path / "a.geojson").read_text())["features"]
    assert feature["geometry"] is None and feature["properties"] == {"crs": None, "n": 1}


def geojson(path):
    return GeoJsonWriter(path, properties={}, located=True)


def mask(path):
    return MaskWriter(path, Georeference(10, 10))


@pytest.mark.parametrize("writer", [geojson, mask])
def test_an_error_leaves_nothing_and_keeps_what_was_there(tmp_path, writer):
    path = tmp_path / "out"
    path.write_text("before")
    with pytest.raises(KeyError), writer(path):
        raise KeyError("stop")
    assert path.read_text() == "before" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("writer", [geojson, mask])
def test_a_folder_that_is_not_there_is_one_clear_error(tmp_path, writer):
    with pytest.raises(UsageError, match=r"cannot write .*; choose"), writer(tmp_path / "no" / "out"):
        pass


@pytest.mark.parametrize("step", [1, 100, 256, 600])
def test_mask_bytes_do_not_depend_on_the_bands(tmp_path, step):
    rows_HW = np.random.default_rng(0).integers(0, 2, (600, 300)).astype(np.uint8)
    where = Georeference(300, 600, WKT, Affine(2, 0.5, 5e5, 0.5, -2, 5.3e6))
    for name, cut in (("whole.tif", 600), ("bands.tif", step)):
        with MaskWriter(tmp_path / name, where) as writer:
            for row in range(0, 600, cut):
                writer.write_rows(row, rows_HW[row : row + cut])
    assert (tmp_path / "whole.tif").read_bytes() == (tmp_path / "bands.tif").read_bytes()
    with rasterio.open(tmp_path / "bands.tif") as data:
        np.testing.assert_array_equal(data.read(1), rows_HW)
        assert data.transform.almost_equals(where.transform) and data.crs == CRS.from_epsg(32633)
        assert (data.nodata, data.dtypes[0], data.compression.name, data.is_tiled) == (255, "uint8", "deflate", True)


def test_rows_never_written_are_nodata_and_control_points_are_kept(tmp_path):
    points = tuple(GroundControlPoint(c, r, 5e5 + c, 5e6 - r) for c, r in ((0, 0), (40, 0), (0, 520), (40, 520)))
    with MaskWriter(tmp_path / "m.tif", Georeference(40, 520, WKT, None, points)) as writer:
        writer.write_rows(300, np.ones((2, 40), np.uint8))
    with rasterio.open(tmp_path / "m.tif") as data:
        band, (gcps, crs) = data.read(1), data.gcps
    assert (band[300:302] == 1).all() and (np.delete(band, [300, 301], axis=0) == 255).all()
    assert [(p.col, p.row, p.x, p.y) for p in gcps] == [(p.col, p.row, p.x, p.y) for p in points]
    assert crs == CRS.from_epsg(32633)


def test_a_record_is_one_line_or_nothing():
    stream = io.StringIO()
    with RecordSpool({"image": "ä"}, "detections") as spool:
        spool.add({"score": 1})
        spool.add({"score": 2})
        assert stream.getvalue() == ""
        spool.finish({"coverage": 1.0}, stream)
    assert stream.getvalue() == '{"image": "ä", "detections": [{"score": 1}, {"score": 2}], "coverage": 1.0}\n'
    with pytest.raises(ValueError), RecordSpool({}, "x") as spool:
        spool.add({"score": float("nan")})
