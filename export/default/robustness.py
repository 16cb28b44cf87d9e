"""What worse images cost: held-out images degraded in five ways, and the same ``edge-rsvlm eval`` on each.

The degradations are not those of training (``data.augment``), whose strengths are drawn at random.
``python -m edge_rsvlm.export.default.robustness BUNDLE`` prints each loss.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from edge_rsvlm.export.default import score
from edge_rsvlm.export.default.data.images import encoded_images
from edge_rsvlm.export.default.splits import held_out

U8 = NDArray[np.uint8]
NOISE_LEVELS = 12.0
"""Standard deviation of read noise, of 255 levels."""
BLUR_PX = 1.2
"""Standard deviation of the point spread."""
TRANSMISSION, AIRLIGHT = 0.6, 210.0
SEED = 0


@dataclass(frozen=True)
class Degradation:
    """``scale`` pixels become one, in each direction; boxes follow."""

    name: str
    apply: Callable[[Image.Image], Image.Image]
    scale: float = 1.0


@dataclass(frozen=True)
class Loss:
    """A score on the images as they are, and on degraded ones."""

    task: str
    metric: str
    degradation: str
    before: float
    after: float

    @property
    def relative(self) -> float:
        return 1 - self.after / self.before


def _noisy(image: Image.Image) -> Image.Image:
    values = np.asarray(image, np.float32)
    return _image(values + np.random.default_rng(SEED).normal(0, NOISE_LEVELS, values.shape))


def _hazy(image: Image.Image) -> Image.Image:
    return _image(np.asarray(image, np.float32) * TRANSMISSION + AIRLIGHT * (1 - TRANSMISSION))


def _image(values_HW3: NDArray[np.floating[Any]]) -> Image.Image:
    return Image.fromarray(np.clip(values_HW3 + 0.5, 0, 255).astype(np.uint8))


def _resized(factor: float) -> Callable[[Image.Image], Image.Image]:
    def resize(image: Image.Image) -> Image.Image:
        size = (round(image.width * factor), round(image.height * factor))
        return image.resize(size, Image.Resampling.BICUBIC)

    return resize


AS_IS = Degradation("none", lambda image: image)
DEGRADATIONS = (
    Degradation("noise", _noisy),
    Degradation("blur", lambda image: image.filter(ImageFilter.GaussianBlur(BLUR_PX))),
    Degradation("haze", _hazy),
    Degradation("half resolution", _resized(0.5), 0.5),
    Degradation("double resolution", _resized(2.0), 2.0),
)


def losses(data: Path, bundle: Path, work: Path) -> Iterator[Loss]:
    """Of captions on UC Merced's validation part (CIDEr), and of airplanes on held-out HRPlanes (AP50)."""
    for task, metric, write in (("caption", "CIDEr", _captioned), ("detect", "AP50", _boxed)):
        ways = (AS_IS, *DEGRADATIONS)
        commands = [write(data, work / task / how.name.replace(" ", "_"), how) for how in ways]
        before, *after = (_value(found, metric) for found in score.run_all(commands, bundle))
        for how, value in zip(DEGRADATIONS, after, strict=True):
            yield Loss(task, metric, how.name, before, value)


def _value(result: dict[str, Any], metric: str) -> float:
    return next(float(s["value"]) for s in result["scores"] if s["metric"] == metric and s["label"] is None)


def _captioned(data: Path, folder: Path, how: Degradation) -> str:
    _write_images(data / "ucm_captions" / "val.tar", folder, how, None)
    return f"edge-rsvlm eval caption {data}/ucm_captions/val.jsonl --images {folder}"


def _boxed(data: Path, folder: Path, how: Degradation) -> str:
    names = held_out("hrplanes")
    _write_images(data / "hrplanes" / "train.tar", folder, how, names)
    coco = json.loads((data / "hrplanes" / "train.json").read_text())
    coco["images"] = [image for image in coco["images"] if image["file_name"] in names]
    numbers = {image["id"] for image in coco["images"]}
    coco["annotations"] = [
        a | {"bbox": [side * how.scale for side in a["bbox"]]} for a in coco["annotations"] if a["image_id"] in numbers
    ]
    labels = folder.with_suffix(".json")
    labels.write_text(json.dumps(coco))
    return f"edge-rsvlm eval detect {labels} --images {folder}"


def _write_images(source: Path, folder: Path, how: Degradation, only: frozenset[str] | None) -> None:
    """Without loss, under the names that the labels use."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, encoded in encoded_images(source):
        if only is None or name in only:
            how.apply(Image.open(io.BytesIO(encoded)).convert("RGB")).save(folder / name, lossless=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--work", type=Path, default=Path("build/default/worse"), help="the degraded images")
    options = parser.parse_args()
    for loss in losses(options.data, options.bundle, options.work):
        print(f"{loss.task}, {loss.degradation}: {loss.metric} {loss.before:.3f} -> {loss.after:.3f}", flush=True)


if __name__ == "__main__":
    main()
