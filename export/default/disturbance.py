"""What shift and light cost ``change``: false changes where nothing changed, and the F1 of labelled pairs.

Every disturbance is a shift of up to 2 pixels, a gain of up to 20 % per band, and slight noise, drawn at random.
``python -m edge_rsvlm.export.default.disturbance BUNDLE`` prints both tables.
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.errors import NotGeoreferencedWarning
from scipy import ndimage

from edge_rsvlm.bundle import load_bundle
from edge_rsvlm.export.default.splits import held_out
from edge_rsvlm.geo import metres_per_pixel
from edge_rsvlm.pipeline.change import ChangeOutcome
from edge_rsvlm.pipeline.session import Limits, Session, georeference
from edge_rsvlm.raster.moved import moved_map
from edge_rsvlm.raster.shift import Shift
from edge_rsvlm.scoring import UNKNOWN, change_counts
from edge_rsvlm.types import Window

SHIFT_PX, GAIN, NOISE = 2.0, 0.2, 0.01
"""The most along an axis; the most that a band is brightened or dimmed; deviation as a share of the bright end."""
BRIGHT = 0.98
"""The quantile that is the bright end."""
UNIT_M2, UNIT_PX = 5e6, 2000**2
"""False changes are told per so much ground, or per so many pixels where the ground is not known."""
MOST_FALSE = 1.0
"""To be found per unit at most."""
LIMITS = Limits(8 << 30)
SEED = 0


@dataclass(frozen=True)
class FalseChanges:
    """``found`` in scenes that are ``units`` of ground, or of pixels, in all."""

    scenes: str
    count: int
    units: float
    found: int
    share: float
    """Of the known pixels that are said to have changed."""

    @property
    def per_unit(self) -> float:
        return self.found / self.units


@dataclass(frozen=True)
class Accuracy:
    """F1 of one labelled pair, or of all, as it is and disturbed; ``mistakes`` counts [before, after] x [3]."""

    pair: str
    as_is: NDArray[np.int64]
    disturbed: NDArray[np.int64]

    @property
    def f1(self) -> tuple[float, float]:
        return _f1(self.as_is), _f1(self.disturbed)


def disturbed(source: Path, target: Path, rng: np.random.Generator) -> Path:
    """A copy of a raster, moved, in another light and noisy."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(source) as raster:
            data_CHW, valid_HW, profile = raster.read(), raster.dataset_mask() > 0, raster.profile
            described = raster.descriptions
        moved_CHW, moved_HW = _moved(data_CHW.astype(np.float32), valid_HW, rng.uniform(-SHIFT_PX, SHIFT_PX, 2))
        gains = rng.uniform(1 - GAIN, 1 + GAIN, len(data_CHW))[:, None, None]
        noise = rng.normal(0, NOISE * float(np.quantile(data_CHW, BRIGHT)), data_CHW.shape)
        values = np.clip(np.rint(moved_CHW * gains + noise), 1, np.iinfo(data_CHW.dtype).max)
        options = {key: profile[key] for key in ("width", "height", "count", "dtype", "crs", "transform")}
        target.parent.mkdir(parents=True, exist_ok=True)
        with rasterio.open(target, "w", driver="GTiff", nodata=0, **options) as out:
            out.write(np.where(moved_HW, values, 0).astype(data_CHW.dtype))
            out.descriptions = described
    return target


