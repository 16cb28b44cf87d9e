"""tile_gather on the common case, 512 px windows of 8-bit RGB to 384 px float tiles, beside its floor and a peer.

One table per filter. The floor is a copy of the bytes that must move, window read once, tile written once; the number
in brackets is the ratio to it. The peer is Pillow's resize with NumPy's normalisation, which gives the same tile:
within rounding, and exactly with Pillow's rounding (tests/test_tile_gather.py).
"""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from edge_rsvlm.tiles import tile_gather, variants

WINDOW_PX, TILE_PX, TILES = 512, 384, 16
BANDS = [0, 1, 2]
PILLOW = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos3": Image.Resampling.LANCZOS,
}

every_filter = pytest.mark.parametrize("resampling", PILLOW)


@pytest.fixture(scope="module")
def raster():
    return np.random.default_rng(0).integers(0, 256, (4096, 4096, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def boxes():
    corner = np.random.default_rng(1).integers(0, 4096 - WINDOW_PX, (TILES, 2)).astype(np.float64)
    return np.hstack([corner, corner + WINDOW_PX])


@pytest.mark.parametrize("variant", [v for v in variants() if v != "reference"])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("rounding", ["once", "pillow"])
@every_filter
def test_gather(benchmark, raster, boxes, variant, threads, rounding, resampling):
    options = {"out_hw": (TILE_PX, TILE_PX), "bands": BANDS, "gain": [1 / 127.5] * 3, "bias": [-1.0] * 3}
    benchmark.extra_info["tiles"] = TILES
    benchmark.group = resampling
    benchmark(
        tile_gather,
        raster,
        boxes,
        variant=variant,
        threads=threads,
        rounding=rounding,
        resampling=resampling,
        **options,
    )


@every_filter
def test_floor_copy(benchmark, raster, boxes, resampling):
    tiles = np.empty((3, TILE_PX, TILE_PX), np.float32)
    window = np.empty((WINDOW_PX, WINDOW_PX, 3), np.uint8)
    filled = np.ones_like(tiles)

    def copy():
        for x, y, *_ in boxes.astype(int):
            np.copyto(window, raster[y : y + WINDOW_PX, x : x + WINDOW_PX])
            np.copyto(tiles, filled)

    benchmark.group = resampling
    benchmark(copy)


@every_filter
def test_peer_pillow(benchmark, raster, boxes, resampling):
    image = Image.fromarray(raster)

    def resize():
        for x, y, *_ in boxes.astype(int):
            box = (x, y, x + WINDOW_PX, y + WINDOW_PX)
            tile = image.resize((TILE_PX, TILE_PX), PILLOW[resampling], box=box)
            np.ascontiguousarray((np.asarray(tile, np.float32) / 127.5 - 1).transpose(2, 0, 1))

    benchmark.group = resampling
    benchmark(resize)
