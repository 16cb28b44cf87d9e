"""How much calibration images are like those of the mission: ranges found on others do not hold.

An image is described by what quantization and resampling can feel: mean and deviation of each channel of its prepared
pixels, and how fast they change over one pixel and over four, which tells ground resolutions apart.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edge_rsvlm.config.inputs import InputSpec
from edge_rsvlm.config.offered import offered_verbs, task_of
from edge_rsvlm.errors import UsageError
from edge_rsvlm.geo import metres_per_pixel
from edge_rsvlm.pipeline.session import Session, georeference
from edge_rsvlm.raster.inputs import Source

FAR = 1.0
"""Standard deviations between the mean images of two sets, from where on they are told to differ."""
STEPS_PX = (1, 4)
MOST_IMAGES, MOST_TILES = 32, 4
TINY = 1e-3


def likeness(session: Session, calibration: Sequence[Source], target: Sequence[Source]) -> float:
    """Mean over the statistics of |difference of the means| / pooled standard deviation (Cohen 1988, "d")."""
    ours, theirs = (_described(session, _some(sources)) for sources in (calibration, target))
    pooled_D = np.sqrt((ours.var(axis=0) + theirs.var(axis=0)) / 2) + TINY
    return float((np.abs(ours.mean(axis=0) - theirs.mean(axis=0)) / pooled_D).mean())


def resolution_warning(session: Session, calibration: Sequence[Source]) -> str | None:
    """What to tell where the images' ground resolution is outside of what every task was trained for."""
    known = [metres for source in _some(calibration) if (metres := _metres(source)) is not None]
    wanted = [spec.resolution_m for spec in _inputs(session).values() if spec.resolution_m is not None]
    if not known or not wanted:
        return None
    middle = float(np.median(known))
    low, high = min(span[0] for span in wanted), max(span[1] for span in wanted)
    if low <= middle <= high:
        return None
    return f"calibration images have {middle:.3g} m per pixel, and the tasks were trained for {low:g} to {high:g} m"


def distance_warning(distance: float) -> str | None:
    if distance <= FAR:
        return None
    return f"calibration images differ from those that judge by {distance:.1f} standard deviations: take more like them"


def _some(sources: Sequence[Source]) -> list[Source]:
    places = np.linspace(0, len(sources) - 1, min(MOST_IMAGES, len(sources))).round()
    return [sources[int(place)] for place in places]


def _described(session: Session, sources: Sequence[Source]) -> NDArray[np.float64]:
    """[images, statistics] by the first task that sees images."""
    verb = next(iter(_inputs(session)))
    if not sources:
        raise UsageError("there is no image to compare the calibration with", fix="check [[evaluate]] images")
    return np.array([_statistics(session, verb, source.path) for source in sources])


def _statistics(session: Session, verb: str, path: str) -> NDArray[np.float64]:
    _, tiles = session.seen(verb, path, MOST_TILES)
    return np.mean([_of_tile(tile.pixels_KCHW) for tile in tiles], axis=0)


def _of_tile(pixels_KCHW: NDArray[np.float32]) -> NDArray[np.float64]:
    """Statistics [4 C]: mean, deviation, and mean step over one and four pixels."""
    axes = (0, 2, 3)
    steps = [np.abs(pixels_KCHW[..., step:] - pixels_KCHW[..., :-step]).mean(axis=axes) for step in STEPS_PX]
    return np.concatenate([pixels_KCHW.mean(axis=axes), pixels_KCHW.std(axis=axes), *steps]).astype(np.float64)


def _inputs(session: Session) -> dict[str, InputSpec]:
    """By verb, of the tasks that see images."""
    manifest = session.bundle.manifest
    specs = {verb: task_of(manifest, verb).input for verb in offered_verbs(manifest)}
    return {verb: spec for verb, spec in specs.items() if spec is not None}


def _metres(source: Source) -> float | None:
    found = metres_per_pixel(georeference(source.path))
    return None if found is None else float(np.mean(found))
