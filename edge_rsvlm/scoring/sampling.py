"""A score and its bootstrap 95 % interval over images.

A resample draws as many images as there are, with replacement: a row of integer weights per image. Every score here
is a function of weighted sums over images, which makes recomputing it cheap (Efron 1979, "Bootstrap methods").
Letters: I images, R resamples.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]
SEED = 0
RESAMPLES = 1000


@dataclass(frozen=True)
class Score:
    """``label`` is a class or a pair, None for all together; ``interval`` is None for fewer than two samples.

    ``draws_R`` are the values of the resamples: those of two scores over equally many images are drawn alike, and can
    be compared pair by pair.
    """

    metric: str
    value: float
    interval: tuple[float, float] | None
    samples: int
    label: str | None = None
    draws_R: F64 = field(default_factory=lambda: np.zeros(0), repr=False, compare=False)


def scored(metric: str, value: float, draws_R: F64, images: int, label: str | None = None) -> Score:
    return Score(metric, value, interval(draws_R, images), images, label, draws_R)


def score_of_draws(metric: str, values_R: F64, label: str) -> Score:
    """The mean over random draws, and the middle 95 % of them; ``samples`` are the draws."""
    return scored(metric, float(values_R.mean()), values_R, len(values_R), label)


def loss_bound(before: Score, after: Score) -> float:
    """The upper end of the 95 % interval of what ``after`` lost, over the same images; their difference for one."""
    lost_R = before.draws_R - after.draws_R
    defined = lost_R[np.isfinite(lost_R)]
    return float(np.percentile(defined, 97.5)) if before.samples > 1 and len(defined) else before.value - after.value


def resamples(images: int, count: int) -> NDArray[np.int64]:
    """How often each image is drawn in each resample [R, I]; the same for the same numbers."""
    return np.random.default_rng(SEED).multinomial(images, np.full(images, 1 / images), size=count)


def interval(values_R: F64, images: int) -> tuple[float, float] | None:
    """The middle 95 % of the resamples in which the score is defined."""
    defined = values_R[np.isfinite(values_R)]
    if images < 2 or not len(defined):
        return None
    low, high = np.percentile(defined, [2.5, 97.5])
    return float(low), float(high)
