"""Native tile_gather against its NumPy specification, on hostile shapes; and the specification against Pillow."""

from __future__ import annotations

import itertools

import numpy as np
import PIL
import pytest
from PIL import Image

from edge_rsvlm.errors import UsageError
from edge_rsvlm.tiles import ABSENT, VALIDITY, tile_gather, variants

NATIVE = [name for name in variants() if name != "reference"]
PILLOW = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos3": Image.Resampling.LANCZOS,
}
FILTERS = [*PILLOW, "gaussian"]
RGB = {"bands": [0, 1, 2], "gain": [1] * 3, "bias": [0] * 3}


def make_source(rng, layout, dtype, height, width, bands=4):
    top = {np.uint8: 255, np.uint16: 9000, np.float32: 1.0}[dtype]
    data = (rng.random((bands, height, width)) * top).astype(dtype)
    return np.ascontiguousarray(data if layout == "CHW" else data.transpose(1, 2, 0))


def both(source, boxes, variant, **options):
    expected = tile_gather(source, boxes, variant="reference", **options)
    actual = tile_gather(source, boxes, variant=variant, **options)
    return expected, actual


@pytest.mark.parametrize("variant", NATIVE)
@pytest.mark.parametrize("layout", ["HWC", "CHW"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("masked", [False, True])
def test_native_equals_reference(variant, layout, dtype, masked):
    rng = np.random.default_rng(7)
    for height, width in itertools.product([1, 2, 3, 17, 64], [1, 5, 33]):
        source = make_source(rng, layout, dtype, height, width)
        valid = (rng.random((height, width)) > 0.3).astype(np.uint8) if masked else None
        corner = rng.uniform(-5, 20, (6, 2))
        boxes = np.hstack([corner, corner + rng.uniform(0.3, 60, (6, 2))])
        top = float(source.max()) or 1.0
        expected, actual = both(
            source, boxes, variant, out_hw=(9, 13), layout=layout, valid=valid, threads=2,
            bands=[2, 0, ABSENT, VALIDITY, 3], gain=[1 / top, 2 / top, 1, 1, 1 / top], bias=[0.1, -1, 5, 5, 0],
            origin=(3, 2), raster_size=(width + 6, height + 4),
        )  # fmt: skip
        # A filter weight that is exactly one half rounds differently in float32: leave those pixels out.
        same = expected.tiles_NCHW[:, 3] == actual.tiles_NCHW[:, 3]
        assert same.mean() > 0.995
        difference = np.abs(expected.tiles_NCHW - actual.tiles_NCHW).max(axis=1)
        assert np.isfinite(actual.tiles_NCHW).all()
        assert difference[same].max(initial=0) < 2e-5
        np.testing.assert_allclose(actual.texture_N, expected.texture_N, atol=2e-2 if masked else 1e-4)


@pytest.mark.parametrize("variant", NATIVE)
@pytest.mark.parametrize("resampling", FILTERS)
@pytest.mark.parametrize("masked", [False, True])
def test_every_filter_native_equals_reference(variant, resampling, masked):
    rng = np.random.default_rng(8)
    kinds = itertools.cycle(itertools.product([np.uint8, np.uint16, np.float32], ["HWC", "CHW"]))
    for (height, width), (dtype, layout) in zip(itertools.product([1, 2, 5, 17, 64], [1, 3, 33]), kinds, strict=False):
        source = make_source(rng, layout, dtype, height, width)
        valid = (rng.random((height, width)) > 0.3).astype(np.uint8) if masked else None
        corner = rng.uniform(-5, 20, (6, 2))
        boxes = np.hstack([corner, corner + rng.uniform(0.3, 90, (6, 2))])
        top = float(source.max()) or 1.0
        expected, actual = both(
            source, boxes, variant, out_hw=(9, 13), layout=layout, valid=valid, bands=[2, VALIDITY, 0],
            gain=[1 / top, 1, 2 / top], bias=[0.1, 0, -1], origin=(3, 2), raster_size=(width + 6, height + 4),
            resampling=resampling,
        )  # fmt: skip
        same = expected.tiles_NCHW[:, 1] == actual.tiles_NCHW[:, 1]
        assert same.mean() > 0.99
        assert np.abs(expected.tiles_NCHW - actual.tiles_NCHW).max(axis=1)[same].max(initial=0) < 2e-5
        assert np.abs(actual.tiles_NCHW).max() < 10


@pytest.mark.parametrize("variant", variants())
@pytest.mark.parametrize("resampling", PILLOW)
def test_u8_tiles_are_pillows(variant, resampling):
    """Black and white noise: the overshoot of negative lobes is clipped between the passes, or whole levels are off."""
    rng = np.random.default_rng(1)
    off = []
    for (height, width), size in itertools.product(
        [(1, 1), (3, 2), (90, 120), (37, 211), (131, 7)], [(1, 1), (5, 3), (30, 40), (64, 64), (200, 31)]
    ):
        down_first = height - size[0] > max(0, 2 * (width - size[1]))
        if down_first and int(PIL.__version__.split(".")[0]) < 13:
            continue  # these resize in the other order
        source = (rng.random((height, width, 3)) > 0.5).astype(np.uint8) * 255
        tiles = tile_gather(
            source, np.array([[0.0, 0, width, height]]), out_hw=size, dtype=np.uint8, resampling=resampling,
            rounding="pillow", variant=variant, **RGB,
        ).tiles_NCHW[0]  # fmt: skip
        pillow = np.asarray(Image.fromarray(source).resize((size[1], size[0]), PILLOW[resampling]))
        off.append(np.abs(tiles.astype(int) - pillow.transpose(2, 0, 1)).ravel())
    assert np.concatenate(off).max() <= 1
    assert np.concatenate(off).mean() < 1e-4


@pytest.mark.parametrize("variant", variants())
def test_rounded_once_bilinear_is_pillow_within_one(variant):
    rng = np.random.default_rng(1)
    source = rng.integers(0, 256, (90, 120, 3), dtype=np.uint8)
    for size in [(30, 40), (64, 64), (200, 31)]:
        box = np.array([[0.0, 0, 120, 90]])
        tiles = tile_gather(source, box, out_hw=size, dtype=np.uint8, variant=variant, **RGB).tiles_NCHW[0]
        pillow = np.asarray(Image.fromarray(source).resize((size[1], size[0]), Image.Resampling.BILINEAR))
        assert np.abs(tiles.astype(int) - pillow.transpose(2, 0, 1)).max() <= 1


@pytest.mark.parametrize("variant", variants())
@pytest.mark.parametrize("resampling", PILLOW)
def test_float_tiles_are_pillows_float_images(variant, resampling):
    source = np.random.default_rng(9).random((37, 61, 1)).astype(np.float32)
    for size in [(9, 20), (80, 100), (100, 11)]:
        tiles = tile_gather(
            source, np.array([[0.0, 0, 61, 37]]), out_hw=size, bands=[0], gain=[1], bias=[0], resampling=resampling,
            variant=variant,
        ).tiles_NCHW[0, 0]  # fmt: skip
        pillow = np.asarray(Image.fromarray(source[..., 0]).resize((size[1], size[0]), PILLOW[resampling]))
        np.testing.assert_allclose(tiles, pillow, atol=2e-6)


@pytest.mark.parametrize("variant", variants())
@pytest.mark.parametrize("width, out", [(40, 12), (41, 40), (9, 30), (5, 1), (1, 4), (50, 3)])
def test_gaussian_blurs_then_interpolates(variant, width, out):
    line = np.random.default_rng(10).random(width).astype(np.float32)
    sigma = max(0.0, (width / out - 1) / 2)
    radius = int(4 * sigma + 0.5)
    bell = np.exp(-0.5 * (np.arange(-radius, radius + 1) / (sigma or 1)) ** 2)
    mirrored = np.pad(line, radius + 1, mode="reflect" if width > 1 else "edge")
    blurred = np.convolve(mirrored, bell / bell.sum(), mode="valid")  # one more pixel at either end
    expected = np.interp((np.arange(out) + 0.5) * width / out - 0.5, np.arange(-1, width + 1), blurred)
    tiles = tile_gather(
        line[None, :, None], np.array([[0.0, 0, width, 1]]), out_hw=(1, out), bands=[0], gain=[1], bias=[0],
        resampling="gaussian", variant=variant,
    ).tiles_NCHW[0, 0, 0]  # fmt: skip
    np.testing.assert_allclose(tiles, expected, atol=1e-6)


@pytest.mark.parametrize("variant", NATIVE)
@pytest.mark.parametrize("layout", ["HWC", "CHW"])
def test_pillow_rounding_native_equals_reference(variant, layout):
    rng = np.random.default_rng(11)
    for resampling, height in itertools.product(PILLOW, [1, 9, 64]):
        source = make_source(rng, layout, np.uint8, height, 23)
        corner = rng.uniform(-9, 15, (5, 2))
        boxes = np.hstack([corner, corner + rng.uniform(0.3, 70, (5, 2))])
        expected, actual = both(
            source, boxes, variant, out_hw=(11, 6), layout=layout, bands=[3, ABSENT, VALIDITY, 0], rounding="pillow",
            gain=[1 / 255, 1, 1, 3 / 255], bias=[-1, 5, 5, 2], resampling=resampling, threads=2,
        )  # fmt: skip
        np.testing.assert_allclose(actual.tiles_NCHW, expected.tiles_NCHW, atol=1e-6)
        np.testing.assert_array_equal(actual.valid_fraction_N, expected.valid_fraction_N)
        np.testing.assert_allclose(actual.texture_N, expected.texture_N, atol=1e-5)


@pytest.mark.parametrize("variant", variants())
@pytest.mark.parametrize("resampling", FILTERS)
def test_holes_leave_a_constant_alone(variant, resampling):
    rng = np.random.default_rng(12)
    valid = rng.random((60, 70)) > 0.4
    source = np.where(valid[..., None], np.float32(7), np.float32("nan"))
    for box, size in [((0, 0, 70, 60), (20, 20)), ((3.2, 8.1, 30, 40), (90, 90))]:
        result = tile_gather(
            source, np.array([box], np.float64), out_hw=size, bands=[0, VALIDITY], gain=[1] * 2, bias=[0] * 2,
            nodata=float("nan"), resampling=resampling, variant=variant,
        )  # fmt: skip
        value, inside = result.tiles_NCHW[0]
        assert 0.3 < result.valid_fraction_N[0] <= 1
        np.testing.assert_allclose(value[inside == 1], 7, rtol=1e-5)
        assert (value[inside == 0] == 0).all()


@pytest.mark.parametrize("variant", variants())
@pytest.mark.parametrize("resampling", FILTERS)
def test_identity_is_exact(variant, resampling):
    source = np.random.default_rng(2).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    box = np.array([[8.0, 4, 16, 12]])
    for rounding in ("once",) if resampling == "gaussian" else ("once", "pillow"):
        tile = tile_gather(
            source, box, out_hw=(8, 8), dtype=np.uint8, resampling=resampling, rounding=rounding, variant=variant, **RGB
        ).tiles_NCHW[0]
        np.testing.assert_array_equal(tile, source[4:12, 8:16].transpose(2, 0, 1))


@pytest.mark.parametrize("variant", variants())
@pytest.mark.parametrize("resampling", FILTERS)
def test_a_tile_does_not_depend_on_its_window(variant, resampling):
    source = np.random.default_rng(3).integers(0, 4096, (200, 300, 2), dtype=np.uint16)
    box = np.array([[60.3, 40.1, 187.9, 120.7]])
    options = {"out_hw": (32, 32), "bands": [0, 1], "gain": [1] * 2, "bias": [0] * 2, "variant": variant}
    options["resampling"] = resampling
    whole = tile_gather(source, box, **options).tiles_NCHW
    part = tile_gather(source[26:140, 46:204], box, origin=(46, 26), raster_size=(300, 200), **options).tiles_NCHW
    np.testing.assert_array_equal(whole, part)


@pytest.mark.parametrize("variant", NATIVE)
@pytest.mark.parametrize("rounding", ["once", "pillow"])
def test_threads_do_not_change_a_byte(variant, rounding):
    rng = np.random.default_rng(4)
    source = rng.integers(0, 256, (500, 500, 3), dtype=np.uint8)
    corner = rng.uniform(-20, 400, (23, 2))
    boxes = np.hstack([corner, corner + 100])
    results = [
        tile_gather(
            source, boxes, out_hw=(64, 64), resampling="bicubic" if rounding == "pillow" else "bilinear",
            rounding=rounding, threads=threads, variant=variant, **RGB,
        ).tiles_NCHW.tobytes()
        for threads in (1, 2, 5)
    ]  # fmt: skip
    assert len(set(results)) == 1


@pytest.mark.parametrize("variant", variants())
def test_nan_and_nodata_never_leak(variant):
    source = np.full((32, 32, 2), np.nan, np.float32)
    source[:, :16] = 3.0
    options = {"out_hw": (32, 32), "bands": [0, 1, VALIDITY], "gain": [1] * 3, "bias": [0] * 3, "variant": variant}
    result = tile_gather(source, np.array([[0.0, 0, 32, 32]]), nodata=float("nan"), **options)
    assert np.isfinite(result.tiles_NCHW).all()
    assert result.valid_fraction_N[0] == 0.5
    assert (result.tiles_NCHW[0, 0, :, :16] == 3).all() and (result.tiles_NCHW[0, :, :, 16:] == 0).all()


def test_wrong_calls_say_what_to_do():
    source = np.zeros((4, 4, 3), np.uint8)
    good = {"out_hw": (2, 2), "bands": [0], "gain": [1], "bias": [0]}
    box = np.array([[0.0, 0, 4, 4]])
    for arguments, options in [
        ((source.astype(np.int32), box), {}),
        ((source, box), {"bands": [3]}),
        ((source, box), {"bias": [0, 0]}),
        ((source, box[:, ::-1]), {}),
        ((source, box), {"variant": "sse9"}),
        ((source, box), {"valid": np.ones((3, 4))}),
        ((source, box), {"dtype": np.float64}),
        ((source, box), {"resampling": "cubic"}),
        ((source, box), {"rounding": "twice"}),
        ((source, box), {"rounding": "pillow", "resampling": "gaussian"}),
        ((source, box), {"rounding": "pillow", "valid": np.ones((4, 4))}),
        ((source, box), {"rounding": "pillow", "nodata": 0}),
        ((source, box), {"rounding": "pillow", "origin": (0, 1), "raster_size": (4, 5)}),
        ((source.astype(np.float32), box), {"rounding": "pillow"}),
    ]:
        with pytest.raises(UsageError):
            tile_gather(*arguments, **{**good, **options})
