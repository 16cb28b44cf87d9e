"""Label files as ``edge-rsvlm eval`` reads them, of what training never sees: questions, classes and phrases.

``python -m edge_rsvlm.export.default.data.eval_sets --data ../shared/data --out build/eval`` writes ``questions.jsonl``
and ``classes.jsonl`` of UCM's validation part, and ``phrases_SET.jsonl`` of the held-out images of each box set.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from edge_rsvlm.export.default.data.objects import GENERAL, SETS, ObjectSet
from edge_rsvlm.export.default.data.phrases import Objects, phrases
from edge_rsvlm.export.default.data.questions import asked
from edge_rsvlm.export.default.data.scenes import Scene, read_scenes
from edge_rsvlm.export.default.data.words import class_words
from edge_rsvlm.export.default.splits import held_out

MOST_OBJECTS, LEAST_PX = 12, 10.0
"""Of an image whose objects can be pointed at."""
SPOKEN = {kind: general for general, finer in GENERAL.items() for kind in finer}
"""Phrases speak of airplanes and trucks: few know a trainer from a fighter."""
PHRASES_EACH = 6
"""Of an image, spread over the rules."""
TYPES = {"What is the theme": "theme", "Does this": "presence", "How many": "count", "What is the location": "location"}


def questions(scenes: Iterable[Scene]) -> list[dict[str, Any]]:
    """What RSIVQA asks, by kind of question."""
    return [
        {"image": scene.name, "questions": [{"question": q.question, "answer": q.answer, "type": _type(q.question)}
                                            for q in found]}
        for scene in scenes if (found := asked(scene))
    ]  # fmt: skip


def _type(question: str) -> str:
    return next((kind for start, kind in TYPES.items() if question.startswith(start)), "other")


def classes(scenes: Iterable[Scene]) -> list[dict[str, Any]]:
    """The class of each image, by the first of its names."""
    return [{"image": scene.name, "label": class_words(scene)[0]} for scene in scenes]


def grounded(spec: ObjectSet, annotations: Path) -> list[dict[str, Any]]:
    """Phrases of held-out images with few enough objects, all of them known and large enough to point at."""
    coco = json.loads(annotations.read_text())
    names = {c["id"]: spec.mapping[c["name"]] for c in coco["categories"]}
    rows = []
    for image in sorted(coco["images"], key=lambda i: str(i["file_name"])):
        labels = [a for a in coco["annotations"] if a["image_id"] == image["id"]]
        kinds = [names[a["category_id"]] for a in labels]
        xywh = np.array([a["bbox"] for a in labels], np.float64).reshape(-1, 4)
        if image["file_name"] not in held_out(spec.name) or not 0 < len(labels) <= MOST_OBJECTS:
            continue
        if None in kinds or xywh[:, 2:].min() < LEAST_PX:
            continue
        said = [SPOKEN.get(str(kind), str(kind)) for kind in kinds]
        boxes = np.hstack([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]])
        found = phrases(Objects(boxes, said, (float(image["width"]), float(image["height"]))))
        if not found:
            continue
        chosen = [found[int(k)] for k in np.unique(np.linspace(0, len(found) - 1, PHRASES_EACH).round())]
        rows.append({
            "image": image["file_name"],
            "phrases": [{"phrase": p.words, "boxes": [xywh[b].tolist() for b in p.boxes]} for p in chosen],
        })  # fmt: skip
    return rows


def write_label_files(data: Path, out: Path) -> dict[str, int]:
    """All of them, of the data sets below ``data``; the images of each."""
    scenes = read_scenes(data / "ucm_captions" / "val.jsonl", "ucm_val")
    made = {"questions": questions(scenes), "classes": classes(scenes)}
    for spec in SETS:
        made[f"phrases_{spec.name}"] = grounded(spec, data / spec.name / "train.json")
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in made.items():
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {name: len(rows) for name, rows in made.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("build/eval"))
    options = parser.parse_args()
    for name, images in write_label_files(options.data, options.out).items():
        print(f"{options.out / name}.jsonl: {images} images")


if __name__ == "__main__":
    main()
