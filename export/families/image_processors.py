"""Image processors of transformers, written as the data of the manifest's InputSpec.

``preprocessor_config.json`` and ``processor_config.json`` are read by transformers itself, so that both layouts,
defaults that a file leaves out and the spellings of older versions mean what they mean there. Processors that only set
attributes of the common PIL backend are read from these; others have a function of their own here, or are refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoImageProcessor
from transformers.image_processing_backends import PilBackend

from edge_rsvlm.errors import UsageError

Steps = list[dict[str, Any]]

FILTERS = {0: "nearest", 1: "lanczos3", 2: "bilinear", 3: "bicubic"}  # Pillow's codes
# Counts and reflectances that become 8 bits; the same as those of the default model.
RANGES = {"uint8": (0.0, 255.0), "uint16": (0.0, 3000.0), "float32": (0.0, 0.3)}
SMALLEST_WHOLE_PX = 1024
LARGEST_SMART_TILE_PX = 1024
IDEFICS3_LONGEST_PX = 4096
VILT_LONGER, VILT_SHORTER = 1333, 800
CONVNEXT_WARPS_FROM_PX = 384
OWN_METHODS = ("_preprocess", "resize", "center_crop", "rescale", "normalize", "pad", "preprocess", "process_image")


def load_image_processor(folder: Path) -> Any:
    """The checkpoint's image processor in its Pillow form, which is what this package's runtime reproduces."""
    try:
        return AutoImageProcessor.from_pretrained(folder, backend="pil", local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, ImportError, KeyError, TypeError) as exc:
        raise UsageError(
            f"{folder}: no image processor could be read ({str(exc).splitlines()[0]})",
            fix="add the preprocessor_config.json that the model was published with",
        ) from exc


def input_spec(processor: Any, overlap_share: float = 0.0) -> dict[str, Any]:
    """InputSpec of the manifest: RGB, ``processor``'s steps and normalisation.

    ``overlap_share`` is the overlap of neighbouring tiles as a share of the tile. Raises UsageError for a processor
    that the steps of the manifest cannot express.
    """
    steps = prepare_steps(processor)
    mean, std = normalisation(processor)
    tile_px = tile_side(steps)
    filters = [step["filter"] for step in steps if "filter" in step]
    return {
        "bands": ("red", "green", "blue"),
        "ranges": dict(RANGES),
        "mean": mean,
        "std": std,
        "tile_px": tile_px,
        "overlap_px": int(tile_px * overlap_share),
        "resolution_m": None,
        "whole_px": max(2 * tile_px, SMALLEST_WHOLE_PX),
        "resampling": "bilinear" if "gaussian" in filters else filters[0],
        "prepare": steps,
    }


def prepare_steps(processor: Any) -> Steps:
    """The steps of config/prepare.py that make the pixels ``processor`` makes, up to its normalisation."""
    name = type(processor).__name__.removesuffix("Pil")
    own = [method for method in OWN_METHODS if getattr(type(processor), method) is not getattr(PilBackend, method)]
    if name not in SPECIAL and own:
        raise UsageError(
            f"images are prepared by {name}, which is not known",
            fix=f"use a checkpoint with one of {', '.join(sorted(SPECIAL))}, or a plain resize and crop",
        )
    if not processor.do_resize:
        raise UsageError(f"{name} does not resize images", fix='set "do_resize" and "size" in preprocessor_config.json')
    return SPECIAL.get(name, _plain)(processor)


def normalisation(processor: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) per channel of pixels in 0..1.

    A processor computes (x * factor - offset - mean) / std of x in 0..255; EfficientNet's may divide by std once more.
    """
    factor = 255.0 * (processor.rescale_factor if processor.do_rescale else 1.0)
    mean, std = (np.zeros(3), np.ones(3))
    if processor.do_normalize:
        mean, std = (np.broadcast_to(np.asarray(v, np.float64), 3) for v in (processor.image_mean, processor.image_std))
    if processor.do_rescale and getattr(processor, "rescale_offset", False):
        mean = mean + 1.0
    if getattr(processor, "include_top", False):
        std = std * np.broadcast_to(np.asarray(processor.image_std, np.float64), 3)
    return tuple((mean / factor).tolist()), tuple((std / factor).tolist())


def fixed_size(steps: Steps) -> tuple[int, int] | None:
    """(height, width) of the prepared image where every image gets the same, else None."""
    last = steps[-1]
    if last["op"] == "split":
        return last["px"], last["px"]
    height_width: tuple[int, int] | None = last.get("size")
    return height_width


