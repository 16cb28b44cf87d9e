"""UCM's multi-labels as sentences: a data set whose language the default model does not speak, to fine-tune it on.

``python -m edge_rsvlm.export.default.data.contents --data ../shared/data --out build/contents`` writes ``train.jsonl``,
without the images that show the same place as one of validation, ``val.jsonl``, and the recipe ``FINETUNE.toml``.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from edge_rsvlm.export import artifact
from edge_rsvlm.export.default.data.scenes import Scene, read_scenes

SET = "ucm_captions"
RECIPE = """version = 1
checkpoint = "{weights}"
data = "train.jsonl"
images = "{images}"
out = "lora"
steps = 400
batch = 16
rate = 3e-3
"""


def sentence(scene: Scene) -> str:
    """What is in the image, in the order of the alphabet: "cars, pavement, trees"."""
    return ", ".join(sorted(label.replace("-", " ") for label in scene.labels))


def write(data: Path, backbone: artifact.Artifact, out: Path) -> None:
    """``train.jsonl`` and ``val.jsonl`` in ``out``, with images by their names in the set's archives."""
    out.mkdir(parents=True, exist_ok=True)
    left_out = {"train": set(backbone.metrics["ucm_left_out"]), "val": set[str]()}
    for part, without in left_out.items():
        scenes = [s for s in read_scenes(data / SET / f"{part}.jsonl", part) if s.name not in without]
        lines = [json.dumps({"image": s.name, "captions": [sentence(s)]}) for s in scenes]
        (out / f"{part}.jsonl").write_text("\n".join(lines) + "\n")


def write_recipe(data: Path, weights: Path, out: Path) -> None:
    """``FINETUNE.toml``, whose paths are relative to it."""
    images, checkpoint = (os.path.relpath(path, out) for path in (data / SET / "train.tar", weights))
    (out / "FINETUNE.toml").write_text(RECIPE.format(weights=checkpoint, images=images))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--work", type=Path, default=Path("export/default/weights"), help="artifacts of the stages")
    parser.add_argument("--out", type=Path, default=Path("build/contents"))
    options = parser.parse_args()
    write(options.data, artifact.load(options.work / "backbone"), options.out)
    write_recipe(options.data, options.work, options.out)


if __name__ == "__main__":
    main()
