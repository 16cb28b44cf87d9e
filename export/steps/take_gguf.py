"""Step ``take_gguf``: the draft of a bundle around a language model and a projector that others made for llama.cpp.

There is no model to compare them with, so the golden probe says what llama.cpp computes by them here.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np

from edge_rsvlm.bundle import load_bundle
from edge_rsvlm.config.inputs import InputSpec
from edge_rsvlm.config.units import format_bytes
from edge_rsvlm.errors import BundleError, InputError, UsageError
from edge_rsvlm.export.bundle_writer import place, write_manifest
from edge_rsvlm.export.explain import memory_on_disk
from edge_rsvlm.export.families.base import Description
from edge_rsvlm.export.families.chat import IMAGE, TEXT
from edge_rsvlm.export.families.generation import CAPTION, MAX_TOKENS
from edge_rsvlm.export.families.image_processors import RANGES, SMALLEST_WHOLE_PX, tile_side
from edge_rsvlm.export.gguf.pair import Pair
from edge_rsvlm.export.gguf.template import expand
from edge_rsvlm.export.proof.language_probe import write_language_probe
from edge_rsvlm.export.recipe import Recipe
from edge_rsvlm.export.steps.compile_gguf import FILE, LARGE_PX, PROJECTOR_FILE, TEXT_TOKENS
from edge_rsvlm.export.steps.compile_onnx import BUNDLE, draft
from edge_rsvlm.export.steps.parity import PROBES
from edge_rsvlm.pipeline.shapes import prepared_shape

if TYPE_CHECKING:
    from edge_rsvlm.engines.llama_context import LlamaModel
    from edge_rsvlm.engines.llama_vision import LlamaVision

UNTOUCHED: dict[str, Any] = {
    "target": "onnx:f32", "engines": ("onnxruntime",), "precision": {}, "calibration": None, "goal": None
}  # fmt: skip
"""What a recipe says where it asks for no change."""
PENALTY = gguf.Keys.General.SAMPLING_PENALTY_REPEAT
"""Where llama.cpp's converter writes the repetition penalty of generation_config.json."""
FIRST_TOKENS = 16
"""Of a context in which nothing is read."""


def check_recipe(recipe: Recipe) -> None:
    """UsageError for what cannot be done to GGUF files, which are taken as they are."""
    if recipe.adapters:
        raise UsageError("adapters cannot be merged into GGUF files", fix="export from the checkpoint's weights")
    for name, usual in UNTOUCHED.items():
        if getattr(recipe, name) != usual:
            raise UsageError(f"GGUF files are taken as they are, whatever '{name}' says", fix="leave it out")


def explain_pair(pair: Pair, recipe: Recipe) -> str:
    """The plan in words."""
    check_recipe(recipe)
    verbs = ["ask", "caption", *(["ground"] if recipe.boxes and recipe.prompts.ground else [])]
    model, projector = pair.model, pair.projector
    return "\n".join([
        f"{model.path.name}: {model.architecture}, {model.quantization}, reads {model.own('context_length')} tokens",
        f"{projector.path.name}: {pair.kind}, {projector.quantization}",
        f"{format_bytes(pair.bytes)} in all, by llama.cpp; answers {', '.join(verbs)}",
        "steps: checkpoint, take_gguf, make_bundle",
    ])  # fmt: skip


