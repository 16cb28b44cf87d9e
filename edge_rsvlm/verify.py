"""Is this bundle whole, and does it compute here what it computed where it was made?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_rsvlm.bundle import Bundle
from edge_rsvlm.pipeline.runtime import EngineFactory, Runtime, cpu_engine
from edge_rsvlm.tasks.encode import encode

UNBOUNDED = 0


@dataclass(frozen=True)
class ProbeResult:
    """One golden output: ``difference`` is the greatest absolute one (for captions 0 or 1: same or not)."""

    output: str
    difference: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return bool(self.difference <= self.tolerance)


def replay_probe(bundle: Bundle, engine_factory: EngineFactory = cpu_engine) -> list[ProbeResult]:
    """Run the golden inputs through every head and compare with the golden outputs.

    Sides of boxes are compared relative to the box, and only where something was seen.
    """
    runtime = Runtime(bundle, engine_factory(1, UNBOUNDED))
    with np.load(bundle.path(bundle.manifest.probe.file), allow_pickle=False) as stored:
        golden = {name: stored[name] for name in stored.files}
    tiles_NCHW = probe_tiles(golden["tiles"])
    tolerance = bundle.manifest.probe.tolerance
    found: list[ProbeResult] = []
    for name, difference in _differences(runtime, tiles_NCHW, golden).items():
        found.append(ProbeResult(name, difference, tolerance if name != "caption" else 0.0))
    return found


def probe_tiles(rgb_N3HW: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The probe's 8-bit RGB as model input: scaled to [-1, 1], no near infrared, everything valid."""
    count, _, height, width = rgb_N3HW.shape
    tiles = np.zeros((count, 5, height, width), np.float32)
    tiles[:, :3] = rgb_N3HW.astype(np.float32) / np.float32(127.5) - 1
    tiles[:, 4] = 1
    return tiles


def _differences(
    runtime: Runtime, tiles_NCHW: NDArray[np.float32], golden: dict[str, NDArray[Any]]
) -> dict[str, float]:
    tasks, found = runtime.manifest.tasks, {}
    if tasks.detect:
        features = encode(runtime.encoder, tiles_NCHW, tasks.detect.encoder_outputs)
        scores, ltrb = runtime.open(tasks.detect.head).run(features, ["scores", "ltrb"])
        found["detect scores"] = float(np.abs(scores - golden["scores"]).max())
        seen = np.broadcast_to(scores.max(axis=1, keepdims=True) > tasks.detect.score_threshold, ltrb.shape)
        relative = np.abs(ltrb - golden["ltrb"]) / np.maximum(np.abs(golden["ltrb"]), tasks.detect.stride)
        found["detect boxes"] = float(relative[seen].max(initial=0.0))
    if tasks.change:
        dates = [encode(runtime.encoder, tiles_NCHW[n : n + 1], tasks.change.encoder_outputs) for n in (0, 1)]
        found["change"] = float(np.abs(runtime.change_detector(*dates) - golden["change"][:, 0]).max())
    if tasks.caption:
        features = encode(runtime.encoder, tiles_NCHW[:1], tasks.caption.encoder_outputs)
        found["caption"] = float(runtime.captioner(features)[0] != str(golden["caption"]))
    return found
