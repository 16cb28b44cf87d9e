"""Scores of a bundle on labelled images, through the pipeline that users run, over whole images.

An image that cannot be read ends the evaluation: a score over the others would not be the one asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_rsvlm import scoring
from edge_rsvlm.config.offered import detect_task
from edge_rsvlm.config.task_specs import DetectTask
from edge_rsvlm.errors import InputError, UsageError
from edge_rsvlm.evaluate.labels import chosen, locate, read_captions, read_coco, read_labels, read_pairs, read_questions
from edge_rsvlm.pipeline.detect import DetectQuery
from edge_rsvlm.pipeline.outcome import Progress
from edge_rsvlm.pipeline.session import Session, georeference
from edge_rsvlm.pipeline.vocabulary import check_texts
from edge_rsvlm.raster.reader import open_raster
from edge_rsvlm.scoring import Found, Score, Truth
from edge_rsvlm.types import Window

LEAST_SCORE = 0.05
"""Detections are collected from here on, so that the curve behind AP is not cut at the bundle's own threshold."""


@dataclass(frozen=True)
class Evaluation:
    """``samples`` images or pairs; ``not_scored`` names categories that the bundle does not know."""

    task: str
    samples: int
    scores: tuple[Score, ...]
    not_scored: tuple[str, ...] = ()


@dataclass(frozen=True)
class LabelRules:
    """How the labels of a data set become those that are scored.

    ``alias`` renames labels of the data set and of the bundle alike, so that classes can also be scored as one. Boxes
    labelled with one of ``ignore`` count neither way, for any class.
    """

    ignore: tuple[str, ...] = ()
    alias: Mapping[str, str] | None = None

    def renamed(self, label: str) -> str:
        return (self.alias or {}).get(label, label)


def evaluate_detect(
    session: Session, annotations: Path, images: str, only: Path | None, rules: LabelRules, progress: Progress | None
) -> Evaluation:
    """AP50, AP50:95, and precision, recall and F1 at the bundle's threshold, against a COCO file.

    A bundle that reads words is asked for what is scored: for the aliases of the file's categories, or for their names
    where it never learnt an alias.
    """
    task = detect_task(session.bundle.manifest)
    scoring.detection_libraries()
    labels, truth_of = read_coco(annotations)
    classes = task.classes if isinstance(task, DetectTask) else _askable(session, labels, rules)
    vocabulary = {rules.renamed(name) for name in classes}
    _check_rules(rules, labels, classes, vocabulary)
    categories = dict.fromkeys(rules.renamed(name) for name in labels if name not in rules.ignore)
    scored = [name for name in categories if name in vocabulary]
    names = chosen(list(truth_of), only, annotations)
    truth = [list(scored_truth(truth_of[name], rules, scored)) for name in names]
    if not any(not box.ignore for boxes in truth for box in boxes):
        known = ", ".join(classes)
        raise UsageError(f"{annotations} has no box of a class that the bundle knows ({known})", fix="use --alias")
    wanted = DetectQuery(() if isinstance(task, DetectTask) else classes, LEAST_SCORE)
    found = [
        detections(session, source.path, wanted, rules.renamed) for source in counted(locate(images, names), progress)
    ]
    matches = scoring.match_detections(truth, found, scored)
    scores = scoring.detection_scores(matches, task.score_threshold)
    return Evaluation("detect", len(names), tuple(scores), tuple(sorted(categories.keys() - vocabulary)))


def evaluate_change(session: Session, folder: Path, only: Path | None, progress: Progress | None) -> Evaluation:
    """Precision, recall and F1 of changed pixels, per pair and pooled, on the mask that ``change --mask`` writes.

    ``folder`` holds a folder per pair with t1, t2 and change images. Pixels without valid data are left out.
    """
    session.require("change")
    pairs = read_pairs(folder)
    names = chosen(list(pairs), only, folder)
    counts = np.array([_compare(session, *pairs[name]) for name in counted(names, progress)])
    each = [score for name, row in zip(names, counts, strict=True) for score in scoring.rate_scores(row[None], name)]
    return Evaluation("change", len(names), (*each, *scoring.rate_scores(counts)))


def evaluate_caption(
    session: Session, captions: Path, images: str, only: Path | None, progress: Progress | None
) -> Evaluation:
    """CIDEr and BLEU-4 of the caption of each image, against JSON lines of ``{"image", "captions"}``."""
    session.require("caption")
    scoring.caption_libraries()
    references = read_captions(captions)
    names = chosen(list(references), only, captions)
    said = [_caption(session, source.path) for source in counted(locate(images, names), progress)]
    scores = scoring.caption_scores(said, [references[name] for name in names])
    return Evaluation("caption", len(names), tuple(scores))


def evaluate_ask(
    session: Session, questions: Path, images: str, only: Path | None, progress: Progress | None
) -> Evaluation:
    """Share of answers that equal the labelled one but for case and punctuation: all together and per type.

    ``questions`` has JSON lines of ``{"image", "questions": [{"question", "answer", "type"?}]}``.
    """
    session.require("ask")
    asked = read_questions(questions)
    names = chosen(list(asked), only, questions)
    check_texts(session.bundle, "ask", [q.question for name in names for q in asked[name]])
    rows: list[tuple[int, str | None, bool]] = []
    for i, source in enumerate(counted(locate(images, names), progress)):
        for q in asked[names[i]]:
            answer = session.ask(source.path, q.question, lambda *_: None).answer or ""
            rows.append((i, q.type, scoring.words(answer) == scoring.words(q.answer)))
    types = sorted({kind for _, kind, _ in rows if kind is not None})
    scores = [_accuracy(rows, len(names), kind) for kind in [*types, None]]
    return Evaluation("ask", len(names), tuple(scores))


