"""Which library opens what, on which device."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from edge_rsvlm.engines.onnxruntime import OnnxRuntimeEngine
from edge_rsvlm.tasks.gguf import VisionLanguageModel
from edge_rsvlm.types import InferenceSession, LanguageModel

if TYPE_CHECKING:
    from edge_rsvlm.engines.tensorrt_device import Device
    from edge_rsvlm.pipeline.built import Engine


class LlamaEngine:
    """GGUF models by llama.cpp."""

    def __init__(self, threads: int) -> None:
        self._threads = threads

    def open_language(self, model: Path, context_tokens: int, beams: int = 1) -> LanguageModel:
        from edge_rsvlm.engines.llama import LlamaLanguage

        return LlamaLanguage(model, context_tokens, self._threads, beams)

    def open_vision_language(self, model: Path, projector: Path, context_tokens: int) -> VisionLanguageModel:
        from edge_rsvlm.engines.llama import LlamaLanguage
        from edge_rsvlm.engines.llama_vision import LlamaVision

        return LlamaVision(LlamaLanguage(model, context_tokens, self._threads), projector)


class CpuEngine(LlamaEngine):
    """Graphs by ONNX Runtime, GGUF models by llama.cpp."""

    def __init__(self, threads: int, arena_bytes: int) -> None:
        super().__init__(threads)
        self._graphs = OnnxRuntimeEngine(threads=threads, arena_bytes=arena_bytes)

    def open(self, graph: Path) -> InferenceSession:
        return self._graphs.open(graph)


class GpuEngine(CpuEngine):
    """Graphs by their TensorRT engines; those that the bundle has none for, and GGUF models, as CpuEngine.

    ``engines`` by the file that the graph has for ONNX Runtime.
    """

    def __init__(self, device: Device, engines: Mapping[Path, Engine], threads: int, arena_bytes: int) -> None:
        super().__init__(threads, arena_bytes)
        self._device, self._engines = device, engines

    def open(self, graph: Path) -> InferenceSession:
        from edge_rsvlm.engines.tensorrt import TensorRtSession
        from edge_rsvlm.pipeline.built import read_plan

        engine = self._engines.get(graph)
        if engine is None:
            return super().open(graph)
        return TensorRtSession(self._device, read_plan(engine), engine.name)
