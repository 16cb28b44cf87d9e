"""Where to cut scores: the thresholds of greatest F1 at steps of 0.05, written beside the weights.

``python -m edge_rsvlm.export.default.thresholds`` chooses them anew; it has to be run after each training.

For words and for examples on augmented crops of *training* images: augmentation keeps them from being as easy as the
images learnt. Those for words lie anywhere: most of a scene holds nothing, and each false alarm there counts. For
change on held-out cities, each of which is scored with the threshold that the others choose.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_rsvlm import scoring
from edge_rsvlm.bundle import Bundle, load_bundle
from edge_rsvlm.config.offered import detect_task
from edge_rsvlm.config.task_specs import TextDetectTask
from edge_rsvlm.evaluate import evaluate_change
from edge_rsvlm.export import artifact
from edge_rsvlm.export.chain import run_export
from edge_rsvlm.export.default.data.labels import Labels, visible_share
from edge_rsvlm.export.default.data.objects import CLASSES, KINDS, QUERIES, SETS, ObjectData
from edge_rsvlm.export.default.describe import Thresholds, write_thresholds
from edge_rsvlm.export.default.family import CUT_STAGES
from edge_rsvlm.export.default.splits import FOLDER, held_out
from edge_rsvlm.export.recipe import Recipe
from edge_rsvlm.merge.boxes import BoxMerger
from edge_rsvlm.pipeline.detect import LIKE
from edge_rsvlm.pipeline.examples import embedded
from edge_rsvlm.pipeline.runtime import Runtime, cpu_engine
from edge_rsvlm.pipeline.session import Limits, Session
from edge_rsvlm.scoring import Found, Truth
from edge_rsvlm.tasks.encode import Features, encode
from edge_rsvlm.tasks.like import Examples
from edge_rsvlm.types import Boxes

UNCHOSEN = Thresholds(detect=0.5, like=0.5, change=0.5)
GRID = np.round(np.arange(0.1, 0.75, 0.05), 2)
LIMITS = Limits(memory_bytes=2 << 30, threads=2)
LEAST_SCORE = 0.1
CROPS, CROP_PX = 400, 512
EPISODES, EXAMPLES = 120, 3
KINDS_OF = {query.words[0]: query.kinds for query in QUERIES if query.words[0] in CLASSES}
CLASS_OF = {KINDS.index(kind): name for name, kinds in KINDS_OF.items() for kind in kinds}
F32 = NDArray[np.float32]


@dataclass(frozen=True)
class Detection:
    """What finds objects in tiles."""

    runtime: Runtime
    task: TextDetectTask

    def features(self, tile_CHW: F32) -> Features:
        return encode(self.runtime.open(self.task.encoder), tile_CHW[None], self.task.encoder_outputs)

    def found(self, tile_CHW: F32, queries_QD: F32, names: tuple[str, ...]) -> list[Found]:
        """Boxes of queries with these names, from LEAST_SCORE on."""
        (boxes,) = self.runtime.text_detector(self.task)(self.features(tile_CHW), queries_QD, LEAST_SCORE)
        return merged(boxes, self.task.nms_iou, names)

    def alike(self, tile_CHW: F32, examples: Examples) -> list[Found]:
        """Boxes of what looks like one of the examples, from LEAST_SCORE on."""
        (boxes,) = self.runtime.like_detector(self.task)(self.features(tile_CHW), [examples], LEAST_SCORE)
        return merged(boxes, self.task.nms_iou, (LIKE,))

    def examples(self, tile_CHW: F32, boxes_N4: NDArray[np.float64]) -> Examples:
        """What boxes of a tile look like."""
        return Examples.joined([embedded(self.runtime, self.task, tile_CHW[None], box) for box in boxes_N4])


@dataclass(frozen=True)
class Episode:
    """Boxes [n,4] of one kind in a crop of one image, and a crop of another image with objects of that kind."""

    shown: F32
    boxes: NDArray[np.float64]
    sought: F32
    truth: list[Truth]


def labelled_sets(data: Path, cache: Path) -> list[ObjectData]:
    """Training images of the sets that label every object of the kinds they know."""
    return [ObjectData(spec, data, cache, held_out(spec.name)) for spec in SETS if not spec.sparse]


def query_threshold(detection: Detection, sets: list[ObjectData]) -> float:
    """Of words: each set is asked for the classes whose objects it labels all."""
    rng, counts = np.random.default_rng(0), []
    for data in sets:
        names = tuple(name for name, kinds in KINDS_OF.items() if set(kinds) <= set(data.spec.kinds))
        queries_QD = detection.runtime.text_queries(detection.task, names)
        truth, found = [], []
        for _ in range(CROPS // len(sets)):
            tile, labels = data.crop(str(rng.choice(data.names)), rng, CROP_PX, near=0.0)
            truth.append(truth_in(labels, CLASS_OF.get))
            found.append(detection.found(tile, queries_QD, names))
        counts.append(counted(truth, found, names))
    return best(np.sum(counts, axis=0))


def like_threshold(detection: Detection, sets: list[ObjectData]) -> float:
    """Of examples of one kind from one image, looked for in another."""
    rng, truth, found = np.random.default_rng(0), [], []
    for number in range(EPISODES):
        episode = draw(sets[number % len(sets)], rng)
        truth.append(episode.truth)
        found.append(detection.alike(episode.sought, detection.examples(episode.shown, episode.boxes)))
    return best(counted(truth, found, [LIKE]))


def draw(data: ObjectData, rng: np.random.Generator) -> Episode:
    """The next episode that crops of two images allow."""
    while True:
        names = rng.choice(data.names, 2, replace=False)
        (shown, labels), (sought, others) = (data.crop(str(name), rng, CROP_PX) for name in names)
        whole = _whole(labels)
        common = sorted(set(labels.classes[whole].tolist()) & set(others.classes[_whole(others)].tolist()) - {-1})
        if common:
            kind = int(rng.choice(common))
            boxes = labels.boxes[whole & (labels.classes == kind)]
            picked = boxes[rng.permutation(len(boxes))[:EXAMPLES]]
            return Episode(shown, picked, sought, truth_in(others, {kind: LIKE}.get))


def _whole(labels: Labels) -> NDArray[np.bool_]:
    """Which boxes lie in the crop."""
    return np.array([visible_share(box, CROP_PX) > 0.99 for box in labels.boxes], np.bool_)


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
    stages = [artifact.load(options.weights / name) for name in CUT_STAGES]
    write_thresholds(options.weights, stages, UNCHOSEN)
    out = options.work / "unchosen"
    run_export(Recipe(checkpoint=options.weights, target="onnx:f16", out=out), lambda *_: None)
    bundle = load_bundle(out, allow_unsigned=True, allow_older=True)
    runtime = Runtime(bundle, cpu_engine(2, 0))
    task = detect_task(bundle.manifest)
    assert isinstance(task, TextDetectTask)
    detection, sets = Detection(runtime, task), labelled_sets(options.data, options.work / "cache")
    query_cut, like_cut = query_threshold(detection, sets), like_threshold(detection, sets)
    change_cut, by_others = change_threshold(bundle, options.data)
    chosen = Thresholds(query_cut, like_cut, change_cut, by_others)
    write_thresholds(options.weights, stages, chosen)
    print(f"words {query_cut}, examples {like_cut}, change {change_cut} (others choose {by_others})")


if __name__ == "__main__":
    main()
