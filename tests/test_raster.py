"""Reading: windows, masks, bands, values; which tiles, in which windows; two dates on one grid; inputs."""

from __future__ import annotations

import io
import tarfile

import numpy as np
import pytest
import rasterio
from PIL import Image
from rasterio.enums import ColorInterp
from rasterio.transform import Affine

from edge_rsvlm.errors import InputError
from edge_rsvlm.raster.align import open_aligned
from edge_rsvlm.raster.inputs import list_inputs
from edge_rsvlm.raster.plan import TileGrid, choose_scale, super_tiles
from edge_rsvlm.raster.reader import open_raster
from edge_rsvlm.tiles import tile_gather
from edge_rsvlm.tiles.reference import REACH_PX
from edge_rsvlm.types import Window
from tests.scenes import UTM, write


def read_all(path, decimation=1):
    with open_raster(str(path)) as raster:
        found = raster.read(Window(0, 0, *raster.size_at(decimation)), decimation)
        return raster, found.data_CHW, found.valid_HW


def random_image(bands=3, height=70, width=90, dtype="uint8", seed=0):
    return np.random.default_rng(seed).integers(1, 200, (bands, height, width)).astype(dtype)


# --- plan -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 1), (127, 300), (128, 128), (129, 512), (1000, 333)])
@pytest.mark.parametrize("scale", [(1.0, 1.0), (1.3, 0.7), (0.25, 0.31)])
def test_cores_partition_the_raster_and_lie_in_their_boxes(size, scale):
    grid = TileGrid(*size, scale, 128, 64)
    boxes = np.array([grid.box(i) for i in range(len(grid))])
    cores = np.array([grid.core(i) for i in range(len(grid))])
    assert (cores[:, 2:] > cores[:, :2]).all()
    assert (cores >= np.tile(boxes[:, :2], 2) - 1e-9).all() and (cores <= np.tile(boxes[:, 2:], 2) + 1e-9).all()
    for x, y in np.random.default_rng(0).uniform(0, 1, (50, 2)) * size:
        assert ((cores[:, 0] <= x) & (x < cores[:, 2]) & (cores[:, 1] <= y) & (y < cores[:, 3])).sum() == 1
    overhang = np.maximum(np.array(scale) * 128 - size, 0)
    assert (boxes[:, 2:] <= size + overhang + 1e-9).all()


@pytest.mark.parametrize("block_hw", [(256, 256), (1, 1000)])
@pytest.mark.parametrize("limit", [1, 40_000, 10**9])
def test_super_tiles_hold_every_tile_once_with_its_halo(block_hw, limit):
    grid = TileGrid(1000, 700, (1.5, 1.2), 128, 64)
    parts = list(super_tiles(grid, block_hw, limit))
    assert sorted(i for part in parts for i in part.tiles) == list(range(len(grid)))
    for part in parts:
        w = part.window
        assert len(part.tiles) == 1 or w.width * w.height <= limit
        assert w.col >= 0 and w.row >= 0 and w.col + w.width <= 1000 and w.row + w.height <= 700
        for x0, y0, x1, y1 in map(grid.box, part.tiles):
            assert w.col <= max(x0 - 1.5, 0) and w.col + w.width >= min(x1 + 1.5, 1000)
            assert w.row <= max(y0 - 1.2, 0) and w.row + w.height >= min(y1 + 1.2, 700)


@pytest.mark.parametrize("resampling", ["bilinear", "bicubic", "lanczos3"])
@pytest.mark.parametrize("scale", [1.0, 1.7])
def test_a_tile_is_the_same_whatever_window_it_was_cut_from(resampling, scale):
    image_HWC = np.random.default_rng(0).integers(0, 256, (150, 210, 1), dtype=np.uint8)
    grid = TileGrid(210, 150, (scale, scale), 32, 8, REACH_PX[resampling])
    how = {"out_hw": (32, 32), "bands": (0,), "gain": (1.0,), "bias": (0.0,), "resampling": resampling}
    for part in super_tiles(grid, (64, 64), 1):
        w = part.window
        boxes = np.array([grid.box(i) for i in part.tiles])
        seen = image_HWC[w.row : w.row + w.height, w.col : w.col + w.width]
        cut = tile_gather(seen, boxes, origin=(w.col, w.row), raster_size=(210, 150), **how)
        whole = tile_gather(image_HWC, boxes, **how)
        np.testing.assert_array_equal(cut.tiles_NCHW, whole.tiles_NCHW)


