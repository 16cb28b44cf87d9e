"""A bundle and an engine without a trained model: the fake sees bright squares and bright differences."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edge_rsvlm.config.manifest import Manifest
from edge_rsvlm.engines.fake import FakeSession

CONTENT = b"\x08\x08"
"""Of every file: as an ONNX model it has a version and nothing else."""
MEMORY = {"session_bytes": 1 << 20, "tile_bytes": 1 << 20}
INPUT = {
    "bands": ["red", "green", "blue", "nir", "validity"],
    "ranges": {"uint8": [0, 255], "uint16": [0, 4000], "float32": [0, 1]},
    "mean": 0.5,
    "std": 0.5,
    "tile_px": 128,
    "overlap_px": 64,
    "resolution_m": [0.1, 20.0],
    "whole_px": 0,
    "resampling": "bilinear",
}


GRAPHS = {
    "encoder": ({"tiles": "pixels"}, {"c1": "first"}),
    "detect": ({"c1": "first"}, {"scores": "heat", "ltrb": "sides"}),
    "change": ({"before_c1": "earlier", "after_c1": "later"}, {"change": "probability"}),
}
"""Inputs and outputs, whose names in the graph differ from their roles."""


def graph(name: str, inputs: Mapping[str, str], outputs: Mapping[str, str]) -> dict[str, Any]:
    return {"file": f"{name}.onnx", "precision": "f32", "inputs": dict(inputs), "outputs": dict(outputs)}


def manifest(files: Mapping[str, Any] | None = None, **input_options: Any) -> dict[str, Any]:
    """A valid manifest with a detect and a change head; ``input_options`` override the input spec."""
    spec = {**INPUT, **input_options}
    return {
        "schema_version": 4,
        "name": "fake",
        "version": 1,
        "description": "for tests",
        "licence": "Apache-2.0",
        "training_data": [],
        "graphs": {name: graph(name, *sides) for name, sides in GRAPHS.items()},
        "tasks": {
            "detect": {
                "kind": "heat_map",
                "input": spec,
                "encoder": "encoder",
                "head": "detect",
                "encoder_outputs": ["c1"],
                "classes": ["square", "car"],
                "stride": 4,
                "score_threshold": 0.5,
                "nms_iou": 0.5,
                "max_boxes_per_tile": 500,
                "memory": MEMORY,
            },
            "change": {
                "input": spec,
                "encoder": "encoder",
                "head": "change",
                "encoder_outputs": ["c1"],
                "stride": 2,
                "threshold": 0.5,
                "mirrored": False,
                "min_area_m2": 0,
                "min_cells": 4,
                "memory": MEMORY,
            },
        },
        "accuracy": [],
        "probe": [{"graph": "encoder", "file": "probe.npz", "tolerance": 0.01}],
        "files": {
            name: {"sha256": hashlib.sha256(CONTENT).hexdigest(), "bytes": len(CONTENT)}
            for name in (files or ("encoder.onnx", "detect.onnx", "change.onnx", "probe.npz"))
        },
    }


def write_bundle(folder: Path, **input_options: Any) -> Path:
    data = manifest(**input_options)
    folder.mkdir(parents=True, exist_ok=True)
    for name in data["files"]:
        (folder / name).write_bytes(CONTENT)
    (folder / "manifest.json").write_text(json.dumps(data))
    return folder


def parsed(**input_options: Any) -> Manifest:
    return Manifest.model_validate(manifest(**input_options))


class FakeEngine:
    """Opens graphs by file name as functions of the tile's red channel (what the encoder gives is the tile itself)."""

    def open(self, graph: Path) -> FakeSession:
        return FakeSession({"encoder.onnx": _encode, "detect.onnx": _detect, "change.onnx": _change}[graph.name])


def fake_engine(threads: int, arena_bytes: int) -> FakeEngine:
    return FakeEngine()


def _encode(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {"first": inputs["pixels"]}


def _change(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Probability 1 where red differs by more than half the range, averaged over 2 x 2 tile pixels."""
    differs = (np.abs(inputs["later"][:, :1] - inputs["earlier"][:, :1]) > 1.0).astype(np.float32)
    n, c, h, w = differs.shape
    return {"probability": differs.reshape(n, c, h // 2, 2, w // 2, 2).mean(axis=(3, 5))}


def _detect(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """One peak per bright blob, at its bounding box's centre, with its exact sides."""
    tiles = inputs["first"]
    n, _, h, w = tiles.shape
    scores = np.zeros((n, 2, h // 4, w // 4), np.float32)
    ltrb = np.ones((n, 4, h // 4, w // 4), np.float32)
    for k in range(n):
        for x0, y0, x1, y1 in blobs(tiles[k, 0] > 0.2):
            col, row = int((x0 + x1) / 2 // 4), int((y0 + y1) / 2 // 4)
            cx, cy = (col + 0.5) * 4, (row + 0.5) * 4
            scores[k, 0, row, col] = 0.9
            ltrb[k, :, row, col] = cx - x0, cy - y0, x1 - cx, y1 - cy
    return {"heat": scores, "sides": ltrb}


def blobs(bright: np.ndarray) -> list[tuple[int, int, int, int]]:
    """Bounding boxes of 4-connected bright blobs, by flood fill."""
    left = bright.copy()
    found = []
    while left.any():
        stack = [tuple(np.argwhere(left)[0])]
        rows, cols = [], []
        while stack:
            r, c = stack.pop()
            if 0 <= r < left.shape[0] and 0 <= c < left.shape[1] and left[r, c]:
                left[r, c] = False
                rows.append(r)
                cols.append(c)
                stack += [(r + 1, c), (r - 1, c), (r, c + 1), (r, c - 1)]
        found.append((min(cols), min(rows), max(cols) + 1, max(rows) + 1))
    return found
