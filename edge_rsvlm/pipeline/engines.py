"""Which library opens what, on which device."""

from __future__ import annotations

from pathlib import Path

from edge_rsvlm.engines.onnxruntime import OnnxRuntimeEngine
from edge_rsvlm.types import InferenceSession, LanguageModel


class CpuEngine:
    """Graphs by ONNX Runtime, GGUF models by llama.cpp."""

    def __init__(self, threads: int, arena_bytes: int) -> None:
        self._threads = threads
        self._graphs = OnnxRuntimeEngine(threads=threads, arena_bytes=arena_bytes)

    def open(self, graph: Path) -> InferenceSession:
        return self._graphs.open(graph)

    def open_language(self, model: Path, context_tokens: int) -> LanguageModel:
        from edge_rsvlm.engines.llama import LlamaLanguage

        return LlamaLanguage(model, context_tokens, self._threads)