def test_scale_is_in_ground_metres_per_axis():
    assert choose_scale(None, (0.3, 1), None, [2, 4]) == (1, 1, 1)
    assert choose_scale((0.5, 0.5), (0.3, 1), None, [2]) == (1, 1, 1)
    assert choose_scale((0.1, 0.2), (0.4, 1), None, [2, 4]) == pytest.approx((4, 2, 2))  # the finer axis limits
    assert choose_scale((0.1, 0.1), (0.4, 1), None, [2, 4, 8]) == pytest.approx((4, 4, 4))
    assert choose_scale((0.1, 0.1), (0.4, 1), 0.2, [2, 4, 8]) == pytest.approx((2, 2, 2))
    x, y, _ = choose_scale((8.5, 12.9), (10, 11), None, [])
    assert x * 8.5 == pytest.approx(y * 12.9)
    assert choose_scale((50_000, 50_000), (0.3, 1), None, []) == pytest.approx((0.5, 0.5, 1))


# --- reader ---------------------------------------------------------------------------------------------------------


def test_windows_are_what_the_whole_is(tmp_path):
    image = random_image(height=300, width=310)
    path = write(tmp_path / "a.tif", image, **UTM)
    with open_raster(str(path)) as raster:
        for window in (Window(0, 0, 310, 300), Window(127, 128, 3, 1), Window(300, 290, 10, 10)):
            got = raster.read(window)
            rows, cols = slice(window.row, window.row + window.height), slice(window.col, window.col + window.width)
            np.testing.assert_array_equal(got.data_CHW, image[:, rows, cols])
            assert got.valid_HW.all()


def test_overview_windows_are_the_overviews_own_pixels(tmp_path):
    path = write(tmp_path / "a.tif", random_image(height=301, width=333), **UTM)
    with rasterio.open(path, "r+") as data:
        data.build_overviews([2, 4], rasterio.enums.Resampling.average)
    with rasterio.open(path, overview_level=1) as level:
        expected = level.read()
    raster, whole, _ = read_all(path, 4)
    assert raster.overviews == (2, 4) and whole.shape == (3, 76, 84)
    np.testing.assert_array_equal(whole, expected)
    with open_raster(str(path)) as raster:
        np.testing.assert_array_equal(raster.read(Window(5, 7, 20, 30), 4).data_CHW, expected[:, 7:37, 5:25])


def test_external_masks_overviews_and_world_files_are_used(tmp_path):
    Image.fromarray(np.moveaxis(random_image(), 0, -1)).save(tmp_path / "a.png")
    (tmp_path / "a.pgw").write_text("0.5\n0\n0\n-0.5\n500000.25\n5299999.75\n")
    (tmp_path / "a.png.aux.xml").write_text("<PAMDataset><SRS>EPSG:32633</SRS></PAMDataset>")
    raster, _, _ = read_all(tmp_path / "a.png")
    assert raster.georeference.transform == Affine(0.5, 0, 500_000, 0, -0.5, 5_300_000)
    assert "UTM zone 33N" in raster.georeference.crs_wkt


@pytest.mark.parametrize("nodata, dtype", [(0, "uint8"), (-9999, "int16"), (float("nan"), "float32")])
def test_nodata_is_invalid_where_every_band_has_it(tmp_path, nodata, dtype):
    image = random_image(dtype=dtype)
    image[:, 10:20, 5:9] = nodata
    image[0, 40, 40] = 0 if nodata == 0 else image[0, 40, 40]
    _, data, valid = read_all(write(tmp_path / "a.tif", image, nodata=nodata, **UTM))
    expected = np.ones((70, 90), bool)
    expected[10:20, 5:9] = False
    np.testing.assert_array_equal(valid > 0, expected)
    assert np.isfinite(data).all()