def _accuracy(rows: Sequence[tuple[int, str | None, bool]], images: int, kind: str | None) -> Score:
    """Of the questions of a type, or of all for None."""
    right_I, asked_I = np.zeros(images, np.int64), np.zeros(images, np.int64)
    for i, of_type, right in rows:
        if kind in (None, of_type):
            asked_I[i] += 1
            right_I[i] += right
    return scoring.accuracy_score(right_I, asked_I, kind)


def evaluate_classify(
    session: Session, labels: Path, images: str, only: Path | None, progress: Progress | None
) -> Evaluation:
    """Share of images whose best class is the labelled one, per class and all together.

    ``labels`` has JSON lines of ``{"image", "label"}``. The classes to choose from are all labels of the file,
    also where ``only`` leaves images out.
    """
    session.require("classify")
    truth = read_labels(labels)
    names = chosen(list(truth), only, labels)
    classes = tuple(sorted(set(truth.values())))
    rows: list[tuple[int, str | None, bool]] = []
    for i, source in enumerate(counted(locate(images, names), progress)):
        found = session.classify(source.path, classes, lambda *_: None).labels
        label = truth[names[i]]
        rows.append((i, label, bool(found) and found[0][0] == label))
    shown = sorted({truth[name] for name in names})
    scores = [_accuracy(rows, len(names), kind) for kind in [*shown, None]]
    return Evaluation("classify", len(names), tuple(scores))


def _askable(session: Session, labels: Sequence[str], rules: LabelRules) -> tuple[str, ...]:
    """The words for the categories of a file, as far as the bundle learnt them."""
    asked = []
    for name in dict.fromkeys(labels):
        for word in () if name in rules.ignore else (rules.renamed(name), name):
            with suppress(UsageError):
                check_texts(session.bundle, "detect", [word])
                asked.append(word)
                break
    return tuple(dict.fromkeys(asked))


def counted(items: Sequence[Any], progress: Progress | None) -> Iterator[Any]:
    """The items, reported to ``progress`` one by one."""
    for done, item in enumerate(items):
        if progress:
            progress(done, len(items))
        yield item


def detections(session: Session, path: str, query: DetectQuery, renamed: Callable[[str], str]) -> list[Found]:
    """What is found in one image, under the names that are scored."""
    found: list[Found] = []

    def collect(record: dict[str, Any], _: object) -> None:
        x, y, w, h = record["box"]
        found.append(Found(renamed(record["label"]), record["score"], (x, y, w, h)))

    session.detect(path, query, collect)
    return found


def _caption(session: Session, path: str) -> str:
    return session.caption(path, lambda *_: None).caption or ""


def _compare(session: Session, before: str, after: str, reference: str) -> NDArray[np.int64]:
    where = georeference(after)
    mask_HW = np.full((where.height, where.width), scoring.UNKNOWN, np.uint8)

    def keep(first: int, rows_RW: NDArray[np.uint8]) -> None:
        mask_HW[first : first + len(rows_RW)] = rows_RW

    changed_HW = _changed(reference)
    if changed_HW.shape != mask_HW.shape:
        sizes = f"{changed_HW.shape[::-1]} and {mask_HW.shape[::-1]} pixels"
        raise InputError(f"{reference} and {after} differ in size ({sizes})", fix="label the later image's grid")
    session.change(before, after, lambda *_: None, keep)
    return scoring.change_counts(mask_HW, changed_HW)


def _changed(path: str) -> NDArray[np.bool_]:
    """Where a label image is brighter than half of its maximum: masks of {0, 1}, {0, 255} and {1, 2} alike."""
    with open_raster(path) as raster:
        size = Window(0, 0, raster.georeference.width, raster.georeference.height)
        values_HW = raster.read(size).data_CHW.max(axis=0).astype(np.float32)
    changed: NDArray[np.bool_] = values_HW > values_HW.max() / 2
    return changed


def _check_rules(rules: LabelRules, labels: Sequence[str], classes: Sequence[str], vocabulary: set[str]) -> None:
    """Every label of the rules exists: a mistyped one would silently change the score."""
    for name in rules.ignore:
        if name not in labels:
            raise UsageError(f"no category '{name}' to ignore", fix=f"categories: {', '.join(labels)}")
    for old, new in (rules.alias or {}).items():
        if old not in (*labels, *classes):
            raise UsageError(f"no label '{old}' to rename", fix=f"categories: {', '.join(labels)}")
        if new not in vocabulary:
            raise UsageError(f"'{new}' is no class of this bundle", fix=f"classes: {', '.join(sorted(vocabulary))}")


def scored_truth(boxes: Sequence[Truth], rules: LabelRules, scored: Sequence[str]) -> Iterator[Truth]:
    """The boxes of one image that count, under the names that are scored, and those that count neither way."""
    for box in boxes:
        assert box.label is not None
        if box.label in rules.ignore:
            yield Truth(None, box.box, ignore=True)
        elif (label := rules.renamed(box.label)) in scored:
            yield Truth(label, box.box, box.ignore)
