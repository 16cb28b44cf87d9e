"""Where to cut scores: the threshold of greatest F1 at steps of 0.05, written beside the weights.

``python -m edge_rsvlm.export.default.thresholds`` chooses them anew; it has to be run after each training.

For boxes on augmented crops of *training* images: augmentation keeps them from being as easy as the images learnt. For
change on held-out cities, each of which is scored with the threshold that the others choose.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edge_rsvlm import scoring
from edge_rsvlm.bundle import Bundle, load_bundle
from edge_rsvlm.config.task_specs import DetectTask
from edge_rsvlm.evaluate import evaluate_change
from edge_rsvlm.export import artifact
from edge_rsvlm.export.chain import run_export
from edge_rsvlm.export.default.data.detect import SETS, DetectData, crop
from edge_rsvlm.export.default.data.labels import Labels
from edge_rsvlm.export.default.describe import Thresholds, write_thresholds
from edge_rsvlm.export.default.model.detect import CLASSES
from edge_rsvlm.export.default.splits import FOLDER, held_out
from edge_rsvlm.export.default.stages import change, joint
from edge_rsvlm.export.recipe import Recipe
from edge_rsvlm.merge.boxes import BoxMerger
from edge_rsvlm.pipeline.runtime import Runtime, cpu_engine, detect_task
from edge_rsvlm.pipeline.session import Limits, Session
from edge_rsvlm.scoring import Found, Truth
from edge_rsvlm.tasks.encode import encode
from edge_rsvlm.types import Boxes

UNCHOSEN = Thresholds(detect=0.5, change=0.5)
GRID = np.round(np.arange(0.1, 0.75, 0.05), 2)
LIMITS = Limits(memory_bytes=2 << 30, threads=2)
LEAST_SCORE = 0.1
CROPS = 160
CROP_PX = 512
LABELLED = ("hrplanes", "airbus_aircraft", "aerial_airport")
"""Sets whose airplanes are all labelled; the other classes share the threshold."""


def change_threshold(bundle: Bundle, data: Path) -> tuple[float, dict[str, float]]:
    """The threshold to ship, and for each held-out OSCD city the one that the *other* cities choose.

    On cities that were trained on the head is too sure of itself to choose there. Where all cities choose alike, the
    score of each is one with a threshold that it had no part in.
    """
    curves: dict[str, list[float]] = {}
    for threshold in GRID:
        session = Session(with_change_threshold(bundle, float(threshold)), LIMITS)
        only = FOLDER / "oscd.txt"
        for score in evaluate_change(session, data / "oscd" / "train", only, None).scores:
            if score.metric == "F1" and score.label:
                curves.setdefault(score.label, []).append(score.value)
    chosen = {
        city: float(GRID[int(np.mean([c for name, c in curves.items() if name != city], axis=0).argmax())])
        for city in curves
    }
    return float(np.median(list(chosen.values()))), chosen


def with_change_threshold(bundle: Bundle, threshold: float) -> Bundle:
    """The same bundle, cutting change scores elsewhere."""
    tasks = bundle.manifest.tasks
    assert tasks.change is not None
    tasks = tasks.model_copy(update={"change": tasks.change.model_copy(update={"threshold": threshold})})
    return dataclasses.replace(bundle, manifest=bundle.manifest.model_copy(update={"tasks": tasks}))


def detect_threshold(runtime: Runtime, data: Path, cache: Path) -> float:
    task, rng = detect_task(runtime.manifest), np.random.default_rng(0)
    assert isinstance(task, DetectTask)
    detector, encoder = runtime.detector(task, LEAST_SCORE), runtime.open(task.encoder)
    sets = [DetectData(spec, data, cache, held_out(spec.name)) for spec in SETS if spec.name in LABELLED]
    truth: list[list[Truth]] = []
    found: list[list[Found]] = []
    for i in range(CROPS):
        tile, labels = crop(sets[i % len(sets)], rng, CROP_PX)
        (boxes,) = detector(encode(encoder, tile[None], task.encoder_outputs))
        truth.append(truth_in(labels, lambda _: "airplane"))
        found.append(merged(boxes, task.nms_iou, CLASSES))
    return best(counted(truth, found, ["airplane"]))


def truth_in(labels: Labels, name: Callable[[int], str | None]) -> list[Truth]:
    """Boxes in the crop by the name of their class (None: of no interest); what lies half outside, or is marked as
    ignored, counts neither way."""
    rows = []
    for (x0, y0, x1, y1), label in zip(labels.boxes, labels.classes, strict=True):
        w, h = min(x1, CROP_PX) - max(x0, 0), min(y1, CROP_PX) - max(y0, 0)
        known = name(int(label)) if label >= 0 else None
        if w > 0 and h > 0 and (known is not None or label < 0):
            whole = label >= 0 and w * h > 0.5 * (x1 - x0) * (y1 - y0)
            rows.append(Truth(known, (max(x0, 0.0), max(y0, 0.0), w, h), ignore=not whole))
    return rows


def merged(boxes: Boxes, nms_iou: float, names: Sequence[str]) -> list[Found]:
    """Boxes of a tile as a scene would have them, by the names of their labels."""
    merger = BoxMerger(nms_iou)
    merger.feed(boxes, 0.0)
    kept = merger.flush()
    rows: Any = zip(kept.xyxy_N4, kept.scores_N, kept.labels_N, strict=True)
    return [Found(names[label], float(score), (x0, y0, x1 - x0, y1 - y0)) for (x0, y0, x1, y1), score, label in rows]


def counted(truth: Sequence[list[Truth]], found: Sequence[list[Found]], names: Sequence[str]) -> np.ndarray:
    """True and false positives and false negatives [G, 3] at each threshold of GRID, over all classes."""
    matches = scoring.match_detections(truth, found, names).values()
    return np.array([np.sum([m.counts(threshold).sum(axis=0) for m in matches], axis=0) for threshold in GRID])


def best(counts_G3: np.ndarray) -> float:
    """The threshold of greatest F1."""
    return float(GRID[int(scoring.rates(counts_G3)[:, 2].argmax())])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--weights", type=Path, default=Path("export/default/weights"), help="artifacts of the stages")
    parser.add_argument("--work", type=Path, default=Path("build/default"))
    options = parser.parse_args()
    stages = [artifact.load(options.weights / stage.NAME) for stage in (joint, change)]
    write_thresholds(options.weights, stages, UNCHOSEN)
    out = options.work / "unchosen"
    run_export(Recipe(checkpoint=options.weights, target="onnx:f16", out=out), lambda *_: None)
    bundle = load_bundle(out, allow_unsigned=True, allow_older=True)
    detect_cut = detect_threshold(Runtime(bundle, cpu_engine(2, 0)), options.data, options.work / "cache")
    change_cut, by_others = change_threshold(bundle, options.data)
    write_thresholds(options.weights, stages, Thresholds(detect_cut, change_cut, by_others))
    print(f"boxes {detect_cut}, change {change_cut} (others choose {by_others})")


if __name__ == "__main__":
    main()