def _moved(
    data_CHW: NDArray[np.float32], valid_HW: NDArray[np.bool_], by_xy: NDArray[np.float64]
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """By cubic splines; what comes in from outside is not valid."""
    by = by_xy[::-1]
    moved = np.stack([ndimage.shift(band, by, order=3, mode="nearest") for band in data_CHW])
    return moved, ndimage.shift(valid_HW, by, order=0, mode="constant", cval=False)


def scenes(data: Path) -> dict[str, list[Path]]:
    """Real scenes by their kind; each is one date."""
    return {
        "Planet, 3 m, pixels": sorted((data / "planet_scenes").glob("*.webp")),
        "Airbus, 0.5 m, pixels": sorted((data / "airbus_aircraft" / "train").glob("*.webp"))[:4],
        "NAIP, 0.6 m": sorted((data / "naip_trees" / "train").glob("*_2018_*.tif")),
        "Landsat, 30 m": [data / "series" / "landsat_ucayali" / "2015.tif"],
        "Sentinel-2, 10 m": [data / "oscd" / "train" / city / "t1.tif" for city in sorted(held_out("oscd"))],
    }


def false_changes(session: Session, data: Path, work: Path) -> Iterator[FalseChanges]:
    """Scenes against themselves, disturbed: nothing changed in any."""
    for kind, files in scenes(data).items():
        rng = np.random.default_rng(SEED)
        found, units, changed_px, known_px = 0, 0.0, 0, 0
        for file in files:
            moved = disturbed(file, work / f"{file.parent.name}_{file.stem}.tif", rng)
            changes, outcome = _changes(session, moved, file)
            found, units = found + changes, units + _units(file)
            changed_px, known_px = changed_px + outcome.changed_px, known_px + outcome.known_px
        yield FalseChanges(kind, len(files), units, found, changed_px / max(known_px, 1))


def _changes(session: Session, before: Path, after: Path) -> tuple[int, ChangeOutcome]:
    records: list[object] = []
    outcome = session.change(str(before), str(after), lambda *record: records.append(record))
    return len(records), outcome


def _units(path: Path) -> float:
    where = georeference(str(path))
    metres = metres_per_pixel(where)
    pixels = where.width * where.height
    return pixels / UNIT_PX if metres is None else pixels * math.prod(metres) / UNIT_M2


def labelled(session: Session, data: Path, work: Path) -> Iterator[Accuracy]:
    """Held-out cities of OSCD, and last all of them.

    Its labels were drawn where the earlier date shows the ground, and are scored there: moved as far as the dates were
    found to lie apart before they were disturbed.
    """
    rng = np.random.default_rng(SEED)
    counts = []
    for city in sorted(held_out("oscd")):
        folder = data / "oscd" / "train" / city
        moved = disturbed(folder / "t1.tif", work / f"{city}_t1.tif", rng)
        masks = [_mask(session, before, folder / "t2.tif") for before in (folder / "t1.tif", moved)]
        labels_HW = labels_on_later(folder, masks[0][1].registration)
        counts.append([change_counts(mask_HW, labels_HW > 0) for mask_HW, _ in masks])
        yield Accuracy(city, *counts[-1])
    yield Accuracy("all", *np.sum(counts, axis=0))


def labels_on_later(folder: Path, shift: Shift) -> NDArray[np.uint8]:
    """What is labelled as changed [H, W], moved onto the later date: OSCD's labels were drawn on the earlier one."""
    with rasterio.open(folder / "change.tif") as raster:
        labels_HW = (raster.read(1) > 0).astype(np.uint8)
    whole = Window(0, 0, labels_HW.shape[1], labels_HW.shape[0])
    return moved_map(labels_HW, whole, whole, shift)


def _mask(session: Session, before: Path, after: Path) -> tuple[NDArray[np.uint8], ChangeOutcome]:
    where = georeference(str(after))
    mask_HW = np.full((where.height, where.width), UNKNOWN, np.uint8)

    def keep(first: int, rows_RW: NDArray[np.uint8]) -> None:
        mask_HW[first : first + len(rows_RW)] = rows_RW

    return mask_HW, session.change(str(before), str(after), lambda *_: None, keep)


def _f1(counts: NDArray[np.int64]) -> float:
    hits, false, missed = counts.tolist()
    return 2 * hits / max(2 * hits + false + missed, 1)


def tell(changes: Iterable[FalseChanges], accuracies: Iterable[Accuracy]) -> None:
    """Both tables, row by row as they come."""
    print(f"no change{'':15}scenes  found  per 5 km2 or 2000 x 2000 px  changed", flush=True)
    for row in changes:
        verdict = "" if row.per_unit <= MOST_FALSE else f"  more than {MOST_FALSE:g}"
        print(f"{row.scenes:24}{row.count:6}{row.found:7}{row.per_unit:14.2f}{row.share:22.3%}{verdict}", flush=True)
    print("\nOSCD                     F1  disturbed   loss")
    for pair in accuracies:
        before, after = pair.f1
        print(f"{pair.pair:22}{before:.3f}{after:11.3f}{1 - after / before:7.1%}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--work", type=Path, default=Path("build/default/disturbed"), help="the disturbed images")
    options = parser.parse_args()
    session = Session(load_bundle(options.bundle, allow_unsigned=True), LIMITS)
    tell(false_changes(session, options.data, options.work), labelled(session, options.data, options.work))


if __name__ == "__main__":
    main()
