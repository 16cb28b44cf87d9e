"""When a scene was taken: from its file, from its name, or not known."""

from __future__ import annotations

import numpy as np
import pytest
import rasterio
from PIL import Image

from edge_rsvlm.alerts.times import instant
from edge_rsvlm.errors import InputError
from edge_rsvlm.raster.acquired import acquired
from edge_rsvlm.raster.dates_in_names import date_in_name
from edge_rsvlm.raster.embedded import PACKET_MOST_BYTES, parse_xmp
from edge_rsvlm.raster.reader import open_raster
from tests.scenes import write

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
EXIF_IFD, GPS_IFD = 0x8769, 0x8825
DATE_TIME, ORIGINAL, OFFSET, DIGITIZED = 0x0132, 0x9003, 0x9011, 0x9004
GPS_TIME, GPS_DATE = 7, 29


def tif(path, **tags):
    write(path, np.zeros((1, 16, 16), np.uint8), tiled=False)
    with rasterio.open(path, "r+") as dataset:
        namespace = tags.pop("ns", None)
        dataset.update_tags(ns=namespace, **tags)
    return str(path)


def jpeg(path, base=None, camera=None, gps=None, xmp=None):
    exif = Image.Exif()
    exif.update(base or {})
    exif[EXIF_IFD], exif[GPS_IFD] = camera or {}, gps or {}
    Image.new("RGB", (32, 24)).save(path, exif=exif, **({"xmp": xmp.encode()} if xmp else {}))
    return str(path)


def packet(attributes):
    return (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        f"<rdf:Description {attributes}/></rdf:RDF></x:xmpmeta>"
    )


# --- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, wanted",
    [
        ("2016.tif", "2016"),
        ("claremont_2016_14.tif", "2016"),
        ("scene_20160803.tif", "2016-08-03"),
        ("scene-2016-08-03-b.tif", "2016-08-03"),
        ("frame_20160803T105032.jpg", "2016-08-03T10:50:32Z"),
        ("2016-08-03T10-50-32Z.tif", "2016-08-03T10:50:32Z"),
        ("DJI_20160803105032_0001_D.JPG", "2016-08-03"),
        ("20160803_105032.jpg", "2016-08-03"),
        ("20160803_105032_0012.jpg", "2016-08-03"),
        ("LC08_L1TP_029030_20151209_20160131_01_T1_B4.TIF", "2015-12-09"),
        ("LT52240631988227CUB02.tif", "1988-08-14"),
        ("S2A_MSIL1C_20160803T105032_N0204_R051_T31UFS_20160803T105229.jp2", "2016-08-03T10:50:32Z"),
        ("T31UFS_20160803T105032_B04.jp2", "2016-08-03T10:50:32Z"),
        ("S1A_IW_GRDH_1SDV_20160803T053412_20160803T053437_012431_01364A_8B5F.tif", "2016-08-03T05:34:12Z"),
        ("s1a-iw-grd-vv-20160803t053412-20160803t053437-012431-01364a-001.tiff", "2016-08-03T05:34:12Z"),
        ("20160909_124350_0e0d_3B_AnalyticMS.tif", "2016-09-09T12:43:50Z"),
        ("20200415_103045_75_1057.tif", "2020-04-15T10:30:45Z"),
        ("20190101_101112_ssc1d1_0001_analytic.tif", "2019-01-01T10:11:12Z"),
    ],
)  # fmt: skip
def test_a_name_tells_its_date(name, wanted):
    assert date_in_name(name) == wanted


@pytest.mark.parametrize(
    "name",
    [
        "before.tif", "site_2016_2018.tif", "20150101_20160101.tif", "03082016.tif", "20161345.tif", "DJI_2016.JPG",
        "frame_2016.jpg", "tile_2048_1024.tif", "crop_2000x2000.png", "mosaic_2000px.tif", "scene_2999.tif",
        "naip2016.tif", "1234567890.tif", "LC80290302015400LGN00.tif", "20230229.tif",
    ],
)  # fmt: skip
def test_a_name_that_is_not_clear_tells_nothing(name):
    assert date_in_name(name) is None


# --- files ----------------------------------------------------------------------------------------------------------


def test_the_time_of_a_camera_is_utc_where_its_zone_is_known(tmp_path):
    path = jpeg(tmp_path / "a.jpg", camera={ORIGINAL: "2021:06:08 01:14:51", OFFSET: "+02:00"})
    assert acquired(path) == "2021-06-07T23:14:51Z"
    assert acquired(jpeg(tmp_path / "b.jpg", camera={ORIGINAL: "2021:06:08 01:14:51"})) == "2021-06-08"
    assert acquired(jpeg(tmp_path / "c.jpg", camera={DIGITIZED: "2021:06:08 01:14:51"})) == "2021-06-08"