def test_alpha_counts_even_beside_nodata(tmp_path):
    image = random_image(4)
    image[3] = 255
    image[3, :10] = 0
    image[:3, 20:30] = 7
    options = {"nodata": 7, "photometric": "RGB", "alpha": "yes", **UTM}
    raster, data, valid = read_all(write(tmp_path / "a.tif", image, **options))
    assert raster.band_roles == ("red", "green", "blue") and len(data) == 3
    assert not valid[:10].any() and not valid[20:30].any() and valid[10:20].all() and valid[30:].all()


def test_a_palette_is_its_colours(tmp_path):
    with rasterio.open(
        tmp_path / "a.tif", "w", driver="GTiff", width=20, height=20, count=1, dtype="uint8", **UTM
    ) as out:
        out.write(np.tile(np.arange(2, dtype=np.uint8), (1, 20, 10)))
        out.write_colormap(1, {0: (10, 20, 30, 255), 1: (200, 100, 50, 255)})
    raster, data, _ = read_all(tmp_path / "a.tif")
    assert raster.band_roles == ("red", "green", "blue")
    assert data[:, 0, :2].T.tolist() == [[10, 20, 30], [200, 100, 50]]


def test_scale_and_offset_of_the_file_are_applied(tmp_path):
    path = write(tmp_path / "a.tif", random_image(1, dtype="int16"), **UTM)
    with rasterio.open(path, "r+") as data:
        raw, data.scales, data.offsets = data.read(), (0.5,), (3.0,)
    _, values, _ = read_all(path)
    np.testing.assert_allclose(values, raw * 0.5 + 3)
    assert values.dtype == np.float32


ROLES = [
    (1, {}, (), ("gray",)),
    (2, {"photometric": "MINISBLACK", "alpha": "yes"}, (), ("gray",)),
    (3, {"photometric": "MINISBLACK"}, (), ("red", "green", "blue")),
    (4, {"photometric": "MINISBLACK"}, (), ("red", "green", "blue", "nir")),
    (4, {"photometric": "MINISBLACK"}, ("B02", "B03", "B04", "B08"), ("blue", "green", "red", "nir")),
    (5, {"photometric": "MINISBLACK"}, ("B8A", "B04", "B03", "B02", "B08"), ("nir", "red", "green", "blue")),
    (4, {"photometric": "RGB"}, ("", "", "", "NIR"), ("red", "green", "blue", "nir")),
]


@pytest.mark.parametrize("count, options, names, roles", ROLES)
def test_bands_are_known_by_name_colour_or_usual_order(tmp_path, count, options, names, roles):
    path = write(tmp_path / "a.tif", random_image(count), **options)
    if names:
        with rasterio.open(path, "r+") as data:
            data.descriptions = names
    assert read_all(path)[0].band_roles == roles


def test_many_unnamed_bands_are_not_guessed(tmp_path):
    path = write(tmp_path / "a.tif", random_image(8), photometric="MINISBLACK")
    with pytest.raises(InputError, match=r"none of its 8 bands .*gdal_edit"), open_raster(str(path)):
        pass


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGB", "RGBA", "CMYK", "1"])
@pytest.mark.parametrize("kind", ["png", "jpg", "webp"])
def test_every_usual_kind_of_picture_is_read(tmp_path, mode, kind):
    if (mode, kind) in {("CMYK", "png")} or (kind == "jpg" and mode in ("LA", "P", "RGBA")):
        pytest.skip("no such file exists: the format has no such mode")
    Image.new(mode, (40, 30), 1 if mode in ("1", "P") else None).save(tmp_path / f"a.{kind}")
    raster, data, valid = read_all(tmp_path / f"a.{kind}")
    assert data.shape[1:] == (30, 40) and data.dtype == np.uint8
    assert raster.band_roles in (("gray",), ("red", "green", "blue"))
    assert not raster.windowed and valid.shape == (30, 40)


