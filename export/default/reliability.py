"""What the score of a change is worth: how much of such changes is labelled as changed, in cities never trained on.

The score is the mean probability of a change's cells, so where it is right it is also the share of the area that really
changed. ``python -m edge_rsvlm.export.default.reliability BUNDLE`` prints both by bands of score, and the mean distance
between them weighed by area (expected calibration error, Guo et al. 2017).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rasterio.features import rasterize

from edge_rsvlm.bundle import load_bundle
from edge_rsvlm.export.default.disturbance import labels_on_later
from edge_rsvlm.export.default.splits import held_out
from edge_rsvlm.pipeline.session import Limits, Session

EDGES = (0.0, 0.3, 0.4, 0.5, 0.6, 1.0)
LIMITS = Limits(8 << 30)


@dataclass(frozen=True)
class Told:
    """One change: its score, its area, and how much of it is labelled as changed, in pixels."""

    score: float
    area_px: int
    labelled_px: int


@dataclass(frozen=True)
class Band:
    """Changes whose scores lie between ``low`` and ``high``; score and share are means weighed by area."""

    low: float
    high: float
    changes: int
    area_px: int
    score: float
    share: float


def told(session: Session, folder: Path) -> Iterator[Told]:
    """Changes of a labelled pair; polygons lie on its later date."""
    records: list[dict[str, Any]] = []
    outcome = session.change(str(folder / "t1.tif"), str(folder / "t2.tif"), lambda record, _: records.append(record))
    labels_HW = labels_on_later(folder, outcome.registration)
    for record in records:
        inside_HW: NDArray[np.uint8] = rasterize([record["polygon"]], labels_HW.shape, dtype=np.uint8)
        yield Told(record["score"], int(inside_HW.sum()), int((inside_HW & labels_HW).sum()))


def banded(changes: Sequence[Told]) -> list[Band]:
    """By EDGES; bands without a change are left out."""
    found = []
    for low, high in pairwise(EDGES):
        part = [c for c in changes if low <= c.score < high or c.score == high == EDGES[-1]]
        area = sum(c.area_px for c in part)
        if area:
            score = sum(c.score * c.area_px for c in part) / area
            found.append(Band(low, high, len(part), area, score, sum(c.labelled_px for c in part) / area))
    return found


def calibration_error(bands: Sequence[Band]) -> float:
    """Mean distance of score and share, weighed by area."""
    return sum(b.area_px * abs(b.score - b.share) for b in bands) / max(sum(b.area_px for b in bands), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    options = parser.parse_args()
    session = Session(load_bundle(options.bundle, allow_unsigned=True), LIMITS)
    changes = [c for city in sorted(held_out("oscd")) for c in told(session, options.data / "oscd" / "train" / city)]
    bands = banded(changes)
    print("scores      changes  mean score  labelled as changed")
    for band in bands:
        print(f"{band.low:.1f} to {band.high:.1f}{band.changes:11}{band.score:12.2f}{band.share:21.2f}")
    print(f"expected calibration error {calibration_error(bands):.3f}, of {len(changes)} changes")


if __name__ == "__main__":
    main()
