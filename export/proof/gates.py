"""Gates: how far a step may move the outputs of the one before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Check:
    """One figure and its limit; ``at_least`` says which side of the limit is good."""

    output: str
    metric: str
    value: float
    limit: float
    at_least: bool = False

    @property
    def passed(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    @property
    def name(self) -> str:
        return f"{self.output} {self.metric}"


@dataclass(frozen=True)
class Gate:
    """Limits for one precision.

    ``error`` is |found - expected| / |expected|, ``cosine`` of whole tensors, ``divergence`` the Kullback-Leibler
    divergence of next-token distributions in nats, ``agreement`` the share of greedy tokens that are equal.
    """

    error: float
    cosine: float
    divergence: float
    agreement: float


LOSS = {"": (0.01, 0.03), "CIDEr": (0.03, 0.08)}
"""What a task may lose of a score in the mean, and at the upper end of the 95 % interval; "" stands for all others."""
COSINE = 0.995
"""Of features with fewer bits, to those before, in the mean."""
AGREEMENT = 0.95
"""Share of the tokens before that a model of fewer bits would choose as well."""

GATES = {
    "f32": Gate(error=1e-3, cosine=0.99999, divergence=1e-4, agreement=1.0),
    "f16": Gate(error=2e-2, cosine=0.995, divergence=2e-2, agreement=0.95),
}


def tensor_checks(output: str, found: NDArray[Any], expected: NDArray[Any], gate: Gate) -> list[Check]:
    """Relative error and cosine; inf and -1 where the shapes differ or a value is not finite."""
    if found.shape != expected.shape or not np.isfinite(found).all():
        error, cosine = float("inf"), -1.0
    else:
        a, b = found.astype(np.float64).ravel(), expected.astype(np.float64).ravel()
        size = float(np.linalg.norm(b))
        error = float(np.linalg.norm(a - b)) / max(size, 1e-12)
        cosine = float(a @ b) / max(float(np.linalg.norm(a)) * size, 1e-24) if size else 1.0
    return [Check(output, "relative error", error, gate.error), Check(output, "cosine", cosine, gate.cosine, True)]


def divergence_check(output: str, found_V: NDArray[Any], expected_V: NDArray[Any], gate: Gate) -> Check:
    """KL(expected || found) of the distributions over the vocabulary."""
    p, q = _log_softmax(expected_V), _log_softmax(found_V)
    value = float((np.exp(p) * (p - q)).sum()) if found_V.shape == expected_V.shape else float("inf")
    return Check(output, "divergence", abs(value), gate.divergence)


def agreement_check(output: str, found: Sequence[int], expected: Sequence[int], gate: Gate) -> Check:
    """Share of positions with the same token, over the longer of the two."""
    same = sum(a == b for a, b in zip(found, expected, strict=False))
    longest = max(len(found), len(expected))
    return Check(output, "token agreement", same / longest if longest else 1.0, gate.agreement, True)


def table(checks: Sequence[Check]) -> str:
    """A line per check, failures first."""
    rows = sorted(checks, key=lambda check: check.passed)
    return "\n".join(
        f"{'ok' if check.passed else 'FAILS':<7}{check.name:<44}{check.value:>12.4g}"
        f"  {'at least' if check.at_least else 'at most'} {check.limit:g}"
        for check in rows
    )


def _log_softmax(logits_V: NDArray[Any]) -> NDArray[np.float64]:
    shifted = logits_V.astype(np.float64) - logits_V.max()
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum())
    return result
