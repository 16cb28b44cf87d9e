"""A real bundle of a few kilobytes: one ONNX graph written by hand, its probe, and a task of every kind."""

from __future__ import annotations

import hashlib
import io
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tests.fakes import INPUT, MEMORY

FLOAT, EXTERNAL = 1, 1
SIZE = 4
WEIGHTS = np.arange(1, SIZE + 1, dtype=np.float32)
GOLDEN = np.float32([[1, -2, 3, 4]])


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def field(number: int, value: int | str | bytes) -> bytes:
    """One field of a protobuf message: a number, or anything with a length."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(data)) + data


def tensor(name: str, external: Mapping[str, str] | None = None) -> bytes:
    """TensorProto ``name`` of WEIGHTS: inside, or where ``external`` says."""
    head = field(1, SIZE) + field(2, FLOAT) + field(8, name)
    if external is None:
        return head + field(9, WEIGHTS.tobytes())
    entries = b"".join(field(13, field(1, key) + field(2, value)) for key, value in external.items())
    return head + entries + field(14, EXTERNAL)


def _value(name: str) -> bytes:
    shape = field(1, field(1, 1)) + field(1, field(1, SIZE))
    return field(1, name) + field(2, field(1, field(1, FLOAT) + field(2, shape)))


def model(initializer: bytes | None = None, *, graph_extra: bytes = b"", model_extra: bytes = b"") -> bytes:
    """ModelProto of ``y = x * w``."""
    node = field(1, "x") + field(1, "w") + field(2, "y") + field(4, "Mul")
    graph = field(1, node) + field(2, "tiny") + field(5, tensor("w") if initializer is None else initializer)
    graph += field(11, _value("x")) + field(12, _value("y")) + graph_extra
    return field(1, 8) + field(7, graph) + field(8, field(1, "") + field(2, 17)) + model_extra


def npz(**arrays: Any) -> bytes:
    stored = io.BytesIO()
    np.savez(stored, **arrays)
    return stored.getvalue()


def files(**changed: bytes) -> dict[str, bytes]:
    """Contents by name; ``changed`` by name with ``_`` for ``.`` adds or replaces."""
    plain = {
        "main.onnx": model(),
        "weights/second.onnx": model(tensor("w", {"location": "w.data", "offset": "4", "length": "16"})),
        "weights/w.data": struct.pack("<f", 0) + WEIGHTS.tobytes(),
        "tokenizer.json": b"{}",
        "answers.txt": b"yes\nno\n",
        "probe.npz": npz(**{"in.x": GOLDEN, "out.y": GOLDEN * WEIGHTS}),
    }
    return plain | {name.replace("_", "."): data for name, data in changed.items()}


def _tasks() -> dict[str, Any]:
    tokenizer = {"file": "tokenizer.json", "add_special_tokens": True, "max_length": 8}
    text = {"graph": "second", "tokenizer": tokenizer}
    steps = [{"op": "resize", "size": [4, 4], "filter": "bicubic"}, {"op": "center_crop", "size": [4, 4]}]
    match = {
        "input": {**INPUT, "prepare": steps}, "encoder": "main", "text": text, "label_prompt": "a {label}",
        "score": "softmax", "logit_scale": 10.0, "memory": MEMORY,
    }  # fmt: skip
    generate = {
        "kind": "generate", "input": {**INPUT, "resolution_m": None}, "encoder": "main", "encoder_outputs": ["y"],
        "project": None,
        "decoder": {
            "kind": "onnx", "embed": "second", "graph": "second", "cache": {"layers": 1, "heads": 1, "head_dim": 2}
        }, "tokenizer": tokenizer,
        "visual": {"token": "<image>", "per_tile": 4}, "prompt": "{image} {text}", "positions": "sequence",
        "eos_ids": [2], "max_tokens": 4, "beams": 1,
        "length_penalty": 1.0, "boxes": {"open": "[", "close": "]", "scale": 1000}, "memory": MEMORY,
    }  # fmt: skip
    detect = {
        "kind": "open_vocabulary", "input": INPUT, "encoder": "main", "text": text, "query_prompt": "a {label}",
        "score_threshold": 0.1, "nms_iou": 0.5, "max_boxes_per_tile": 10, "memory": MEMORY,
    }  # fmt: skip
    ask = {
        "kind": "answer_classes", "input": INPUT, "graph": "main", "tokenizer": tokenizer, "answers": "answers.txt",
        "score": "sigmoid", "memory": MEMORY,
    }  # fmt: skip
    change = {
        "input": INPUT, "encoder": "main", "head": "second", "encoder_outputs": ["y"], "stride": 2, "threshold": 0.5,
        "mirrored": True, "min_area_m2": 0, "min_cells": 1, "memory": MEMORY,
    }  # fmt: skip
    return {
        "classify": match, "search": match, "caption": generate, "ground": generate, "ask": ask, "detect": detect,
        "change": change,
    }  # fmt: skip


def manifest(contents: Mapping[str, bytes], **changed: Any) -> dict[str, Any]:
    ends = {"inputs": {"tiles": "x"}, "outputs": {"features": "y"}, "precision": "f32"}
    return {
        "schema_version": 4,
        "name": "tiny",
        "version": 3,
        "description": "for tests",
        "licence": "Apache-2.0",
        "training_data": ["none"],
        "graphs": {"main": {"file": "main.onnx", **ends}, "second": {"file": "weights/second.onnx", **ends}},
        "tasks": _tasks(),
        "accuracy": [
            {"task": "ask", "metric": "accuracy", "value": 0.5, "interval": [0.4, 0.6], "samples": 9, "data": "none",
             "command": "none"}
        ],
        "probe": [{"graph": name, "file": "probe.npz", "tolerance": 0.001} for name in ("main", "second")],
        "steps": [{"step": "onnx", "hash": "0" * 64, "tools": {"onnx": "1"}, "metrics": {"cosine": 1.0}}],
        "files": {
            name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)} for name, data in contents.items()
        },
        **changed,
    }  # fmt: skip


def write(folder: Path, contents: Mapping[str, bytes] | None = None, **changed: Any) -> Path:
    """The bundle in ``folder``; ``changed`` replaces keys of its manifest."""
    contents = files() if contents is None else contents
    for name, data in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    (folder / "manifest.json").write_text(json.dumps(manifest(contents, **changed), indent=1))
    return folder
