"""Scores of a bundle on labelled images, through the pipeline that users run, over whole images.

An image that cannot be read ends the evaluation: a score over the others would not be the one asked for.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_rsvlm import scoring
from edge_rsvlm.errors import InputError, UsageError
from edge_rsvlm.pipeline.detect import DetectQuery
from edge_rsvlm.pipeline.outcome import Progress
from edge_rsvlm.pipeline.runtime import caption_task, change_task, detect_task
from edge_rsvlm.pipeline.session import Session, georeference
from edge_rsvlm.raster.inputs import SUFFIXES, Source, list_inputs
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
    """AP50, AP50:95, and precision, recall and F1 at the bundle's threshold, against a COCO file."""
    task = detect_task(session.bundle.manifest)
    scoring.detection_libraries()
    labels, truth_of = _coco(annotations)
    vocabulary = {rules.renamed(name) for name in task.classes}
    _check_rules(rules, labels, task.classes, vocabulary)
    categories = dict.fromkeys(rules.renamed(name) for name in labels if name not in rules.ignore)
    scored = [name for name in categories if name in vocabulary]
    names = _chosen(list(truth_of), only, annotations)
    truth = [list(_scored_truth(truth_of[name], rules, scored)) for name in names]
    if not any(not box.ignore for boxes in truth for box in boxes):
        known = ", ".join(task.classes)
        raise UsageError(f"{annotations} has no box of a class that the bundle knows ({known})", fix="use --alias")
    found = [_detections(session, source.path, rules) for source in _counted(_locate(images, names), progress)]
    matches = scoring.match_detections(truth, found, scored)
    scores = scoring.detection_scores(matches, task.score_threshold)
    return Evaluation("detect", len(names), tuple(scores), tuple(sorted(categories.keys() - vocabulary)))


def evaluate_change(session: Session, folder: Path, only: Path | None, progress: Progress | None) -> Evaluation:
    """Precision, recall and F1 of changed pixels, per pair and pooled, on the mask that ``change --mask`` writes.

    ``folder`` holds a folder per pair with t1, t2 and change images. Pixels without valid data are left out.
    """
    change_task(session.bundle.manifest)
    pairs = _pairs(folder)
    names = _chosen(list(pairs), only, folder)
    counts = np.array([_compare(session, *pairs[name]) for name in _counted(names, progress)])
    each = [score for name, row in zip(names, counts, strict=True) for score in scoring.rate_scores(row[None], name)]
    return Evaluation("change", len(names), (*each, *scoring.rate_scores(counts)))


def evaluate_caption(
    session: Session, captions: Path, images: str, only: Path | None, progress: Progress | None
) -> Evaluation:
    """CIDEr and BLEU-4 of the caption of each image, against JSON lines of ``{"image", "captions"}``."""
    caption_task(session.bundle.manifest)
    scoring.caption_libraries()
    references = _references(captions)
    names = _chosen(list(references), only, captions)
    said = [_caption(session, source.path) for source in _counted(_locate(images, names), progress)]
    scores = scoring.caption_scores(said, [references[name] for name in names])
    return Evaluation("caption", len(names), tuple(scores))


def _counted(items: Sequence[Any], progress: Progress | None) -> Iterator[Any]:
    for done, item in enumerate(items):
        if progress:
            progress(done, len(items))
        yield item


def _detections(session: Session, path: str, rules: LabelRules) -> list[Found]:
    found: list[Found] = []

    def collect(record: dict[str, Any], _: object) -> None:
        x, y, w, h = record["box"]
        found.append(Found(rules.renamed(record["label"]), record["score"], (x, y, w, h)))

    session.detect(path, DetectQuery(score_threshold=LEAST_SCORE), collect)
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


def _chosen(known: Sequence[str], only: Path | None, where: Path) -> list[str]:
    """All names, or those that a file lists, one a line; UsageError for one that is not there."""
    if only is None:
        return list(known)
    lines = [line.partition("#")[0].strip() for line in _text(only).splitlines()]
    wanted = list(dict.fromkeys(line for line in lines if line))
    for name in wanted:
        if name not in known:
            raise UsageError(f"{only}: '{name}' is not in {where}", fix=_nearest(name, known))
    if not wanted:
        raise UsageError(f"{only} names nothing", fix="write one name per line")
    return wanted


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4)
    return f"did you mean '{near[0]}'?" if near else "take the names from there"


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise UsageError(f"cannot read {path} ({exc})", fix="name an existing text file") from exc


