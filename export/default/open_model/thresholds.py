"""Where to cut scores: the thresholds of greatest F1 at steps of 0.05, written beside the weights.

``python -m edge_rsvlm.export.default.open_model.thresholds`` chooses them anew; it has to be run after each training.

For words and for examples on augmented crops of *training* images: augmentation keeps them from being as easy as the
images learnt. For change as ``edge_rsvlm.export.default.thresholds`` does it.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_rsvlm.bundle import load_bundle
from edge_rsvlm.config.task_specs import TextDetectTask
from edge_rsvlm.export import artifact
from edge_rsvlm.export.chain import run_export
from edge_rsvlm.export.default.data.labels import Labels, visible_share
from edge_rsvlm.export.default.data.objects import CLASSES, KINDS, QUERIES, SETS, ObjectData
from edge_rsvlm.export.default.describe import write_thresholds
from edge_rsvlm.export.default.open_model.describe import OpenThresholds
from edge_rsvlm.export.default.open_model.family import CUT_STAGES
from edge_rsvlm.export.default.splits import held_out
from edge_rsvlm.export.default.thresholds import (
    CROP_PX,
    CROPS,
    LEAST_SCORE,
    best,
    change_threshold,
    counted,
    merged,
    truth_in,
)
from edge_rsvlm.export.recipe import Recipe
from edge_rsvlm.pipeline.detect import LIKE
from edge_rsvlm.pipeline.examples import mean_example
from edge_rsvlm.pipeline.runtime import Runtime, cpu_engine, detect_task
from edge_rsvlm.scoring import Found, Truth
from edge_rsvlm.tasks.encode import Features, encode

UNCHOSEN = OpenThresholds(detect=0.5, change=0.5, like=0.5)
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

    def example(self, tile_CHW: F32, boxes_N4: NDArray[np.float64]) -> F32:
        """The unit vector [D] of what boxes of a tile show."""
        features, finder = self.features(tile_CHW), self.runtime.text_detector(self.task)
        return mean_example([finder.at(features, (box[:2] + box[2:]) / 2) for box in boxes_N4])


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
            tile, labels = data.crop(str(rng.choice(data.names)), rng, CROP_PX)
            truth.append(truth_in(labels, CLASS_OF.get))
            found.append(detection.found(tile, queries_QD, names))
        counts.append(counted(truth, found, names))
    return best(np.sum(counts, axis=0))


def like_threshold(detection: Detection, sets: list[ObjectData]) -> float:
    """Of examples of one kind from one image, looked for in another."""
    rng, truth, found = np.random.default_rng(0), [], []
    for number in range(EPISODES):
        episode = draw(sets[number % len(sets)], rng)
        vector_D = detection.example(episode.shown, episode.boxes)
        truth.append(episode.truth)
        found.append(detection.found(episode.sought, vector_D[None], (LIKE,)))
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--weights", type=Path, default=Path("export/default/weights"), help="artifacts of the stages")
    parser.add_argument("--work", type=Path, default=Path("build/open"))
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
    chosen = OpenThresholds(detect=query_cut, change=change_cut, change_by_others=by_others, like=like_cut)
    write_thresholds(options.weights, stages, chosen)
    print(f"words {query_cut}, examples {like_cut}, change {change_cut} (others choose {by_others})")


if __name__ == "__main__":
    main()