def bad_files(folder):
    whole = write(folder / "whole.tif", random_image(height=300, width=300), compress="deflate", **UTM).read_bytes()
    png, jpeg, webp = io.BytesIO(), io.BytesIO(), io.BytesIO()
    for stream, kind in ((png, "png"), (jpeg, "jpeg"), (webp, "webp")):
        Image.fromarray(np.moveaxis(random_image(3, 200, 200), 0, -1)).save(stream, kind)
    return {
        "empty.tif": b"",
        "text.tif": b"this is no image\n" * 50,
        "short.tif": whole[: len(whole) // 2],
        "short.png": png.getvalue()[:30_000],
        "short.jpg": jpeg.getvalue()[:9_000],
        "short.webp": webp.getvalue()[:9_000],
        "scrambled.tif": whole[:1000] + bytes(len(whole) - 2000) + whole[-1000:],
    }


@pytest.mark.parametrize(
    "name", ["empty.tif", "text.tif", "short.tif", "short.png", "short.jpg", "short.webp", "scrambled.tif"]
)
def test_a_broken_file_is_one_line_that_names_it(tmp_path, name):
    (tmp_path / name).write_bytes(bad_files(tmp_path)[name])
    with pytest.raises(InputError) as caught:
        read_all(tmp_path / name)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_not_a_file_is_one_line_too(tmp_path):
    for path in (tmp_path, tmp_path / "no.tif", "/vsitar/no.tar/a.png"):
        with pytest.raises(InputError), open_raster(str(path)):
            pass


# --- two dates ------------------------------------------------------------------------------------------------------


def aligned(before, after):
    with open_raster(str(after)) as later, open_aligned(str(before), later) as earlier:
        size = later.georeference.width, later.georeference.height
        found = earlier.read(Window(0, 0, *size))
        return earlier, found.data_CHW, found.valid_HW


def test_before_is_warped_onto_the_grid_of_after(tmp_path):
    image = np.kron(random_image(4, 20, 20), np.ones((1, 10, 10), np.uint8))
    after = write(tmp_path / "after.tif", image, photometric="MINISBLACK", **UTM)
    south_up = UTM | {"transform": Affine(0.5, 0, 500_005, 0, 0.5, 5_299_900)}
    before = write(tmp_path / "before.tif", image[:, ::-1, 10:], photometric="MINISBLACK", **south_up)
    for path in (after, before):
        with rasterio.open(path, "r+") as data:
            data.descriptions = ("B02", "B03", "B04", "B08")
    raster, data, valid = aligned(before, after)
    assert raster.band_roles == ("blue", "green", "red", "nir")  # by the file's names, which a warp forgets
    assert not valid[:, :9].any() and valid[2:-2, 12:-2].all()
    np.testing.assert_array_equal(data[:, 5::10, 15::10], image[:, 5::10, 15::10])


def test_near_infrared_marked_as_alpha_is_an_image_and_no_mask(tmp_path):
    after = write(tmp_path / "after.tif", random_image(4), photometric="RGB", alpha="yes", **UTM)
    raster, data, valid = read_all(after)
    assert raster.band_roles == ("red", "green", "blue", "nir") and valid.all() and "near infrared" in raster.notes[0]
    moved = UTM | {"transform": Affine(0.5, 0, 500_005, 0, -0.5, 5_300_000)}
    image = np.full((4, 70, 90), 100, np.uint8)
    raster, data, valid = aligned(write(tmp_path / "b.tif", image, photometric="RGB", alpha="yes", **moved), after)
    assert raster.band_roles[3] == "nir" and (data[:, valid > 0] == 100).all()
    assert valid[2:-2, 12:-2].all() and not valid[:, :9].any()
    image[3], image[3, :20] = 255, 0
    raster, _, valid = read_all(write(tmp_path / "mask.tif", image, photometric="RGB", alpha="yes", **UTM))
    assert (
        raster.band_roles == ("red", "green", "blue") and not raster.notes and not valid[:20].any() and valid[20:].all()
    )


@pytest.mark.parametrize("kind", ["nodata", "alpha", "palette", "float"])
def test_warping_keeps_masks_and_colours(tmp_path, kind):
    after = write(tmp_path / "after.tif", random_image(3, 100, 100), **UTM)
    moved = UTM | {"transform": Affine(0.5, 0, 500_010.1, 0, -0.5, 5_300_000)}
    bands = {"nodata": 3, "alpha": 4, "palette": 1, "float": 1}[kind]
    image = np.full((bands, 100, 100), 9, "float32" if kind == "float" else "uint8")
    image[3:] = 255
    image[:, 50:] = 0
    options = {"nodata": {"nodata": 0}, "alpha": {"photometric": "RGB", "alpha": "yes"}, "float": {"nodata": 0.0}}
    before = write(tmp_path / "before.tif", image, **moved, **options.get(kind, {"nodata": 0}))
    if kind == "palette":
        with rasterio.open(before, "r+") as data:
            data.colorinterp = [ColorInterp.palette]
            data.write_colormap(1, {0: (0, 0, 0), 9: (200, 100, 50)})
    _, data, valid = aligned(before, after)
    assert valid[2:48, 24:].all() and not valid[52:].any() and not valid[:, :18].any()
    assert data[:, 10, 50].tolist() == {"palette": [200, 100, 50]}.get(kind, [9] * min(bands, 3))


def test_what_cannot_be_aligned_is_refused(tmp_path):
    after = write(tmp_path / "after.tif", random_image(), **UTM)
    far = write(tmp_path / "far.tif", random_image(), **(UTM | {"transform": Affine(0.5, 0, 9e5, 0, -0.5, 5e6)}))
    plain = write(tmp_path / "plain.tif", random_image(height=71))
    with pytest.raises(InputError, match="does not overlap"):
        aligned(far, after)
    with pytest.raises(InputError, match="cannot be aligned"):
        aligned(plain, after)
    with pytest.raises(InputError, match="cannot be aligned"):
        aligned(plain, write(tmp_path / "other.tif", random_image()))


# --- inputs ---------------------------------------------------------------------------------------------------------


def test_files_folders_globs_and_archives(tmp_path):
    folder = tmp_path / "ordner ü"
    folder.mkdir()
    picture = Image.fromarray(np.moveaxis(random_image(), 0, -1))
    for name in ("b.PNG", "a[1].jpg", "ñ.webp"):
        picture.save(folder / name)
    (folder / "notes.txt").write_text("x")
    archive = tmp_path / "shard-0.tar"
    with tarfile.open(archive, "w") as tar:
        for name in ("ñ.webp", "b.PNG", "notes.txt"):
            tar.add(folder / name, arcname=f"in/{name}")
    names = [s.name for s in list_inputs([str(folder), str(folder / "*.webp"), str(folder / "a[1].jpg"), str(archive)])]
    inside = [str(folder / n) for n in ("a[1].jpg", "b.PNG", "ñ.webp")]
    assert names == [*inside, inside[2], inside[0], "in/ñ.webp", "in/b.PNG"]
    for source in list_inputs([str(folder), str(archive)]):
        assert read_all(source.path)[1].shape == (3, 70, 90)


def test_what_holds_no_image_is_listed_and_fails_in_its_turn(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.tar").write_bytes(b"no archive")
    wanted = [str(tmp_path / n) for n in ("empty", "no*.tif", "broken.tar", "missing.png")]
    assert [s.name for s in list_inputs(wanted)] == wanted
    for path in wanted:
        with pytest.raises(InputError) as caught, open_raster(path):
            pass
        assert path in str(caught.value)
