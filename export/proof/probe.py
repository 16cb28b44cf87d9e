"""One fixed input for every graph of a bundle: a packaged scene and a sentence, as the manifest prepares them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

import edge_rsvlm
from edge_rsvlm.bundle import Bundle
from edge_rsvlm.config.inputs import InputSpec, TextEncoder, Tokenizer
from edge_rsvlm.config.manifest import Manifest
from edge_rsvlm.config.task_specs import AnswerTask, GenerateTask, ReferTask
from edge_rsvlm.export.families.base import Arrays, GraphInput
from edge_rsvlm.pipeline.scaling import per_channel
from edge_rsvlm.tasks.text import Texts
from edge_rsvlm.tiles import ABSENT, VALIDITY, tile_gather
from edge_rsvlm.tiles.prepare import Prepared, prepare

SCENE = "airliners.webp"
TEXT = "how many planes are parked on the apron"
STEP_TOKENS = 5
CONVOLVED_PX = 96
"""Tiles of models that take any size: large enough for every stride, small in the bundle."""
COLOURS, DATES = ("red", "green", "blue"), ("before", "after")


def probe_image() -> NDArray[np.uint8]:
    """A packaged scene [H, W, 3], not square and of no size that a model was made for."""
    with Image.open(Path(edge_rsvlm.__file__).parent / "scenes" / SCENE) as image:
        pixels = np.asarray(image.convert("RGB"))
    return np.ascontiguousarray(pixels[:357, :419])


def prepared(spec: InputSpec, image_HWC: NDArray[np.uint8], side_px: int | None = None) -> Prepared:
    """The image as a task sees it. Models without steps take tiles of any size, of ``side_px`` where it is given."""
    mean, std = (per_channel(value, len(spec.bands)) for value in (spec.mean, spec.std))
    if spec.prepare:
        return prepare(image_HWC, spec.prepare, mean, std)
    return _stretched(spec, image_HWC, side_px or spec.tile_px, mean, std)


def _stretched(
    spec: InputSpec, image_HWC: NDArray[np.uint8], side_px: int, mean: Sequence[float], std: Sequence[float]
) -> Prepared:
    """The whole image as one tile cut from a raster."""
    height, width = image_HWC.shape[:2]
    low, high = spec.ranges["uint8"]
    rows = [
        (COLOURS.index(role), 1 / ((high - low) * s), (-low / (high - low) - m) / s)
        if role in COLOURS
        else (VALIDITY if role == "validity" else ABSENT, 1.0, 0.0)
        for role, m, s in zip(spec.bands, mean, std, strict=True)
    ]
    bands, gain, bias = zip(*rows, strict=True)
    box = np.array([[0, 0, width, height]], np.float64)
    tile = tile_gather(image_HWC, box, out_hw=(side_px, side_px), bands=bands, gain=gain, bias=bias)
    to_image = (width / side_px, height / side_px, 0.0, 0.0)
    return Prepared(np.asarray(tile.tiles_NCHW, np.float32), 1, 1, to_image)


def input_spec_of(manifest: Manifest, graph: str) -> InputSpec | None:
    """The input spec of the task whose images this graph takes."""
    for _, task in manifest.tasks:
        if task is not None and graph in (getattr(task, "encoder", None), getattr(task, "graph", None)):
            spec: InputSpec | None = task.input
            return spec
    return None


def tokenizer_of(manifest: Manifest, graph: str) -> Tokenizer | None:
    """How the texts that this graph reads are written as tokens."""
    for _, task in manifest.tasks:
        if isinstance(task, GenerateTask) and task.decoder.kind == "onnx" and graph == task.decoder.embed:
            return task.tokenizer
        if isinstance(task, (AnswerTask, ReferTask)) and graph == task.graph:
            return task.tokenizer
        text = getattr(task, "text", None)
        if isinstance(text, TextEncoder) and graph == text.graph:
            return text.tokenizer
    return None


def graph_inputs(
    graph: str,
    wanted: Sequence[GraphInput],
    bundle: Bundle,
    image_HWC: NDArray[np.uint8],
    made: Mapping[str, NDArray[Any]],
) -> Arrays:
    """Inputs of one graph by role; ``made`` holds what graphs before it gave (``inputs_embeds``, feature maps)."""
    manifest = bundle.manifest
    found: Arrays = {}
    if spec := input_spec_of(manifest, graph):
        found["tiles"] = prepared(spec, image_HWC, CONVOLVED_PX).pixels_KCHW
    if tokens := tokenizer_of(manifest, graph):
        found |= Texts(tokens, bundle.path(tokens.file)).encode([TEXT])
    rng = np.random.default_rng(0)
    length = made["inputs_embeds"].shape[1] if "inputs_embeds" in made else STEP_TOKENS
    return {given.name: found[given.name] if given.name in found else _other(given, made, length, rng)
            for given in wanted}  # fmt: skip


def _other(given: GraphInput, made: Mapping[str, NDArray[Any]], length: int, rng: np.random.Generator) -> NDArray[Any]:
    """Embeddings, positions, empty caches, features of regions or objects."""
    if given.name in made:
        return made[given.name]
    date, _, level = given.name.partition("_")
    if date in DATES and level in made:
        # The other date is the mirror image: the two must differ.
        return np.ascontiguousarray(made[level][..., :: -1 if date == DATES[1] else 1])
    if given.name == "position_ids":
        positions: NDArray[np.int64] = np.broadcast_to(np.arange(length), (*_fixed(given), 1, length)).copy()
        return positions
    if given.name == "attention_mask":
        return np.ones((1, length), np.int64)
    if given.name == "objects_mask":
        return np.ones((1, STEP_TOKENS), np.int64)
    if "past" in given.shape:
        _, heads, _, width = given.shape
        return np.zeros((1, int(heads), 0, int(width)), np.float32)
    sizes = [size if isinstance(size, int) else STEP_TOKENS for size in given.shape]
    return rng.standard_normal([1, *sizes[1:]]).astype(np.float32)


def _fixed(given: GraphInput) -> tuple[int, ...]:
    """(3,) of mrope positions [3, B, S], () of [B, S]."""
    return tuple(size for size in given.shape if isinstance(size, int))