def tile_side(steps: Steps) -> int:
    """Side of the square tile that goes through ``steps`` at about its own resolution."""
    for step in steps if steps[-1]["op"] == "split" else reversed(steps):
        if step["op"] == "smart_resize":
            side = min(math.isqrt(step["max_pixels"]), LARGEST_SMART_TILE_PX)
            return max(side // step["multiple"], 1) * int(step["multiple"])
        if "size" in step or "px" in step:
            return int(max(step["size"]) if "size" in step else step["px"])
    raise ValueError("steps that never set a size")


def _filter(processor: Any) -> str:
    code = int(processor.resample if processor.resample is not None else 2)
    if code not in FILTERS:
        raise UsageError(
            f"images are resized by Pillow's filter {code}, which is not known",
            fix='set "resample" in preprocessor_config.json to one of 0, 1, 2, 3',
        )
    return FILTERS[code]


def _size(size: Any) -> tuple[int, int]:
    return int(size["height"]), int(size["width"])


def _resize(processor: Any) -> dict[str, Any]:
    """What the PIL backend does with ``size``."""
    size, name = dict(processor.size), _filter(processor)
    if size.get("height") and size.get("width"):
        return {"op": "resize", "size": _size(size), "filter": name}
    if size.get("shortest_edge") and not size.get("longest_edge"):
        return {"op": "resize_shortest", "px": int(size["shortest_edge"]), "filter": name}
    raise UsageError(
        f"images are resized to {size}, which is not known",
        fix='give "size" in preprocessor_config.json as height and width, or as shortest_edge',
    )


def _crop(processor: Any) -> Steps:
    if not getattr(processor, "do_center_crop", False):
        return []
    return [{"op": "center_crop", "size": _size(processor.crop_size)}]


def _plain(processor: Any) -> Steps:
    if getattr(processor, "do_pad", False):
        raise UsageError(
            f"{type(processor).__name__} pads images", fix='set "do_pad" to false in preprocessor_config.json'
        )
    return [_resize(processor), *_crop(processor)]


def _llava(processor: Any) -> Steps:
    fill = tuple(float(int(mean * 255)) for mean in processor.image_mean or (0.0, 0.0, 0.0))
    pad = [{"op": "pad_square", "fill": fill, "place": "centre"}] if processor.do_pad else []
    return [*pad, _resize(processor), *_crop(processor)]


def _owlv2(processor: Any) -> Steps:
    pad = [{"op": "pad_square", "fill": (0.0, 0.0, 0.0), "place": "top_left"}] if processor.do_pad else []
    return [*pad, {"op": "resize", "size": _size(processor.size), "filter": "gaussian"}]


def _efficientnet(processor: Any) -> Steps:
    return [_resize(processor), *_crop(processor)]


def _convnext(processor: Any) -> Steps:
    side, name = int(processor.size["shortest_edge"]), _filter(processor)
    if side >= CONVNEXT_WARPS_FROM_PX:
        return [{"op": "resize", "size": (side, side), "filter": name}, *_crop(processor)]
    return [
        {"op": "resize_shortest", "px": int(side / processor.crop_pct), "filter": name},
        {"op": "center_crop", "size": (side, side)},
        *_crop(processor),
    ]


def _vilt(processor: Any) -> Steps:
    shortest = int(processor.size["shortest_edge"])
    return [
        {
            "op": "resize_shortest",
            "px": shortest,
            "longest_px": int(VILT_LONGER / VILT_SHORTER * shortest),
            "multiple": int(processor.size_divisor),
            "filter": _filter(processor),
        }
    ]


def _idefics3(processor: Any) -> Steps:
    size, tile, name = dict(processor.size), int(processor.max_image_size["longest_edge"]), _filter(processor)
    longest = size.get("longest_edge")
    if not longest or longest > IDEFICS3_LONGEST_PX:
        raise UsageError(
            f"images are resized to {size}, which is not known",
            fix=f'give "size" as longest_edge, at most {IDEFICS3_LONGEST_PX}, in preprocessor_config.json',
        )
    first = {"op": "resize_longest", "px": int(longest), "even": True, "filter": name}
    if not processor.do_image_splitting:
        return [first, {"op": "resize", "size": (tile, tile), "filter": name}]
    to_tiles = {"op": "resize_to_tiles", "px": tile, "filter": name}
    return [first, to_tiles, {"op": "split", "px": tile, "filter": name}]


def _qwen2_vl(processor: Any) -> Steps:
    return [
        {
            "op": "smart_resize",
            "multiple": int(processor.patch_size * processor.merge_size),
            "min_pixels": int(processor.size["shortest_edge"]),
            "max_pixels": int(processor.size["longest_edge"]),
            "filter": _filter(processor),
        }
    ]


SPECIAL: dict[str, Callable[[Any], Steps]] = {
    "ConvNextImageProcessor": _convnext,
    "EfficientNetImageProcessor": _efficientnet,
    "Idefics3ImageProcessor": _idefics3,
    "LlavaImageProcessor": _llava,
    "Owlv2ImageProcessor": _owlv2,
    "Qwen2VLImageProcessor": _qwen2_vl,
    "SmolVLMImageProcessor": _idefics3,
    "ViltImageProcessor": _vilt,
}
