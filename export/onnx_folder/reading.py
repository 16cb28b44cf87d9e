"""ONNX exports that others made, taken as they are: the layout of optimum and of transformers.js.

Beside config.json, the tokenizer's and the image processor's files, in ``onnx/`` or at the top:

    vision_encoder.onnx, embed_tokens.onnx, decoder_model_merged.onnx    a model that writes text
    vision_model.onnx, text_model.onnx                                   a dual encoder
    model.onnx                                                           a dual encoder in one graph

with their external data. What the family of ``model_type`` knows of prompts and images comes from there; the names,
the shapes and the cache come from the graphs. Files are copied unchanged but for two cases. A dual encoder in one graph
wants both inputs at once: it is cut into its two halves, each with its own weights (or with the same data file). A
vision encoder that takes something else than images [N, 3, H, W] (SmolVLM's images of a conversation with their mask,
Qwen's list of patches) gets the few nodes in front that make it from them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from onnx import TensorProto

from edge_rsvlm.errors import UsageError
from edge_rsvlm.export.checkpoint.reading import read_config
from edge_rsvlm.export.families.base import Description, Source
from edge_rsvlm.export.families.clip import Clip
from edge_rsvlm.export.families.dual_encoder import DualEncoder
from edge_rsvlm.export.families.generation import GenerativeFamily
from edge_rsvlm.export.families.idefics3 import Idefics3
from edge_rsvlm.export.families.image_processors import load_image_processor
from edge_rsvlm.export.families.llava import Llava
from edge_rsvlm.export.families.qwen2_vl import Qwen2VL
from edge_rsvlm.export.families.siglip import Siglip
from edge_rsvlm.export.onnx_folder import graphs
from edge_rsvlm.export.onnx_folder.dual import dual
from edge_rsvlm.export.onnx_folder.graphs import inputs_of, outputs_of
from edge_rsvlm.export.onnx_folder.parts import AGAIN, OnnxFolder, TakenGraph, batched, data_files, listed, only, want

VISION, EMBED, DECODER = "vision_encoder.onnx", "embed_tokens.onnx", "decoder_model_merged.onnx"
GENERATIVE = (VISION, EMBED, DECODER)
TWO_TOWERS, ONE_GRAPH = ("vision_model.onnx", "text_model.onnx"), ("model.onnx",)
LAYOUTS = (GENERATIVE, TWO_TOWERS, ONE_GRAPH)
FAMILIES: tuple[DualEncoder | GenerativeFamily, ...] = (Clip(), Siglip(), Idefics3(), Llava(), Qwen2VL())
BY_MODEL_TYPE = {model_type: family for family in FAMILIES for model_type in family.model_types}
CACHE_NAME = re.compile(r"(.*?)(\d+)(.*?)(key|value)(.*)")


def layout(folder: Path) -> tuple[Path, ...] | None:
    """The ONNX files of ``folder`` in one of the layouts known here, or None."""
    for place_ in (folder / "onnx", folder):
        for names in LAYOUTS:
            if all((place_ / name).is_file() for name in names):
                return tuple(place_ / name for name in names)
    return None


def read_onnx_folder(folder: Path) -> OnnxFolder:
    """What the export in ``folder`` is. UsageError names what the runtime cannot run, InputError what is broken."""
    files = layout(folder)
    if files is None:
        wanted = "; or ".join(", ".join(names) for names in LAYOUTS)
        raise UsageError(f"{folder} holds no ONNX export of a known layout", fix=f"it needs {wanted}")
    for file in files:
        data_files(file)
    source = Source(folder, read_config(folder))
    family = BY_MODEL_TYPE.get(source.config.model_type)
    generative = files[0].name == VISION
    if family is None or isinstance(family, GenerativeFamily) != generative:
        known = [f for f in FAMILIES if isinstance(f, GenerativeFamily) == generative]
        raise UsageError(
            f"{folder}: ONNX exports of type '{source.config.model_type}' in this layout are not known",
            fix=f"known types are {', '.join(t for f in known for t in f.model_types)}",
        )
    return _generative(family, source, files) if isinstance(family, GenerativeFamily) else dual(family, source, files)


# Models that write text


def _generative(family: GenerativeFamily, source: Source, files: tuple[Path, ...]) -> OnnxFolder:
    vision, embed, decoder_file = files
    described = family.describe(source)
    taken = {
        "image": _vision(family, source, vision),
        "embed": _embed(embed),
        "decoder": _decoder(decoder_file, mrope=family.mrope),
    }
    decoder = {"kind": "onnx", "embed": "embed", "graph": "decoder", "cache": _cache(decoder_file)}
    tasks = {verb: {**task, "encoder": "image", "decoder": decoder} for verb, task in described.tasks.items()}
    names = {name: graph.names for name, graph in taken.items()}
    return OnnxFolder(Description(names, tasks, described.files), taken)


def _vision(family: GenerativeFamily, source: Source, path: Path) -> TakenGraph:
    model = graphs.load(path)
    inputs, outputs = inputs_of(model), outputs_of(model)
    pixels = only(path, inputs, "pixel_values")
    want(path, batched(path, pixels), TensorProto.FLOAT)
    output = only(path, outputs, "image_features", *(list(outputs)[:1]))
    others = [batched(path, tensor) for name, tensor in inputs.items() if name != pixels.name]
    names = {"inputs": {"tiles": graphs.TILES}, "outputs": {"features": output.name}}
    rank = len(pixels.shape or ())
    if rank == 4 and not others:
        return TakenGraph(path.name, path, {**names, "inputs": {"tiles": pixels.name}})
    if rank == 5 and all(tensor.name == "pixel_attention_mask" for tensor in others):
        front = graphs.masked_single_images(pixels.name, others[0] if others else None)
        fronted = graphs.put_in_front(model, *front, list(inputs), path)
        return TakenGraph(path.name, path, names, fronted)
    if rank == 2 and family.mrope and len(others) == 1 and others[0].name in ("grid_thw", "image_grid_thw"):
        processor = load_image_processor(source.folder)
        sizes = (int(processor.patch_size), int(processor.merge_size), int(processor.temporal_patch_size))
        fronted = graphs.put_in_front(model, *graphs.patches(pixels.name, others[0].name, *sizes), list(inputs), path)
        graphs.split_by_image(fronted, output.name, "features", int(source.config.text_config.hidden_size))
        return TakenGraph(path.name, path, {**names, "outputs": {"features": "features"}}, fronted)
    raise UsageError(f"{path}: takes {listed(inputs)}, which is not known", fix=AGAIN)


def _embed(path: Path) -> TakenGraph:
    model = graphs.load(path)
    ids = only(path, inputs_of(model), "input_ids")
    embeds = only(path, outputs_of(model), "inputs_embeds", *(list(outputs_of(model))[:1]))
    want(path, ids, TensorProto.INT64)
    want(path, embeds, TensorProto.FLOAT)
    return TakenGraph(path.name, path, {"inputs": {"input_ids": ids.name}, "outputs": {"inputs_embeds": embeds.name}})


def _decoder(path: Path, *, mrope: bool) -> TakenGraph:
    model = graphs.load(path)
    inputs, outputs = inputs_of(model), outputs_of(model)
    given = {name: tensor for name, tensor in inputs.items() if not CACHE_NAME.fullmatch(name)}
    wanted = {
        "inputs_embeds": TensorProto.FLOAT,
        "attention_mask": TensorProto.INT64,
        "position_ids": TensorProto.INT64,
    }
    if unknown := given.keys() - wanted.keys():
        raise UsageError(f"{path}: takes {listed(unknown)}, which this runtime does not feed", fix=AGAIN)
    for name, tensor in given.items():
        want(path, tensor, wanted[name])
    only(path, given, "inputs_embeds")
    positions = given.get("position_ids")
    if mrope and (positions is None or len(positions.shape or ()) != 3):
        raise UsageError(f"{path}: does not take three rows of position_ids", fix=AGAIN)
    logits = only(path, outputs, "logits")
    want(path, logits, TensorProto.FLOAT)
    names = {"inputs": {name: name for name in given}, "outputs": {"logits": logits.name}}
    return TakenGraph(path.name, path, names)


def _cache(path: Path) -> dict[str, Any]:
    """KeyValueCache of the manifest, from the names and shapes of the decoder's tensors."""
    model = graphs.load(path)
    past = {name: tensor for name, tensor in inputs_of(model).items() if CACHE_NAME.fullmatch(name)}
    present = [name for name in outputs_of(model) if CACHE_NAME.fullmatch(name)]
    for tensor in past.values():
        want(path, tensor, TensorProto.FLOAT)
    past_pattern, layers = _pattern(path, list(past))
    present_pattern, present_layers = _pattern(path, present)
    match [*{tensor.shape for tensor in past.values()}]:
        case [(None, int(heads), None, int(size))] if layers == present_layers:
            sizes = {"layers": layers, "heads": heads, "head_dim": size}
            return {**sizes, "past": past_pattern, "present": present_pattern}
    raise UsageError(f"{path}: caches are not [N, heads, past, size] of one size in every layer", fix=AGAIN)


def _pattern(path: Path, names: list[str]) -> tuple[str, int]:
    """The pattern behind names of all layers and both parts, and the number of layers."""
    found = [match.groups() for name in names if (match := CACHE_NAME.fullmatch(name))]
    patterns = {f"{a}{{layer}}{b}{{part}}{c}" for a, _, b, _, c in found}
    layers = len(found) // 2
    every = {(str(layer), part) for layer in range(layers) for part in ("key", "value")}
    if len(patterns) != 1 or {(layer, part) for _, layer, _, part, _ in found} != every:
        raise UsageError(f"{path}: has no key and value cache for every layer: {listed(names) or 'none'}", fix=AGAIN)
    return patterns.pop(), layers