def test_gps_time_is_utc_but_only_of_the_same_moment(tmp_path):
    camera, gps = {ORIGINAL: "2021:06:08 11:14:51"}, {GPS_DATE: "2021:06:08", GPS_TIME: (9.0, 14.0, 50.0)}
    assert acquired(jpeg(tmp_path / "a.jpg", camera=camera, gps=gps)) == "2021-06-08T09:14:50Z"
    stale = gps | {GPS_DATE: "2021:06:06"}
    assert acquired(jpeg(tmp_path / "b.jpg", camera=camera, gps=stale)) == "2021-06-08"
    broken = gps | {GPS_DATE: "nonsense"}
    assert acquired(jpeg(tmp_path / "c.jpg", camera=camera, gps=broken)) == "2021-06-08"


@pytest.mark.parametrize("text", ["0000:00:00 00:00:00", "    :  :     :  :  ", "1970:01:01 00:00:00", "yesterday"])
def test_a_clock_that_was_never_set_tells_nothing(tmp_path, text):
    assert acquired(jpeg(tmp_path / "a.jpg", base={DATE_TIME: text}, camera={ORIGINAL: text})) is None


def test_xmp_is_read_and_counts_after_exif(tmp_path):
    xmp = packet('xmlns:xmp="http://ns.adobe.com/xap/1.0/" xmp:CreateDate="2021-06-08T11:14:51+02:00"')
    assert acquired(jpeg(tmp_path / "a.jpg", xmp=xmp)) == "2021-06-08T09:14:51Z"
    dji = packet('xmlns:d="http://www.dji.com/drone-dji/1.0/" d:UTCAtExposure="2021-06-08T09:14:51.25"')
    assert acquired(jpeg(tmp_path / "b.jpg", xmp=dji)) == "2021-06-08T09:14:51Z"
    assert acquired(jpeg(tmp_path / "c.jpg", camera={ORIGINAL: "2020:01:02 03:04:05"}, xmp=xmp)) == "2020-01-02"


@pytest.mark.parametrize(
    "tags, wanted",
    [
        ({"ns": "IMAGERY", "ACQUISITIONDATETIME": "2016-08-03 10:50:32"}, "2016-08-03T10:50:32Z"),
        ({"DATE_ACQUIRED": "2015-12-09", "SCENE_CENTER_TIME": '"17:22:31.12Z"'}, "2015-12-09T17:22:31Z"),
        ({"DATATAKE_1_DATATAKE_SENSING_START": "2016-08-03T10:50:32.026Z"}, "2016-08-03T10:50:32Z"),
        ({"NITF_IDATIM": "20160803105032"}, "2016-08-03T10:50:32Z"),
        ({"acquisition_date": "2016-08-03"}, "2016-08-03"),
        ({"acquisition_date": "2016-08-03", "ACQUIRED": "2018-01-01T00:00:00Z"}, None),
        ({"TIFFTAG_DATETIME": "2016:08:03 10:50:32"}, "2016-08-03"),
        ({"TIFFTAG_DATETIME": "broken"}, None),
    ],
)
def test_metadata_items_of_products(tmp_path, tags, wanted):
    assert acquired(tif(tmp_path / "a.tif", **tags)) == wanted


def test_what_the_file_says_comes_before_its_name(tmp_path):
    said = jpeg(tmp_path / "2018.jpg", camera={ORIGINAL: "2021:06:08 11:14:51", OFFSET: "+00:00"})
    assert acquired(said) == "2021-06-08T11:14:51Z"
    assert acquired(tif(tmp_path / "2016.tif")) == "2016"
    # When the file was made is no proof against its name, nor the other way round.
    assert acquired(tif(tmp_path / "20160803.tif", TIFFTAG_DATETIME="2021:06:08 11:14:51")) is None
    assert acquired(tif(tmp_path / "2021.tif", TIFFTAG_DATETIME="2021:06:08 11:14:51")) == "2021-06-08"


def test_an_open_raster_and_another_name(tmp_path):
    path = tif(tmp_path / "a.tif")
    assert acquired(path, "2016.tif") == "2016" and acquired(path) is None
    with open_raster(path, "20160803.tif") as raster:
        assert acquired(raster) == "2016-08-03"
    with pytest.raises(InputError, match="missing"):
        acquired(str(tmp_path / "missing_2016.tif"))


def test_dates_of_any_precision_have_an_order():
    texts = ["2016", "2016-08-03", "2016-08-03T13:00:00Z", "2017"]
    assert sorted([texts[2], texts[0], texts[3], texts[1]], key=instant) == texts
    assert instant("2015").isoformat() == "2015-07-02T12:00:00+00:00"


# --- XMP ------------------------------------------------------------------------------------------------------------


def test_xmp_of_both_forms_and_nothing_unsafe():
    element = packet("").replace("/></rdf:RDF>", '><a:b xmlns:a="urn:a">7</a:b></rdf:Description></rdf:RDF>')
    assert parse_xmp(element) == {"{urn:a}b": "7"} == parse_xmp(packet('xmlns:a="urn:a" a:b="7"'))
    bomb = '<!DOCTYPE x [<!ENTITY a "aaaa">]>' + packet("")
    for text, why in ((bomb, "document type"), ("<x", "well-formed"), (" " * (PACKET_MOST_BYTES + 1), "long")):
        with pytest.raises(ValueError, match=why):
            parse_xmp(text)
