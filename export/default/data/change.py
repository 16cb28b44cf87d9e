"""Change pairs: OSCD (Sentinel-2, labels) and SZTAKI (aerial, labels).

Shapes: tiles [5,h,w]; mask [h/2,w/2] f32 in 0..1 (share of changed pixels) with -1 where outside.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import rasterio
import torch
from PIL import Image

from edge_rsvlm.export.default.data.views import (
    BGRN_BANDS,
    NO_JITTER,
    RGB_BANDS,
    S2_RANGE,
    U8_RANGE,
    cut,
    dihedral,
    jitter,
)
from edge_rsvlm.export.default.model.change import STRIDE
from edge_rsvlm.export.default.splits import held_out
from edge_rsvlm.raster.radiometry import Samples, matched
from edge_rsvlm.tiles import VALIDITY, tile_gather

F32 = npt.NDArray[np.float32]
RESOLUTION_M = 5.0
TILE_PX = 256
OVERLAP_PX = 64
SZTAKI_WEIGHT = 0.25  # its labels mean other changes (land cover from old aerial images): present, never dominant
EARTH_RADIUS_M = 6_371_008.8


@dataclass(frozen=True)
class Pair:
    """Two dates on one grid: pixels [H,W,C], mask [H,W] u8; ``step_xy`` raster px make one tile px."""

    name: str
    before: npt.NDArray[Any]
    after: npt.NDArray[Any]
    mask: npt.NDArray[np.uint8]
    step_xy: tuple[float, float]
    bands: tuple[int, ...]
    value_range: float
    weight: float = 1.0


@dataclass(frozen=True)
class ChangeExample:
    before: F32
    after: F32
    mask: F32


def oscd_pair(folder: Path) -> Pair:
    """One OSCD city; the step makes a tile pixel RESOLUTION_M true metres on each axis."""
    dates = []
    for name in ("t1", "t2"):
        with rasterio.open(folder / f"{name}.tif") as raster:
            dates.append(np.ascontiguousarray(raster.read().transpose(1, 2, 0)))
            latitude = np.radians((raster.bounds.top + raster.bounds.bottom) / 2)
            degree_m = np.pi / 180 * EARTH_RADIUS_M
            pixel_m = (raster.transform.a * degree_m * np.cos(latitude), -raster.transform.e * degree_m)
    with rasterio.open(folder / "change.tif") as raster:
        mask = (raster.read(1) > 0).astype(np.uint8)
    step = (RESOLUTION_M / pixel_m[0], RESOLUTION_M / pixel_m[1])
    return Pair(folder.name, in_one_radiometry(*dates), dates[1], mask, step, BGRN_BANDS, S2_RANGE)


def sztaki_pair(folder: Path, step: float = 1.0) -> Pair:
    """One SZTAKI pair at `step` raster px per tile px."""
    files = {p.stem: p for p in folder.iterdir()}
    before, after = (np.asarray(Image.open(files[n]).convert("RGB")) for n in ("t1", "t2"))
    mask = (np.asarray(Image.open(files["change"]).convert("L")) > 127).astype(np.uint8)
    before = in_one_radiometry(before, after)
    return Pair(folder.name, before, after, mask, (step, step), RGB_BANDS, U8_RANGE, SZTAKI_WEIGHT)


def in_one_radiometry(before_HWC: npt.NDArray[Any], after_HWC: npt.NDArray[Any]) -> F32:
    """BEFORE as the runtime matches it to AFTER, here from every pixel."""
    bands = before_HWC.shape[2]
    samples = Samples(*(date.reshape(-1, bands).astype(np.float32) for date in (before_HWC, after_HWC)))
    gain, offset = matched(samples)
    return (before_HWC * gain + offset).astype(np.float32)


def training_pairs(data: Path) -> list[Pair]:
    """Every labelled pair but those kept for validation."""
    cities = sorted(p for p in (data / "oscd" / "train").iterdir() if p.name not in held_out("oscd"))
    aerial = sorted(p for p in (data / "sztaki" / "train").iterdir() if p.name not in held_out("sztaki"))
    return [*map(oscd_pair, cities), *map(sztaki_pair, aerial)]


def mask_tile(mask: npt.NDArray[np.uint8], box: tuple[float, float, float, float], size_px: int) -> F32:
    """Share of changed pixels per output cell [size/2, size/2]; -1 where the cell is outside the raster."""
    n = size_px // STRIDE
    result = tile_gather(
        mask[:, :, None],
        np.array([box], np.float64),
        out_hw=(n, n),
        bands=(0, VALIDITY),
        gain=(1.0, 1.0),
        bias=(0.0, 0.0),
        layout="HWC",
    )
    share, valid = result.tiles_NCHW[0]
    return np.where(valid > 0.5, share, -1.0).astype(np.float32)


def shifted(box: tuple[float, float, float, float], dx: float, dy: float) -> tuple[float, float, float, float]:
    return box[0] + dx, box[1] + dy, box[2] + dx, box[3] + dy


class ChangeData:
    """Random crops of a list of pairs, each drawn by its weight times the square root of its area."""

    def __init__(self, pairs: list[Pair]):
        self.pairs = pairs
        share = np.array([p.weight * np.sqrt(p.mask.size) for p in pairs])
        self.share = share / share.sum()
        self.changed = [np.argwhere(p.mask) for p in pairs]

    def sample(self, rng: np.random.Generator, size_px: int = TILE_PX) -> ChangeExample:
        i = int(rng.choice(len(self.pairs), p=self.share))
        pair = self.pairs[i]
        scale = float(np.exp(rng.uniform(-0.25, 0.25)))
        side_x, side_y = (size_px * s / scale for s in pair.step_xy)
        cx, cy = self._centre(rng, i, side_x, side_y)
        box = (cx - side_x / 2, cy - side_y / 2, cx + side_x / 2, cy + side_y / 2)
        still = rng.random() < 0.05  # the same date twice: nothing changed but radiometry and registration
        mask = mask_tile(pair.mask, box, size_px)
        dates = [pair.before, pair.before if still else pair.after]
        if rng.random() < 0.3:
            dates.reverse()
        drop_nir = rng.random() < 0.15
        view = int(rng.integers(8))
        tiles = [self._tile(rng, pair, d, box, size_px, drop_nir, view) for d in dates]
        mask = np.where(mask > 0, 0.0, mask).astype(np.float32) if still else mask
        return ChangeExample(tiles[0], tiles[1], np.ascontiguousarray(dihedral(mask, view)))

    def _centre(self, rng: np.random.Generator, i: int, side_x: float, side_y: float) -> tuple[float, float]:
        """Near a changed pixel half of the time (changes are 1-4 % of the area), else anywhere."""
        height, width = self.pairs[i].mask.shape
        if rng.random() < 0.5 and len(self.changed[i]):
            y, x = self.changed[i][rng.integers(len(self.changed[i]))]
            cx, cy = x + rng.uniform(-0.4, 0.4) * side_x, y + rng.uniform(-0.4, 0.4) * side_y
        else:
            cx, cy = rng.uniform(0, width), rng.uniform(0, height)
        return _inside(cx, side_x, width), _inside(cy, side_y, height)

    def _tile(
        self, rng: np.random.Generator, pair: Pair, date: npt.NDArray[Any], box: tuple[float, float, float, float],
        size_px: int, drop_nir: bool, view: int,
    ) -> F32:  # fmt: skip
        dx, dy = rng.normal(0, 0.3, 2)  # residual misregistration, raster px
        bands = (*pair.bands[:3], -1, VALIDITY) if drop_nir else pair.bands
        radiometry = jitter(rng, 0.10, 0.06, 0.02) if rng.random() < 0.8 else NO_JITTER
        tile = cut(date, shifted(box, dx, dy), (size_px, size_px), bands, pair.value_range, radiometry)
        return np.ascontiguousarray(dihedral(tile, view))


def change_batch(examples: Sequence[ChangeExample]) -> dict[str, torch.Tensor]:
    """Stacked ``change_before``, ``change_after`` [N,5,h,w] and ``change_mask`` [N,h/2,w/2]."""
    names = ("before", "after", "mask")
    return {f"change_{n}": torch.from_numpy(np.stack([getattr(e, n) for e in examples])) for n in names}


def _inside(centre: float, side: float, size: int) -> float:
    """A centre moved so that little of a crop of this side hangs outside 0 .. size."""
    return float(np.clip(centre, min(side * 0.4, size / 2), max(size - side * 0.4, size / 2)))
