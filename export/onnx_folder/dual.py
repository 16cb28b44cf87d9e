"""Dual encoders that others exported to ONNX: two towers, or one graph that is cut into them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto

from edge_rsvlm.errors import InputError, UsageError
from edge_rsvlm.export.checkpoint.reading import has_weights
from edge_rsvlm.export.families.base import Description, Source
from edge_rsvlm.export.families.dual_encoder import EMBEDDING, IMAGE, TEXT, DualEncoder, tiles_input
from edge_rsvlm.export.families.image_processors import load_image_processor
from edge_rsvlm.export.families.siglip import Siglip
from edge_rsvlm.export.families.tokenizers import load_tokenizer
from edge_rsvlm.export.onnx_folder import graphs
from edge_rsvlm.export.onnx_folder.graphs import Tensor, inputs_of, outputs_of
from edge_rsvlm.export.onnx_folder.parts import AGAIN, Names, OnnxFolder, TakenGraph, batched, listed, only, want

FIT_TOLERANCE = 1e-3
"""Of the logits, between the graph and scale * cosine + bias."""


def dual(family: DualEncoder, source: Source, files: tuple[Path, ...]) -> OnnxFolder:
    """A dual encoder in one file, or in those of its image and its text half."""
    if len(files) == 1:
        whole = graphs.load(files[0])
        halves = graphs.cut(whole, ["image_embeds"]), graphs.cut(whole, ["text_embeds"])
        image = replace(_image_half(family, source, files[0], halves[0]), file=f"{IMAGE}.onnx", model=halves[0])
        text = replace(_text_half(family, files[0], halves[1]), file=f"{TEXT}.onnx", model=halves[1])
        logits: tuple[float, float] | None = _measured_logits(family, source, files[0])
    else:
        image = _image_half(family, source, files[0], graphs.load(files[0]))
        text = _text_half(family, files[1], graphs.load(files[1]))
        logits = family.logits(source.folder) if has_weights(source.folder) else None
    task = family.task(source, *(logits or (1.0, 0.0)))
    task["text"]["tokenizer"] |= _fixed_length(task["text"]["tokenizer"], text)
    # Search ranks by the cosine alone. Class scores need the trained scale, which two towers apart do not hold.
    tasks = {"search": task} if logits is None else {"classify": task, "search": task}
    names = {IMAGE: image.names, TEXT: text.names}
    return OnnxFolder(Description(names, tasks, family.files(source)), {IMAGE: image, TEXT: text})


def _image_half(family: DualEncoder, source: Source, path: Path, model: ModelProto) -> TakenGraph:
    inputs = inputs_of(model)
    pixels = batched(path, only(path, inputs, "pixel_values"))
    if len(inputs) > 1 or len(pixels.shape or ()) != 4:
        raise UsageError(f"{path}: images are embedded from {listed(inputs)}, which is not known", fix=AGAIN)
    want(path, pixels, TensorProto.FLOAT)
    made = tiles_input(source, load_image_processor(source.folder)).shape
    if any(size not in (None, wanted) for size, wanted in zip(pixels.shape or (), made, strict=True)):
        raise UsageError(
            f"{path}: takes images of {pixels.shape}, the image processor makes {made}",
            fix="use the preprocessor_config.json that the model was published with",
        )
    embedding = only(path, outputs_of(model), "image_embeds", *_pooled(family))
    return TakenGraph(path.name, path, _embeds({"tiles": pixels.name}, embedding))


def _text_half(family: DualEncoder, path: Path, model: ModelProto) -> TakenGraph:
    inputs = inputs_of(model)
    known = {"input_ids", "attention_mask", "token_type_ids"} - ({"attention_mask"} if family.pads else set())
    if unknown := inputs.keys() - known:
        raise UsageError(f"{path}: texts are embedded from {listed(unknown)} too", fix=AGAIN)
    for tensor in inputs.values():
        want(path, tensor, TensorProto.INT64)
    batched(path, only(path, inputs, "input_ids"))
    embedding = only(path, outputs_of(model), "text_embeds", *_pooled(family))
    return TakenGraph(path.name, path, _embeds({name: name for name in inputs}, embedding))


def _embeds(inputs: dict[str, str], embedding: Tensor) -> Names:
    return {"inputs": inputs, "outputs": {EMBEDDING: embedding.name}}


def _pooled(family: DualEncoder) -> tuple[str, ...]:
    """SigLIP projects nothing: a tower apart gives its pooled output as the embedding."""
    return ("pooler_output",) if isinstance(family, Siglip) else ()


def _fixed_length(tokenizer: Mapping[str, Any], text: TakenGraph) -> dict[str, Any]:
    """What the tokenizer must do for a graph that takes texts of one length only."""
    shape = inputs_of(text.model or graphs.load(text.source))["input_ids"].shape
    length = shape[1] if shape else None
    if length is None:
        return {}
    return {"pad_to": length, "max_length": min(length, tokenizer["max_length"] or length)}


def _measured_logits(family: DualEncoder, source: Source, path: Path) -> tuple[float, float]:
    """(scale, bias) of the cosine, which the exporter hid among the graph's constants: fitted to what it computes."""
    side = [int(size) for size in tiles_input(source, load_image_processor(source.folder)).shape[2:]]
    chance = np.random.default_rng(0)
    images_N3HW = chance.normal(size=(3, 3, *side)).astype(np.float32)
    feeds: dict[str, NDArray[Any]] = {"pixel_values": images_N3HW, **_some_texts(family, source, path)}
    logits, images, texts = _run(path, feeds, ["logits_per_image", "image_embeds", "text_embeds"])
    cosines = (_unit(images) @ _unit(texts).T).ravel().astype(np.float64)
    wanted = logits.ravel().astype(np.float64)
    columns = [cosines, np.ones_like(cosines)][: 1 if family.score == "softmax" else 2]
    (scale, *bias), *_ = np.linalg.lstsq(np.stack(columns, axis=1), wanted, rcond=None)
    found = float(scale), float(bias[0]) if bias else 0.0
    off = float(np.abs(found[0] * cosines + found[1] - wanted).max())
    if off > FIT_TOLERANCE * max(float(np.abs(wanted).max()), 1.0):
        raise UsageError(f"{path}: logits_per_image are off by {off:.3g} from a scaled cosine", fix=AGAIN)
    return found


def _run(path: Path, feeds: Mapping[str, NDArray[Any]], outputs: list[str]) -> list[NDArray[np.float32]]:
    from edge_rsvlm.engines.onnxruntime import ort

    try:
        session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        found: list[NDArray[np.float32]] = session.run(
            outputs, {given.name: feeds[given.name] for given in session.get_inputs()}
        )
    except Exception as exc:
        raise InputError(f"{path}: onnxruntime cannot run it ({str(exc).splitlines()[0]})", fix=AGAIN) from exc
    return found


def _some_texts(family: DualEncoder, source: Source, path: Path) -> dict[str, NDArray[np.int64]]:
    fields = family.task(source, 1.0, 0.0)["text"]["tokenizer"]
    shape = inputs_of(graphs.load(path))["input_ids"].shape
    fixed = fields["pad_to"] or (shape[1] if shape else None)
    found = load_tokenizer(source.folder, source.config)(
        ["a cat", "ships in the harbour", "an airport at night"],
        padding="max_length" if fixed else "longest",
        max_length=fixed or fields["max_length"],
        truncation=True,
        return_tensors="np",
    )
    return {name: values.astype(np.int64) for name, values in found.items()}


def _unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=-1, keepdims=True))
