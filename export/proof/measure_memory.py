"""What a task takes of anonymous memory: run in a fresh process, one thread, as the memory plan assumes.

``python -m edge_rsvlm.export.proof.measure_memory BUNDLE VERB`` prints ``{"session_bytes": ..., "tile_bytes": ...}``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from edge_rsvlm.budget import process_bytes
from edge_rsvlm.bundle import load_bundle
from edge_rsvlm.config.inputs import InputSpec
from edge_rsvlm.config.offered import object_task, task_of
from edge_rsvlm.config.task_specs import (
    AnswerTask,
    ChangeTask,
    DetectTask,
    GenerateTask,
    GgufTask,
    OpenDetectTask,
    ReferTask,
    SegmentTask,
    TextDetectTask,
)
from edge_rsvlm.pipeline.runtime import Runtime, cpu_engine
from edge_rsvlm.pipeline.scaling import per_channel
from edge_rsvlm.tasks.encode import encode
from edge_rsvlm.tasks.search import Sampling
from edge_rsvlm.tiles.prepare import Prepared, prepare
from edge_rsvlm.types import Boxes

TILES = 4
UNBOUNDED = 0
TEXT = "how many airplanes are on the apron"
REGIONS = 36
ANSWER_TOKENS = 8
"""Enough for a prefill and some steps; what the cache of a whole answer takes is counted apart."""
Run = Callable[[int], object]


def runner(runtime: Runtime, verb: str) -> Run:
    """A function that runs the whole task on n random tiles."""
    task = task_of(runtime.manifest, verb)
    if isinstance(task, AnswerTask):
        answerer, spec = runtime.answerer(task), task.input
        return lambda n: answerer(pixels(spec, n) if spec else regions(runtime, task, n), TEXT)
    if isinstance(task, DetectTask):
        detector, encoder = runtime.detector(task), runtime.open(task.encoder)
        return lambda n: detector(encode(encoder, pixels(task.input, n), task.encoder_outputs))
    if isinstance(task, ChangeTask):
        changes = runtime.change_detector(task)
        return lambda n: changes(pixels(task.input, n), pixels(task.input, n))
    if isinstance(task, (GenerateTask, GgufTask)):
        return writer(runtime, verb, task)
    if isinstance(task, OpenDetectTask):
        detect = runtime.open_detector(task, ["airplane"])
        return lambda n: detect(pixels(task.input, n))
    if isinstance(task, SegmentTask):
        segmenter, encoder = runtime.segmenter(task, ["trees"]), runtime.open(task.encoder)
        return lambda n: segmenter.embeddings(encode(encoder, pixels(task.input, n), task.encoder_outputs))
    if isinstance(task, TextDetectTask):
        find, compare = finder(runtime, task), comparer(runtime, task)
        return lambda n: (find(n), compare())
    if isinstance(task, ReferTask):
        find, choose = finder(runtime, object_task(runtime.manifest)), chooser(runtime, task)
        return lambda n: (find(n), choose())
    matcher = runtime.matcher(verb, task)
    return lambda n: (matcher.texts([TEXT]), matcher.images(pixels(task.input, n)))


def finder(runtime: Runtime, task: TextDetectTask) -> Run:
    """The classes of the detect task, looked for by their words."""
    detector, encoder = runtime.text_detector(task), runtime.open(task.encoder)
    queries_QD, least = runtime.text_queries(task, task.classes), task.score_threshold
    return lambda n: detector(encode(encoder, pixels(task.input, n), task.encoder_outputs), queries_QD, least)


def comparer(runtime: Runtime, task: TextDetectTask) -> Callable[[], object]:
    """What as many boxes look like as a tile can have; tiles take turns."""
    detector, encoder = runtime.like_detector(task), runtime.open(task.encoder)
    boxes = random_boxes(task.max_boxes_per_tile, task.input.tile_px)
    return lambda: detector.vectors(encode(encoder, pixels(task.input, 1), task.encoder_outputs), boxes)


def writer(runtime: Runtime, verb: str, task: GenerateTask | GgufTask) -> Run:
    """A short answer."""
    generator = runtime.generator(verb, task)
    short = Sampling(temperature=0.0, max_tokens=min(ANSWER_TOKENS, task.max_tokens))
    return lambda n: generator([prepared(task.input, k) for k in range(n)], TEXT, short)


def chooser(runtime: Runtime, task: ReferTask) -> Callable[[], object]:
    """A phrase read beside as many objects as it can be."""
    count, side, referrer = task.most_objects, task.input.tile_px, runtime.referrer(task)
    objects = Boxes(random_boxes(count, side), np.ones(count, np.float32), np.zeros(count, np.int64))
    return lambda: referrer(TEXT, objects, (side, side))


def random_boxes(count: int, side: int) -> np.ndarray:
    """Corners [count, 4] in a square of this side."""
    return np.hstack([*np.sort(np.random.default_rng(0).uniform(0, side, (2, count, 2)), axis=0)])


def prepared(spec: InputSpec, seed: int) -> Prepared:
    """A random tile as the model sees it."""
    rng, side = np.random.default_rng(seed), spec.tile_px
    if not spec.prepare:
        tile = rng.uniform(-1, 1, (1, len(spec.bands), side, side)).astype(np.float32)
        return Prepared(tile, 1, 1, (1.0, 1.0, 0.0, 0.0))
    image = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
    mean, std = (per_channel(value, len(spec.bands)) for value in (spec.mean, spec.std))
    return prepare(image, spec.prepare, mean, std)


def pixels(spec: InputSpec, count: int) -> np.ndarray:
    return np.concatenate([prepared(spec, seed).pixels_KCHW for seed in range(count)])


def regions(runtime: Runtime, task: AnswerTask, count: int) -> np.ndarray:
    """Random features, as wide as the task's golden probe says."""
    case = next(case for case in runtime.manifest.probe if case.graph == task.graph)
    with np.load(runtime.bundle.path(case.file), allow_pickle=False) as stored:
        width = stored[f"in.{runtime.manifest.graphs[task.graph].inputs['features']}"].shape[-1]
    return np.random.default_rng(0).standard_normal((count, REGIONS, width)).astype(np.float32)


def main() -> None:
    folder, verb = Path(sys.argv[1]), sys.argv[2]
    bundle = load_bundle(folder, allow_unsigned=True, allow_older=True)
    before = process_bytes()
    run = runner(Runtime(bundle, cpu_engine(1, UNBOUNDED)), verb)
    opened = process_bytes()
    # Engines keep what they took: memory after a run is the run's peak. Weights of llama.cpp are mapped, and do not
    # count; its caches and buffers, and weights in another layout than the file's, do.
    run(1)
    one = process_bytes()
    run(TILES)
    several = process_bytes()
    # llama.cpp opens with the caches of one image: what more images take is not their mean.
    per_tile = max(one - opened, -(-(several - one) // (TILES - 1)), 1)
    print(json.dumps({"session_bytes": max(opened - before, 1), "tile_bytes": per_tile}))


if __name__ == "__main__":
    main()
