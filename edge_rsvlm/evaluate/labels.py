"""Files of labels, and the images that they speak of."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from edge_rsvlm.errors import InputError, UsageError
from edge_rsvlm.raster.inputs import SUFFIXES, Source, list_inputs
from edge_rsvlm.scoring import Truth


class Question(NamedTuple):
    question: str
    answer: str
    type: str | None


Box = tuple[float, float, float, float]
"""x, y, width, height in pixels."""


class Phrase(NamedTuple):
    phrase: str
    boxes: tuple[Box, ...]


def chosen(known: Sequence[str], only: Path | None, where: Path) -> list[str]:
    """All names, or those that a file lists, one a line; UsageError for one that is not there."""
    if only is None:
        return list(known)
    wanted = read_names(only)
    for name in wanted:
        if name not in known:
            raise UsageError(f"{only}: '{name}' is not in {where}", fix=_nearest(name, known))
    if not wanted:
        raise UsageError(f"{only} names nothing", fix="write one name per line")
    return wanted


def read_names(file: Path) -> list[str]:
    """Names that a file lists, one a line; what follows a # is for people."""
    lines = [line.partition("#")[0].strip() for line in _text(file).splitlines()]
    return list(dict.fromkeys(line for line in lines if line))


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4)
    return f"did you mean '{near[0]}'?" if near else "take the names from there"


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise UsageError(f"cannot read {path} ({exc})", fix="name an existing text file") from exc


def locate(images: str, names: Sequence[str]) -> list[Source]:
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


def read_coco(path: Path) -> tuple[list[str], dict[str, list[Truth]]]:
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


def read_pairs(folder: Path) -> dict[str, tuple[str, str, str]]:
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


def _lines(path: Path, example: str) -> Iterator[tuple[str, dict[str, Any], str]]:
    """(image, record, where) of every line; UsageError for one that is no object with an image, or for none."""
    count = 0
    for number, line in enumerate(_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
            name = record["image"]
        except (ValueError, TypeError, KeyError) as exc:
            raise UsageError(f"{where} names no image ({exc!r})", fix=f"write {example}") from exc
        count += 1
        yield str(name), record, where
    if not count:
        raise UsageError(f"{path} lists no image", fix=f"write lines of {example}")


def read_captions(path: Path) -> dict[str, list[str]]:
    """Captions by image name."""
    example = '{"image": "a.tif", "captions": ["..."]}'
    references: dict[str, list[str]] = {}
    for name, record, where in _lines(path, example):
        captions = record.get("captions")
        if not isinstance(captions, list) or not captions:
            raise UsageError(f"{where}: '{name}' has no list of captions", fix=f"write {example}, or remove the line")
        references[name] = [str(text) for text in captions]
    return references


def read_questions(path: Path) -> dict[str, list[Question]]:
    """Questions by image name; lines of one image add up."""
    example = '{"image": "a.tif", "questions": [{"question": "...", "answer": "...", "type": "count"}]}'
    asked: dict[str, list[Question]] = {}
    for name, record, where in _lines(path, example):
        try:
            found = [
                Question(str(q["question"]), str(q["answer"]), None if q.get("type") is None else str(q["type"]))
                for q in record["questions"]
            ]
        except (TypeError, KeyError, AttributeError) as exc:
            raise UsageError(f"{where}: '{name}' has no list of questions ({exc!r})", fix=f"write {example}") from exc
        if not found:
            raise UsageError(f"{where}: '{name}' has no question", fix="remove the line or ask something")
        asked.setdefault(name, []).extend(found)
    return asked


def read_phrases(path: Path) -> dict[str, list[Phrase]]:
    """Phrases by image name; lines of one image add up."""
    example = '{"image": "a.tif", "phrases": [{"phrase": "the largest airplane", "boxes": [[12, 30, 40, 38]]}]}'
    phrases: dict[str, list[Phrase]] = {}
    for name, record, where in _lines(path, example):
        try:
            found = [Phrase(str(p["phrase"]), tuple(_box(box) for box in p["boxes"])) for p in record["phrases"]]
        except (TypeError, KeyError, ValueError, AttributeError) as exc:
            raise UsageError(f"{where}: '{name}' has no list of phrases ({exc!r})", fix=f"write {example}") from exc
        if not found or not all(p.boxes for p in found):
            raise UsageError(f"{where}: '{name}' has a phrase without a box, or none", fix=f"write {example}")
        phrases.setdefault(name, []).extend(found)
    return phrases


def _box(given: Sequence[float]) -> Box:
    x, y, width, height = (float(value) for value in given)
    return x, y, width, height


def read_points(path: Path, label: str) -> dict[str, list[tuple[float, float]]]:
    """Points x, y of the objects of an image, by its name; a line may call them ``LABEL_xy`` as well."""
    example = '{"image": "a.tif", "points": [[12, 34.5]]}'
    points: dict[str, list[tuple[float, float]]] = {}
    for name, record, where in _lines(path, example):
        try:
            listed = record["points"] if "points" in record else record[f"{label}_xy"]
            found = [(float(x), float(y)) for x, y in listed]
        except (TypeError, KeyError, ValueError) as exc:
            raise UsageError(f"{where}: '{name}' has no list of points ({exc!r})", fix=f"write {example}") from exc
        points.setdefault(name, []).extend(found)
    return points


def read_labels(path: Path) -> dict[str, str]:
    """The class of each image."""
    example = '{"image": "a.tif", "label": "airport"}'
    labels: dict[str, str] = {}
    for name, record, where in _lines(path, example):
        if not isinstance(record.get("label"), str) or not record["label"].strip():
            raise UsageError(f"{where}: '{name}' has no label", fix=f"write {example}")
        labels[name] = record["label"].strip()
    return labels
