"""Bundles whose words llama.cpp writes: all by itself, or behind an image encoder in ONNX. Random weights."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edge_rsvlm.bundle import load_bundle
from edge_rsvlm.verify import answer_logits
from tests import tiny_gguf
from tests.fakes import INPUT, MEMORY
from tests.tiny_bundle import npz

SIDE, PATCHES = 8, 4
SEEN: dict[str, Any] = {
    **INPUT, "bands": ["red", "green", "blue"], "tile_px": SIDE, "overlap_px": 0, "resolution_m": None,
    "whole_px": 1024, "resampling": "bicubic",
}  # fmt: skip
IN_8_BITS = SEEN | {
    "mean": 0.0, "std": 1 / 255, "tile_px": 32, "prepare": [{"op": "resize", "size": [32, 32], "filter": "bicubic"}]
}  # fmt: skip
MODEL, PROJECTOR, PROBE = "model.gguf", "projector.gguf", "probe.npz"
PROMPT = "<|im_start|>User:{image}{text}<end_of_utterance>\nAssistant:"
ANSWER = np.array([40, 90, 140])


def alone(folder: Path, context_tokens: int = 400, seed: int = 0) -> Path:
    """``caption`` and ``ask`` by GgufTask."""
    task = {
        "kind": "gguf", "input": IN_8_BITS, "model": _file(MODEL), "projector": _file(PROJECTOR),
        "context_tokens": context_tokens, "max_tokens": 6, "memory": MEMORY,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    write_model(folder, context_tokens, seed)
    tiny_gguf.write_projector(folder / PROJECTOR)
    _write(folder, task, {})
    image = np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    return _probed(folder, {"image": image, "text": np.array("what?"), "answer": ANSWER})


def hybrid(folder: Path, context_tokens: int = 400, seed: int = 0, **more: Any) -> Path:
    """The same by GenerateTask, whose decoder is a GGUF file; ``more`` of the task."""
    task = {
        "kind": "generate", "input": SEEN, "encoder": "image", "encoder_outputs": ["features"], "project": None,
        "decoder": {"kind": "gguf", "model": _file(MODEL), "context_tokens": context_tokens},
        "tokenizer": {"file": "tokenizer.json", "add_special_tokens": False},
        "visual": {"token": "<image>", "per_tile": PATCHES}, "positions": "sequence", "eos_ids": [tiny_gguf.END],
        "max_tokens": 6, "beams": 1, "length_penalty": 1.0, "memory": MEMORY, **more,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    write_model(folder, context_tokens, seed)
    (folder / "image.onnx").write_bytes(_encoder())
    _tokenizer(folder / "tokenizer.json")
    ends = {"inputs": {"tiles": "tiles"}, "outputs": {"features": "features"}}
    _write(folder, task, {"image": {"file": "image.onnx", "precision": "f32", **ends}})
    rng = np.random.default_rng(1)
    ids = rng.integers(30, 280, PATCHES + 5)
    visual = (np.arange(len(ids)) >= 2) & (np.arange(len(ids)) < 2 + PATCHES)
    features = rng.standard_normal((1, PATCHES, tiny_gguf.TINY.width)).astype(np.float32)
    given = {"ids": ids, "visual": visual, "features": features, "positions": np.arange(len(ids)), "answer": ANSWER}
    return _probed(folder, given)


def write_model(folder: Path, context_tokens: int, seed: int) -> None:
    size = dataclasses.replace(tiny_gguf.TINY, context=max(context_tokens, tiny_gguf.TINY.context))
    tiny_gguf.write_text(folder / MODEL, tiny_gguf.text_weights(size, seed), size)


def hashed(folder: Path, **changed: Any) -> Path:
    """The manifest again, for the files that are there now."""
    fields = json.loads((folder / "manifest.json").read_text()) | changed
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "manifest.json"]
    fields["files"] = {
        path.name: {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "bytes": path.stat().st_size}
        for path in paths
    }
    (folder / "manifest.json").write_text(json.dumps(fields))
    return folder


def _file(name: str) -> dict[str, str]:
    return {"file": name, "quantization": "F32"}


def _write(folder: Path, task: Mapping[str, Any], graphs: Mapping[str, Any]) -> None:
    tasks = {
        "ask": {**task, "prompt": PROMPT},
        "caption": {**task, "prompt": PROMPT.replace("{text}", "Describe this image.")},
    }
    fields = {
        "schema_version": 4, "name": "tiny", "version": 1, "description": "for tests", "licence": "Apache-2.0",
        "training_data": [], "graphs": graphs, "tasks": tasks, "probe": [],
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(fields))
    hashed(folder)


def _probed(folder: Path, given: Mapping[str, Any]) -> Path:
    logits = answer_logits(load_bundle(folder, allow_unsigned=True, allow_older=True), "ask", dict(given))
    inputs = {f"in.{name}": array for name, array in given.items()}
    (folder / PROBE).write_bytes(npz(**inputs, **{"out.logits": logits}))
    return hashed(folder, probe=[{"task": "ask", "file": PROBE, "tolerance": 0.05}])


def _encoder() -> bytes:
    """tiles [N, 3, 8, 8] -> features [N, 4, D]: a quarter of the rows each, by a matrix."""
    from onnx import TensorProto, helper, numpy_helper

    numbers, width = 3 * SIDE * SIDE // PATCHES, tiny_gguf.TINY.width
    weight = np.random.default_rng(2).standard_normal((numbers, width)).astype(np.float32) / np.float32(numbers**0.5)
    constants = [
        numpy_helper.from_array(np.array([0, PATCHES, numbers]), "shape"), numpy_helper.from_array(weight, "weight")
    ]  # fmt: skip
    nodes = [
        helper.make_node("Reshape", ["tiles", "shape"], ["patches"]),
        helper.make_node("MatMul", ["patches", "weight"], ["features"]),
    ]
    tiles = helper.make_tensor_value_info("tiles", TensorProto.FLOAT, ["N", 3, SIDE, SIDE])
    features = helper.make_tensor_value_info("features", TensorProto.FLOAT, ["N", PATCHES, width])
    graph = helper.make_graph(nodes, "image", [tiles], [features], constants)
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    return bytes(model.SerializeToString())


def _tokenizer(path: Path) -> None:
    """The words of tiny_gguf's vocabulary, as the ``tokenizers`` package writes them."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    words = tiny_gguf.vocabulary()
    tokenizer = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in tiny_gguf.SPECIAL])
    tokenizer.save(str(path))
