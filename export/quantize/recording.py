"""An engine that writes down what graphs are fed, on a bounded disk.

Calls are stored as they come, one ``.npz`` each. Of one image a graph keeps its calls 1, 2, 4, 8 ...: the first tile
and the whole prompt, then ever fewer. Where a graph's calls outgrow the disk it may take, every second image is
dropped, and again, so that what stays is spread evenly.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_rsvlm.bundle import Bundle
from edge_rsvlm.export.graphs.sliced import WHOLE_BYTES, SlicedSession, weight_bytes
from edge_rsvlm.pipeline.runtime import Engine
from edge_rsvlm.tasks.gguf import VisionLanguageModel
from edge_rsvlm.types import InferenceSession, LanguageModel

HALF_FROM_BYTES = 1 << 20
"""Larger arrays are stored in half precision: maps of features, key-value caches."""


def _stored(array: NDArray[Any]) -> NDArray[Any]:
    large = array.dtype == np.float32 and array.nbytes >= HALF_FROM_BYTES
    return array.astype(np.float16) if large and np.abs(array).max() <= np.finfo(np.float16).max else array


@dataclass
class _GraphRecord:
    """Calls of one graph: ``stride`` images apart from each other, each other call once."""

    folder: Path
    most_bytes: int
    stride: int = 1
    stored_bytes: int = 0
    seen: set[bytes] = field(default_factory=set)
    calls: dict[int, int] = field(default_factory=dict)
    """Calls so far by image."""

    def note(self, image: int, inputs: Mapping[str, NDArray[Any]]) -> None:
        call = self.calls[image] = self.calls.get(image, 0) + 1
        if call & (call - 1) or image % self.stride:
            return
        digest = hashlib.sha256()
        for name in sorted(inputs):
            digest.update(f"{name}{inputs[name].shape}".encode() + np.ascontiguousarray(inputs[name]).tobytes())
        if digest.digest() in self.seen:  # the same words for every image
            return
        self.seen.add(digest.digest())
        path = self.folder / f"{image:05d}-{call:05d}.npz"
        self.folder.mkdir(parents=True, exist_ok=True)
        np.savez(path, **{f"in.{name}": _stored(array) for name, array in inputs.items()})  # type: ignore[arg-type]
        self.stored_bytes += path.stat().st_size
        while self.stored_bytes > self.most_bytes and self.stride <= image:
            self._thin_out()

    def _thin_out(self) -> None:
        self.stride *= 2
        for path in self.folder.glob("*.npz"):
            if int(path.stem.partition("-")[0]) % self.stride:
                self.stored_bytes -= path.stat().st_size
                path.unlink()


class RecordingEngine:
    """Opens graphs as ``inner`` does, and writes down what they are fed. ``image`` is the one under way."""

    def __init__(self, inner: Engine, bundle: Bundle, folder: Path, most_bytes: int) -> None:
        graphs = bundle.manifest.graphs.items()
        self._inner, self.image = inner, 0
        self._records = {bundle.path(g.file): _GraphRecord(folder / name, most_bytes) for name, g in graphs}

    def open(self, graph: Path) -> InferenceSession:
        session = SlicedSession(graph) if weight_bytes(graph) > WHOLE_BYTES else self._inner.open(graph)
        return _RecordingSession(session, self._records[graph], self)

    def open_language(self, model: Path, context_tokens: int, beams: int = 1) -> LanguageModel:
        return self._inner.open_language(model, context_tokens, beams)

    def open_vision_language(self, model: Path, projector: Path, context_tokens: int) -> VisionLanguageModel:
        return self._inner.open_vision_language(model, projector, context_tokens)


@dataclass(frozen=True)
class _RecordingSession:
    session: InferenceSession
    record: _GraphRecord
    engine: RecordingEngine

    def run(self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> list[NDArray[Any]]:
        self.record.note(self.engine.image, inputs)
        return self.session.run(inputs, outputs)