def take_gguf(pair: Pair, recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Fill ``folder`` with ``bundle/`` and ``probes/``.

    InputError where llama.cpp cannot use the pair, UsageError for a chat template that asks nothing.
    """
    target = folder / BUNDLE
    target.mkdir()
    # The hub's cache is made of links: what they point to is placed.
    place(pair.model.path.resolve(), target / FILE)
    place(pair.projector.path.resolve(), target / PROJECTOR_FILE)
    description = _description(pair, recipe)
    tokens = description.tasks["ask"]["context_tokens"]
    session_bytes = memory_on_disk([("gguf", pair.bytes), ("cache", tokens * pair.cache_bytes_per_token)], {})
    write_manifest(target, draft(recipe, description, session_bytes))
    (folder / PROBES).mkdir()
    write_language_probe(load_bundle(target, allow_unsigned=True, allow_older=True), folder / PROBES)
    return {
        "bytes": pair.bytes, "architecture": pair.model.architecture, "projector": pair.kind,
        "quantization": pair.model.quantization, "context tokens": tokens,
    }  # fmt: skip


def _description(pair: Pair, recipe: Recipe) -> Description:
    spec = _input(pair, recipe)
    model, seeing = _open(pair)
    prompt = _prompt(pair, model)
    common = {
        "kind": "gguf",
        "input": spec,
        "model": {"file": FILE, "quantization": pair.model.quantization},
        "projector": {"file": PROJECTOR_FILE, "quantization": pair.projector.quantization},
        "context_tokens": _context_tokens(pair, seeing, prompt, spec),
        "repetition_penalty": float(pair.model.fields.get(PENALTY, 1.0)),
        "max_tokens": MAX_TOKENS,
    }
    tasks = {"ask": {**common, "prompt": prompt}, "caption": {**common, "prompt": prompt.replace(TEXT, CAPTION)}}
    said = {"description": "general.name", "licence": "general.license"}
    fields = pair.model.fields
    return Description({}, tasks, {}, {fact: str(fields[name]) for fact, name in said.items() if name in fields})


def _input(pair: Pair, recipe: Recipe) -> dict[str, Any]:
    """Images whole and in 8 bits."""
    steps = pair.image_steps(recipe.images.max_pixels)
    side_px = tile_side(steps[:1])
    return {
        "bands": ("red", "green", "blue"), "ranges": dict(RANGES), "mean": 0.0, "std": 1.0 / 255.0,
        "tile_px": side_px, "overlap_px": 0, "resolution_m": None, "whole_px": max(2 * side_px, SMALLEST_WHOLE_PX),
        "resampling": steps[0]["filter"], "prepare": steps,
    }  # fmt: skip


def _open(pair: Pair) -> tuple[LlamaModel, LlamaVision]:
    from edge_rsvlm.engines.llama import LlamaLanguage
    from edge_rsvlm.engines.llama_vision import LlamaVision

    try:
        language = LlamaLanguage(pair.model.path, FIRST_TOKENS, 1)
        return language.model, LlamaVision(language, pair.projector.path)
    except BundleError as exc:
        raise InputError(
            f"{pair.model.path.parent}: {str(exc).removesuffix(f'; {exc.fix}')}",
            fix="use a model and a projector of one and the same checkpoint",
        ) from exc


def _prompt(pair: Pair, model: LlamaModel) -> str:
    template = pair.model.fields.get("tokenizer.chat_template")
    if template is None:
        raise UsageError(
            f"{pair.model.path}: has no chat template", fix="use a file that says how the model is to be asked"
        )
    specials = model.specials
    prompt = expand(str(template), specials, str(pair.model.path))
    return prompt.removeprefix(specials["bos_token"]) if model.adds_bos else prompt


def _context_tokens(pair: Pair, seeing: LlamaVision, prompt: str, spec: dict[str, Any]) -> int:
    """Room for the largest image, a question and the longest answer."""
    shape = prepared_shape((LARGE_PX, LARGE_PX), InputSpec.model_validate(spec).prepare)
    image_HWC = np.zeros((shape.height, shape.width, 3), np.uint8)
    read = seeing.tokens(image_HWC, prompt.replace(IMAGE, seeing.marker).replace(TEXT, ""))
    longest = int(pair.model.own("context_length", 0))
    if read + MAX_TOKENS > longest:
        raise UsageError(
            f"{pair.model.path}: an image makes {read} tokens, an answer {MAX_TOKENS}, and it reads {longest}",
            fix="give a smaller max_pixels in [images], or take a model that reads more",
        )
    return min(longest, read + TEXT_TOKENS + MAX_TOKENS)
