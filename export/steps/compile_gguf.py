"""The language model of a bundle as a GGUF file for llama.cpp, and its tasks pointed at it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_rsvlm.config.manifest import GenerateTask, Manifest, OnnxDecoder
from edge_rsvlm.errors import UsageError
from edge_rsvlm.export.families.base import Family, Source
from edge_rsvlm.export.gguf.importance import measure_importance
from edge_rsvlm.export.gguf.quantizing import TYPES, quantize
from edge_rsvlm.export.gguf.writing import can_write, write_text_model
from edge_rsvlm.export.quantize.calibration import Samples
from edge_rsvlm.export.steps.merge_lora import ModelWeights

FILE, WIDE_FILE = "language.gguf", "language-f16.gguf"
CONTEXT_TOKENS = 2048
"""Image, question and answer together; a longer one costs caches whether it is used or not."""
Metrics = dict[str, float | int | str]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class LanguageWriter:
    """Writes the text model of one checkpoint; its adapters are in ``weights``."""

    family: Family
    source: Source
    weights: ModelWeights

    def check(self) -> None:
        """UsageError for a model that llama.cpp does not know."""
        if reason := can_write(self.family, self.source):
            raise UsageError(
                f"{self.source.folder}: not for llama.cpp ({reason})", fix="take target onnx:int4 or onnx:int8"
            )

    def write(self, kind: str, folder: Path, samples: Samples | None, decoder: str, progress: Progress) -> Metrics:
        """``folder/language.gguf`` with weights of ``kind``; where calibration reached the ``decoder`` graph, the
        rounding of fewer bits is weighed by what it was fed."""
        if kind not in TYPES:
            return write_text_model(self.family, self.source, self.weights, folder / FILE, _wide(kind), progress)
        wide = folder / WIDE_FILE
        written = write_text_model(self.family, self.source, self.weights, wide, "F16", progress)
        fed = () if samples is None else samples.of(decoder)
        importance = measure_importance(self.family, self.source, self.weights, fed, progress) if fed else None
        found = quantize(wide, folder / FILE, kind, importance)
        wide.unlink()
        return {**written, **found, "calibrated": "yes" if importance else "no"}


def _wide(kind: str) -> Any:
    return kind


def replaced_graphs(manifest: Manifest) -> tuple[str, ...]:
    """Graphs whose work the GGUF file takes over: embedding and decoder."""
    decoders = _decoders(manifest)
    return tuple(dict.fromkeys(name for decoder in decoders for name in (decoder.embed, decoder.graph)))


def decoder_graph(manifest: Manifest) -> str:
    """The decoder's name; UsageError for a model that writes nothing."""
    for decoder in _decoders(manifest):
        return decoder.graph
    raise UsageError("GGUF is for models that write text, and this one does not", fix="take an onnx target")


def _decoders(manifest: Manifest) -> list[OnnxDecoder]:
    tasks = [task for _, task in manifest.tasks if isinstance(task, GenerateTask)]
    return [task.decoder for task in tasks if isinstance(task.decoder, OnnxDecoder)]


def point_at(fields: dict[str, Any], kind: str, longest: int) -> None:
    """Let the tasks of a manifest's ``fields`` be answered by the file, which reads at most ``longest`` tokens."""
    decoder = {
        "kind": "gguf", "model": {"file": FILE, "quantization": kind}, "context_tokens": min(longest, CONTEXT_TOKENS)
    }  # fmt: skip
    for task in fields["tasks"].values():
        if task is not None and task.get("kind") == "generate":
            task["decoder"] = decoder
