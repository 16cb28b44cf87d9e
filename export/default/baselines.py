"""What a trained model must beat.

Captions: the consensus caption of the nearest training images. For each image, the captions of its NEIGHBOURS nearest
training images (cosine of pretrained features) are pooled, and the one that shares most 1- to 4-grams with the others
is the answer (after Devlin et al. 2015, "Exploring Nearest Neighbor Approaches for Image Captioning"). Classes: that of
the nearest training image. Questions: the answer that training images have most often to the same question, and to any
where it is new. Change: smoothed change vector analysis (Malila 1980), with the best possible threshold, which nobody
has. ``python -m edge_rsvlm.export.default.baselines`` prints them.
"""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_rsvlm import scoring
from edge_rsvlm.export import artifact
from edge_rsvlm.export.default.data.captions import tidy
from edge_rsvlm.export.default.data.change import oscd_pair
from edge_rsvlm.export.default.data.questions import asked
from edge_rsvlm.export.default.data.scenes import Scene, SceneSet, rsicd, training_rsicd, training_ucm, ucm
from edge_rsvlm.export.default.model.encoder import Encoder, Head1280, load_rgb_weights
from edge_rsvlm.export.default.splits import held_out
from edge_rsvlm.export.default.stages import backbone
from edge_rsvlm.export.default.stages.tflite_weights import convolutions
from edge_rsvlm.export.default.truth import Truth, truth

NEIGHBOURS = 5
SMOOTH_PX = 5


@dataclass(frozen=True)
class Captions:
    cider: float
    bleu4: float


@dataclass(frozen=True)
class Baselines:
    """Of captions of UCM and RSICD, accuracy of ``classes`` and ``answers``, F1 of ``change``."""

    ucm: Captions
    rsicd: Captions
    classes: float
    answers: float
    change: float
    told: Truth
    """What the captions of UCM name."""


def baselines(data: Path, work: Path, cache: Path) -> Baselines:
    """On held-out images, from the same training images as the model, and on the held-out cities."""
    scenes = ucm(data, cache)
    known = training_ucm(scenes, artifact.load(work / backbone.NAME))
    others = np.array([i for i, s in enumerate(scenes.scenes) if s.source == "ucm_val"])
    nearest = _nearest(scenes, known, others, data)
    right = [scenes.scenes[i].scene == scenes.scenes[row[0]].scene for i, row in zip(others, nearest, strict=True)]
    said = consensus(scenes, nearest)
    told = truth(said, [scenes.scenes[i].labels for i in others])
    learnt, unseen = ([scenes.scenes[i] for i in part] for part in (known, others))
    return Baselines(
        caption_scores(scenes, others, said), rsicd_captions(data, cache), float(np.mean(right)),
        usual_answers(learnt, unseen), change_vectors(data), told,
    )  # fmt: skip


def rsicd_captions(data: Path, cache: Path) -> Captions:
    """The consensus captions of RSICD's held-out images."""
    scenes = rsicd(data, cache)
    known = training_rsicd(scenes)
    others = np.setdiff1d(np.arange(len(scenes)), known)
    return caption_scores(scenes, others, consensus(scenes, _nearest(scenes, known, others, data)))


def _nearest(scenes: SceneSet, known: NDArray[np.int64], others: NDArray[np.int64], data: Path) -> NDArray[np.int64]:
    """Of each of ``others``, the NEIGHBOURS images of ``known`` that are most like it, the likest first."""
    encoder, head = Encoder().eval(), Head1280().eval()
    load_rgb_weights(encoder, head, convolutions(data / backbone.FILE)[:-1])
    _, features = backbone.pooled(scenes, encoder, head)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    ranked = np.argsort(-(features[others] @ features[known].T), axis=1, kind="stable")
    chosen: NDArray[np.int64] = known[ranked[:, :NEIGHBOURS]]
    return chosen


def consensus(scenes: SceneSet, nearest: NDArray[np.int64]) -> list[str]:
    """A caption for each row of images."""
    captions = [[tidy(c) for c in s.captions] for s in scenes.scenes]
    return [_most_agreed([c for k in row for c in captions[k]]) for row in nearest]


def caption_scores(scenes: SceneSet, others: NDArray[np.int64], said: list[str]) -> Captions:
    captions = [[tidy(c) for c in scenes.scenes[i].captions] for i in others]
    scores = {s.metric: s.value for s in scoring.caption_scores(said, captions)}
    return Captions(scores["CIDEr"], scores["BLEU-4"])


def usual_answers(known: Iterable[Scene], others: Iterable[Scene]) -> float:
    """The share of the questions about ``others`` that the usual answers of ``known`` answer."""
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for q in (q for scene in known for q in asked(scene)):
        answers[scoring.words(q.question)][scoring.words(q.answer)] += 1
    usual = {question: found.most_common(1)[0][0] for question, found in answers.items()}
    most = sum(answers.values(), Counter[str]()).most_common(1)[0][0]
    asked_now = [q for scene in others for q in asked(scene)]
    right = [usual.get(scoring.words(q.question), most) == scoring.words(q.answer) for q in asked_now]
    return float(np.mean(right))


def _most_agreed(pool: list[str]) -> str:
    """The caption with the greatest mean overlap of 1- to 4-grams with the others."""
    grams = [{tuple(w[i : i + n]) for n in range(1, 5) for i in range(len(w) - n + 1)} for w in map(str.split, pool)]
    agreement = [np.mean([len(a & b) / max(len(a | b), 1) for b in grams]) for a in grams]
    return pool[int(np.argmax(agreement))]


def change_vectors(data: Path) -> float:
    """F1 on the held-out OSCD cities of the length of the standardised change vector, at its best threshold."""
    found, changed = [], []
    for city in sorted(held_out("oscd")):
        pair = oscd_pair(data / "oscd" / "train" / city)
        before, after = (_standardised(date) for date in (pair.before, pair.after))
        found.append(_smoothed(np.linalg.norm(after - before, axis=2)).ravel())
        changed.append(pair.mask.ravel() > 0)
    length, truth = np.concatenate(found), np.concatenate(changed)
    order = np.argsort(-length)
    hits = np.cumsum(truth[order])
    return float((2 * hits / (np.arange(1, len(hits) + 1) + truth.sum())).max())


def _standardised(image_HWC: np.ndarray) -> np.ndarray:
    values = image_HWC.astype(np.float64)
    return (values - values.mean(axis=(0, 1))) / values.std(axis=(0, 1))


def _smoothed(values_HW: np.ndarray) -> np.ndarray:
    """Mean over SMOOTH_PX x SMOOTH_PX pixels."""
    padded = np.pad(values_HW, SMOOTH_PX // 2, mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (SMOOTH_PX, SMOOTH_PX))
    smoothed: np.ndarray = windows.mean(axis=(2, 3))
    return smoothed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--work", type=Path, default=Path("build/train"))
    options = parser.parse_args()
    print(baselines(options.data, options.work, options.work / "cache"))


if __name__ == "__main__":
    main()