def _locate(images: str, names: Sequence[str]) -> list[Source]:
    """Where each named image is: in a folder, or in a .tar by its name or the end of it."""
    folder = Path(images)
    if folder.is_dir():
        known = {name: str(folder / name) for name in names if (folder / name).is_file()}
    else:
        sources = list_inputs([images])
        known = {Path(s.name).name: s.path for s in sources} | {s.name: s.path for s in sources}
    missing = [name for name in names if name not in known]
    if missing:
        problem = f"{images}: {len(missing)} of {len(names)} images are not in it, such as '{missing[0]}'"
        raise InputError(problem, fix="name the folder or .tar that holds them, or choose others with --only")
    return [Source(name, known[name]) for name in names]


def _coco(path: Path) -> tuple[list[str], dict[str, list[Truth]]]:
    """Category names, and the labelled boxes by image name."""
    try:
        data = json.loads(_text(path))
        labels = {category["id"]: str(category["name"]) for category in data["categories"]}
        names = {image["id"]: str(image["file_name"]) for image in data["images"]}
        truth: dict[str, list[Truth]] = {name: [] for name in names.values()}
        for annotation in data["annotations"]:
            x, y, w, h = map(float, annotation["bbox"])
            box = Truth(labels[annotation["category_id"]], (x, y, w, h), bool(annotation.get("iscrowd", 0)))
            truth[names[annotation["image_id"]]].append(box)
    except (ValueError, TypeError, KeyError) as exc:
        raise UsageError(
            f"{path} is not a COCO file of boxes ({exc!r})", fix="see cocodataset.org/#format-data"
        ) from exc
    if not truth:
        raise UsageError(f"{path} lists no image", fix="name a COCO file of boxes")
    return list(labels.values()), truth


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


def _scored_truth(boxes: Sequence[Truth], rules: LabelRules, scored: Sequence[str]) -> Iterator[Truth]:
    for box in boxes:
        assert box.label is not None
        if box.label in rules.ignore:
            yield Truth(None, box.box, ignore=True)
        elif (label := rules.renamed(box.label)) in scored:
            yield Truth(label, box.box, box.ignore)


def _pairs(folder: Path) -> dict[str, tuple[str, str, str]]:
    """Before, after and label image by pair name."""
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder", fix="name one that holds a folder per pair")
    pairs = {}
    for pair in sorted(p for p in folder.iterdir() if p.is_dir()):
        images = {p.stem: str(p) for p in sorted(pair.iterdir()) if p.suffix.lower() in SUFFIXES}
        lacking = [stem for stem in ("t1", "t2", "change") if stem not in images]
        if lacking:
            raise InputError(f"{pair} has no image '{lacking[0]}'", fix="give each pair t1, t2 and change")
        pairs[pair.name] = (images["t1"], images["t2"], images["change"])
    if not pairs:
        raise UsageError(f"{folder} holds no pair", fix="give it a folder per pair with t1, t2 and change")
    return pairs


def _references(path: Path) -> dict[str, list[str]]:
    """Captions by image name."""
    references: dict[str, list[str]] = {}
    for number, line in enumerate(_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            name, captions = str(record["image"]), record["captions"]
            if not isinstance(captions, list):
                raise TypeError("captions is no list")
        except (ValueError, TypeError, KeyError) as exc:
            fix = 'write {"image": "a.tif", "captions": ["..."]}'
            raise UsageError(f"{path}, line {number} is no captioned image ({exc!r})", fix=fix) from exc
        if not captions:
            raise UsageError(f"{path}, line {number}: '{name}' has no caption", fix="remove the line or caption it")
        references[name] = [str(text) for text in captions]
    if not references:
        raise UsageError(f"{path} lists no image", fix='write lines of {"image": "a.tif", "captions": ["..."]}')
    return references
