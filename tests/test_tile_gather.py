"""Native tile_gather against its NumPy specification, on hostile shapes; and the specification against Pillow."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from PIL import Image

from edge_rsvlm.errors import UsageError
from edge_rsvlm.tiles import ABSENT, VALIDITY, tile_gather, variants

NATIVE = [name for name in variants() if name != "reference"]


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


@pytest.mark.parametrize("variant", variants())
def test_u8_tiles_are_pillow_within_one(variant):
    rng = np.random.default_rng(1)
    source = rng.integers(0, 256, (90, 120, 3), dtype=np.uint8)
    for size in [(30, 40), (64, 64), (200, 31)]:
        tiles = tile_gather(
            source, np.array([[0.0, 0, 120, 90]]), out_hw=size, bands=[0, 1, 2], gain=[1] * 3, bias=[0] * 3,
            dtype=np.uint8, variant=variant,
        ).tiles_NCHW[0]  # fmt: skip
        pillow = np.asarray(Image.fromarray(source).resize((size[1], size[0]), Image.Resampling.BILINEAR))
        assert np.abs(tiles.astype(int) - pillow.transpose(2, 0, 1)).max() <= 1


@pytest.mark.parametrize("variant", variants())
def test_identity_is_exact(variant):
    source = np.random.default_rng(2).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    box = np.array([[8.0, 4, 16, 12]])
    options = {"out_hw": (8, 8), "bands": [0, 1, 2], "gain": [1] * 3, "bias": [0] * 3, "dtype": np.uint8}
    tile = tile_gather(source, box, variant=variant, **options).tiles_NCHW[0]
    np.testing.assert_array_equal(tile, source[4:12, 8:16].transpose(2, 0, 1))


@pytest.mark.parametrize("variant", variants())
def test_a_tile_does_not_depend_on_its_window(variant):
    source = np.random.default_rng(3).integers(0, 4096, (200, 300, 2), dtype=np.uint16)
    box = np.array([[60.3, 40.1, 187.9, 120.7]])
    options = {"out_hw": (32, 32), "bands": [0, 1], "gain": [1] * 2, "bias": [0] * 2, "variant": variant}
    whole = tile_gather(source, box, **options).tiles_NCHW
    part = tile_gather(source[30:140, 50:200], box, origin=(50, 30), raster_size=(300, 200), **options).tiles_NCHW
    np.testing.assert_array_equal(whole, part)


@pytest.mark.parametrize("variant", NATIVE)
def test_threads_do_not_change_a_byte(variant):
    rng = np.random.default_rng(4)
    source = rng.integers(0, 256, (500, 500, 3), dtype=np.uint8)
    corner = rng.uniform(-20, 400, (23, 2))
    boxes = np.hstack([corner, corner + 100])
    results = [
        tile_gather(source, boxes, out_hw=(64, 64), bands=[0, 1, 2], gain=[1] * 3, bias=[0] * 3,
                    threads=threads, variant=variant).tiles_NCHW.tobytes()
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
    ]:
        with pytest.raises(UsageError):
            tile_gather(*arguments, **{**good, **options})
