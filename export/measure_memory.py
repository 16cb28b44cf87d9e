"""What a task takes of anonymous memory: run in a fresh process, one thread, as the memory plan assumes.

``python -m edge_rsvlm.export.measure_memory BUNDLE TASK`` prints ``{"session_bytes": ..., "tile_bytes": ...}``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from edge_rsvlm.budget import process_bytes
from edge_rsvlm.bundle import load_bundle
from edge_rsvlm.pipeline.runtime import Runtime, caption_task, change_task, cpu_engine, detect_task
from edge_rsvlm.tasks.encode import encode

TILES = 4
UNBOUNDED = 0


def runner(runtime: Runtime, task: str) -> Callable[[int], None]:
    """A function that runs the whole task on n random tiles; its sessions are opened here."""
    encoder, manifest = runtime.encoder, runtime.manifest
    spec = {"detect": manifest.tasks.detect, "change": manifest.tasks.change, "caption": manifest.tasks.caption}[task]
    assert spec is not None
    shape = (len(spec.input.bands), spec.input.tile_px, spec.input.tile_px)
    rng = np.random.default_rng(0)

    def features(count: int) -> dict[str, np.ndarray]:
        tiles = rng.uniform(-1, 1, (count, *shape)).astype(np.float32)
        return encode(encoder, tiles, spec.encoder_outputs)

    if task == "detect":
        detector = runtime.detector(detect_task(manifest).score_threshold)
        return lambda count: void(detector(features(count)))
    if task == "change":
        compare, _ = runtime.change_detector, change_task(manifest)
        return lambda count: void(compare(features(count), features(count)))
    captioner, _ = runtime.captioner, caption_task(manifest)
    return lambda count: void(captioner(features(count)))


def void(_: object) -> None:
    """Drop a result."""


def main() -> None:
    folder, task = Path(sys.argv[1]), sys.argv[2]
    bundle = load_bundle(folder, allow_unsigned=True)
    before = process_bytes()
    run = runner(Runtime(bundle, cpu_engine(1, UNBOUNDED)), task)
    opened = process_bytes()
    # The arena keeps what it took: memory after a run is the run's peak.
    run(1)
    one = process_bytes()
    run(TILES)
    several = process_bytes()
    per_tile = max(one - opened, -(-(several - opened) // TILES))
    print(json.dumps({"session_bytes": opened - before, "tile_bytes": per_tile}))


if __name__ == "__main__":
    main()
