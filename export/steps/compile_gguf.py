"""What llama.cpp runs of a bundle: its language model as a GGUF file, a projector beside it where llama.cpp sees too,
and the tasks pointed at them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from edge_rsvlm.config.manifest import Manifest
from edge_rsvlm.config.task_specs import GenerateTask, OnnxDecoder
from edge_rsvlm.errors import UsageError
from edge_rsvlm.export.families.base import Family, Source
from edge_rsvlm.export.gguf.files import Precision
from edge_rsvlm.export.gguf.importance import measure_importance
from edge_rsvlm.export.gguf.projector import can_see, image_steps, prompt_around, write_projector
from edge_rsvlm.export.gguf.quantizing import Importance, quantize
from edge_rsvlm.export.gguf.writing import can_write, llama_prompt, write_text_model
from edge_rsvlm.export.quantize.calibration import Samples
from edge_rsvlm.export.steps.merge_lora import ModelWeights
from edge_rsvlm.pipeline.shapes import prepared_shape

FILE, WIDE_FILE, PROJECTOR_FILE = "language.gguf", "language-f16.gguf", "projector.gguf"
WIDE: dict[str, Precision] = {"F32": "F32", "F16": "F16"}
"""Kinds that are written as they are; all others are made of F16."""
TEXT_TOKENS, MARK_TOKENS = 512, 8
"""Room for a question in its template, and for what is written around a tile."""
LARGE_PX = 1 << 13
GRAPH_KEYS = ("graph", "encoder", "head")
"""Where tasks that do not write text name their graphs."""
Metrics = dict[str, float | int | str]
Progress = Callable[[int, int], None]
Fields = dict[str, Any]


@dataclass(frozen=True)
class LanguageWriter:
    """Writes the model of one checkpoint; its adapters are in ``weights``. ``vision`` is what sees."""

    family: Family
    source: Source
    weights: ModelWeights
    vision: Literal["onnx", "mmproj"] = "onnx"

    def check(self) -> None:
        """UsageError for a model that llama.cpp does not know, or what it does not do alone. Weights are not read."""
        if reason := can_write(self.family, self.source):
            raise UsageError(
                f"{self.source.folder}: not for llama.cpp ({reason})", fix="take target onnx:int4 or onnx:int8"
            )
        if self.vision == "onnx":
            return
        if reason := can_see(self.family, self.source):
            raise UsageError(f"{self.source.folder}: {reason}", fix='take [gguf] vision = "onnx"')
        for verb, task in self.family.describe(self.source).tasks.items():
            if task["beams"] != 1:
                raise UsageError(f"{verb}: where llama.cpp sees there is one beam", fix='take [gguf] vision = "onnx"')

    def replaces(self, manifest: Manifest) -> tuple[str, ...]:
        """Graphs whose work llama.cpp takes over: embedding and decoder, and where it sees, all of the tasks that write
        but what others need."""
        needed = {name for _, task in manifest.tasks for name in self._graphs(task)}
        return tuple(name for name in manifest.graphs if name not in needed)

    def _graphs(self, task: BaseModel | None) -> Iterator[str]:
        """What a task still needs of the graphs."""
        if isinstance(task, GenerateTask):
            seeing = (task.encoder, task.project) if self.vision == "onnx" else ()
            yield from (name for name in seeing if name is not None)
        elif task is not None:
            yield from _named(task)

    def write(self, kind: str, folder: Path, samples: Samples | None, decoder: str, progress: Progress) -> Metrics:
        """``language.gguf`` with weights of ``kind``, and ``projector.gguf`` where llama.cpp sees, in ``folder``.

        Where calibration reached the ``decoder`` graph, the rounding of fewer bits is weighed by what it was fed. The
        projector keeps F16: fewer bits made it no faster, and its features several per cent worse.
        """
        found = self._write_language(kind, folder, samples, decoder, progress)
        if self.vision == "onnx":
            return found
        path = folder / PROJECTOR_FILE
        write_projector(self.family, self.source, self.weights, path, projector_precision(kind), progress)
        return {**found, "projector bytes": path.stat().st_size}

    def _write_language(
        self, kind: str, folder: Path, samples: Samples | None, decoder: str, progress: Progress
    ) -> Metrics:
        if precision := WIDE.get(kind):
            return write_text_model(self.family, self.source, self.weights, folder / FILE, precision, progress)
        wide = folder / WIDE_FILE
        written = write_text_model(self.family, self.source, self.weights, wide, "F16", progress)
        importance = self._importance(samples, decoder, progress)
        found = quantize(wide, folder / FILE, kind, importance)
        wide.unlink()
        return {**written, **found, "calibrated": "yes" if importance else "no"}

    def _importance(self, samples: Samples | None, decoder: str, progress: Progress) -> Importance | None:
        fed = () if samples is None else samples.of(decoder)
        return measure_importance(self.family, self.source, self.weights, fed, progress) if fed else None

    def point(self, fields: Fields, kind: str, longest: int) -> None:
        """Let the tasks of a manifest's ``fields`` be answered by the files; the model reads ``longest`` tokens."""
        model = {"file": FILE, "quantization": kind}
        for verb, task in fields["tasks"].items():
            if task is None or task.get("kind") != "generate":
                continue
            spec = GenerateTask.model_validate(task)
            common = {"kind": "gguf", "model": model, "context_tokens": context_tokens(spec, longest)}
            if self.vision == "onnx":
                task["decoder"] = common
            else:
                projector = {"file": PROJECTOR_FILE, "quantization": projector_precision(kind)}
                fields["tasks"][verb] = {**common, "projector": projector, **self._seeing(spec)}

    def _seeing(self, spec: GenerateTask) -> Fields:
        """What a task asks, for GgufTask."""
        prompt = llama_prompt(self.family, self.source, prompt_around(self.family, self.source, spec.prompt))
        asked = spec.model_dump(include={"input", "repetition_penalty", "max_tokens", "boxes", "memory"})
        steps = image_steps(self.family, self.source, asked["input"]["prepare"])
        asked["input"] |= {"prepare": steps, "mean": 0.0, "std": 1.0 / 255.0}
        return {**asked, "prompt": prompt}


def projector_precision(kind: str) -> Precision:
    return "F32" if kind == "F32" else "F16"


def decoder_graph(manifest: Manifest) -> str:
    """The decoder's name; UsageError for a model that writes nothing."""
    for task in _writing(manifest).values():
        if isinstance(task.decoder, OnnxDecoder):
            return task.decoder.graph
    raise UsageError("GGUF is for models that write text, and this one does not", fix="take an onnx target")


def context_tokens(task: GenerateTask, longest: int) -> int:
    """Tokens of the largest image, a question and the longest answer, of ``longest`` at most: every one costs caches,
    whether it is used or not."""
    steps, per_tile, unit_px = task.input.prepare, task.visual.per_tile, task.visual.unit_px
    side = LARGE_PX if steps else task.input.tile_px
    shape = prepared_shape((side, side), steps)
    each = per_tile or shape.height * shape.width // (unit_px or 1) ** 2
    needed = shape.views * (each + MARK_TOKENS) + TEXT_TOKENS + task.max_tokens
    return min(longest, needed)


def _writing(manifest: Manifest) -> dict[str, GenerateTask]:
    return {verb: task for verb, task in manifest.tasks if isinstance(task, GenerateTask)}


def _named(spec: BaseModel) -> Iterator[str]:
    """Graphs that a task, or a part of it, names."""
    for key, value in spec:
        if key in GRAPH_KEYS and isinstance(value, str):
            yield value
        elif isinstance(value, BaseModel):
            yield from _named(value)
