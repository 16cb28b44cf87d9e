"""Sizes that a TensorRT engine is built for, from what the bundle's tasks can ask of a graph.

Letters: N batch, H, W pixels, S tokens read at once, P tokens read before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import onnx

from edge_rsvlm.budget import BATCHES
from edge_rsvlm.config.inputs import InputSpec, TextEncoder
from edge_rsvlm.config.manifest import Manifest, ShapeRange
from edge_rsvlm.config.offered import AnyTask
from edge_rsvlm.config.task_specs import AnswerTask, GenerateTask, OnnxDecoder, ReferTask, TextDetectTask
from edge_rsvlm.errors import InputError, UsageError
from edge_rsvlm.export.tensorrt.dims import Dims, dims_of, inputs, size_of
from edge_rsvlm.pipeline.shapes import Shape, prepared_shape
from edge_rsvlm.pipeline.views import F32_BYTES, PROMPT_TOKENS
from edge_rsvlm.tasks.decoder import cache_names
from edge_rsvlm.tasks.match import TEXTS_AT_ONCE

BATCH = BATCHES[0]
ASPECTS = ((1, 2), (1, 1), (2, 1))
"""Of images looked at whole, where a model's size follows the image's; longer ones need --device cpu."""
SMALLEST_PX = 64
"""Of images looked at whole, and of golden probes of models that take any size."""
MOST_REGIONS = 100
CACHE_BYTES = 256 << 20
"""Key-value caches of a batch: larger batches are cut, and each cache is held four times (read and written, by the GPU
and the CPU)."""
Sizes = tuple[int, int, int]
"""Least, usual, most."""


def shape_ranges(manifest: Manifest, name: str, graph: Path) -> dict[str, ShapeRange]:
    """By input of the ONNX file ``graph``, which is graph ``name`` of the manifest. Other graphs of the bundle that it
    reads from lie beside it.

    InputError names an input whose sizes no task tells.
    """
    known = _Sizes(manifest, name, graph)
    roles = {value: role for role, value in manifest.graphs[name].inputs.items()}
    return {value: known.span(value, roles.get(value, value), dims) for value, dims in inputs(graph).items()}


@dataclass(frozen=True)
class _Sizes:
    manifest: Manifest
    name: str
    graph: Path

    def span(self, value: str, role: str, dims: Dims) -> ShapeRange:
        """What the axes of an input can be; those with a number in the file are that."""
        axes = self._axes(role)
        if len(axes) != len(dims):
            raise InputError(f"nothing says how large '{value}' of {self.name} gets", fix="leave TensorRT out for it")
        spans = [(dim,) * 3 if isinstance(dim, int) else axis for dim, axis in zip(dims, axes, strict=True)]
        least, usual, most = zip(*spans, strict=True)
        return ShapeRange(least=least, usual=usual, most=most)

    def _axes(self, role: str) -> list[Sizes]:
        batch = self._batch()
        if role == "tiles":
            return [batch, (0, 0, 0), *self._pixels(self._seen())]
        if role == "features" and any(isinstance(t, AnswerTask) and t.graph == self.name for t in self._tasks()):
            return [batch, (1, MOST_REGIONS // 2, MOST_REGIONS), (0, 0, 0)]
        if role in ("input_ids", "token_type_ids") or (role == "attention_mask" and not self._decoding()):
            return [batch, self._tokens()]
        if role in ("objects", "objects_mask") and (referring := self._referring()):
            most = max(task.most_objects for task in referring)
            return [batch, (1, -(-most // 2), most), *([(0, 0, 0)] if role == "objects" else [])]
        if generating := self._decoding():
            return self._decoder(role, batch, generating)
        return self._feature_map(role)

    def _tasks(self) -> Iterator[AnyTask]:
        for _, task in self.manifest.tasks:
            if task is not None:
                yield task

    def _decoding(self) -> list[GenerateTask]:
        """Tasks whose decoder this graph is, or whose words it embeds."""
        return [
            task
            for task in self._tasks()
            if isinstance(task, GenerateTask)
            and isinstance(task.decoder, OnnxDecoder)
            and self.name in (task.decoder.graph, task.decoder.embed)
        ]

    def _referring(self) -> list[ReferTask]:
        """Tasks whose phrases this graph reads."""
        return [task for task in self._tasks() if isinstance(task, ReferTask) and task.graph == self.name]

    def _batch(self) -> Sizes:
        if tasks := self._decoding():
            beams = max(task.beams for task in tasks)
            # At least two, so that engines know which axis the batch is.
            images = max(2, min(BATCH, CACHE_BYTES // max(_cache_bytes(task) for task in tasks)))
            return 1, beams, beams * images
        if self._referring():
            return 1, 1, 2  # one phrase at a time; two, so that engines know which axis the batch is
        if any(text.graph == self.name for text in self._texts()):
            return 1, 1, TEXTS_AT_ONCE
        seeing = [task for task in self._tasks() if self.name == getattr(task, "encoder", None)]
        alone = bool(seeing) and all(isinstance(task, GenerateTask) and task.input.prepare for task in seeing)
        return 1, 1 if alone else BATCH, BATCH

    def _texts(self) -> list[TextEncoder]:
        found = [getattr(task, "text", None) for task in self._tasks()]
        return [text for text in found if isinstance(text, TextEncoder)]

    def _tokens(self) -> Sizes:
        """Tokens that a text, a question or a prompt has."""
        if tasks := self._decoding():
            most = max(_prompt_tokens(task) for task in tasks)
            return 1, 1, most
        asking = [task.tokenizer for task in self._tasks() if isinstance(task, AnswerTask) and task.graph == self.name]
        asking += [task.tokenizer for task in self._referring()]
        found = [*asking, *(text.tokenizer for text in self._texts() if text.graph == self.name)]
        if found and all(tokenizer.pad_to for tokenizer in found):
            padded = max(tokenizer.pad_to or 0 for tokenizer in found)
            return padded, padded, padded
        most = max((tokenizer.max_length or PROMPT_TOKENS for tokenizer in found), default=PROMPT_TOKENS)
        return 1, min(16, most), most

    def _decoder(self, role: str, batch: Sizes, tasks: list[GenerateTask]) -> list[Sizes]:
        prompt = max(_prompt_tokens(task) for task in tasks)
        total = prompt + max(task.max_tokens for task in tasks)
        # A step of one token is what runs most often.
        read, past = (1, 1, prompt), (0, prompt // 2, total)
        caches = {
            name for t in tasks if isinstance(t.decoder, OnnxDecoder) for name in cache_names(t.decoder.cache).values()
        }
        if role in caches:
            return [batch, (0, 0, 0), past, (0, 0, 0)]
        if role == "inputs_embeds":
            return [batch, read, (0, 0, 0)]
        if role == "position_ids":
            mrope = any(task.positions == "mrope" for task in tasks)
            return [*([(3, 3, 3)] if mrope else []), batch, read]
        return [batch, (1, past[1] + 1, prompt + total)] if role == "attention_mask" else []

    def _seen(self) -> list[Shape]:
        """The images that this encoder is given."""
        specs = [
            task.input
            for task in self._tasks()
            if task.input is not None and self.name in (getattr(task, "encoder", None), getattr(task, "graph", None))
        ]
        return [shape for spec in specs for shape in prepared_shapes(spec)]

    def _pixels(self, seen: list[Shape]) -> list[Sizes]:
        if not seen:
            return []
        usual = max(seen, key=lambda shape: shape.height * shape.width)
        heights, widths = [s.height for s in seen], [s.width for s in seen]
        return [(min(heights), usual.height, max(heights)), (min(widths), usual.width, max(widths))]

    def _feature_map(self, role: str) -> list[Sizes]:
        """Features that a head or a projection reads, as large as its encoder's output is."""
        for task in self._tasks():
            encoder, *heads = (getattr(task, role_of, None) for role_of in ("encoder", "head", "project"))
            if isinstance(task, TextDetectTask):
                heads.append(task.like.graph)
            output = role.removeprefix("before_").removeprefix("after_")
            if encoder is not None and self.name in heads:
                shapes = _output_shapes(self.manifest, encoder, self.graph.parent, output)
                if shapes:
                    return shapes
        return []


def prepared_shapes(spec: InputSpec) -> list[Shape]:
    """What a model can see: a tile, images looked at whole, and what a golden probe shows it."""
    cuts = {(spec.tile_px, spec.tile_px)} if spec.prepare else {(spec.tile_px,) * 2, (SMALLEST_PX,) * 2}
    if spec.prepare and spec.whole_px:
        for longest in {SMALLEST_PX, spec.tile_px, spec.whole_px}:
            cuts |= {(longest * h // max(h, w), longest * w // max(h, w)) for h, w in ASPECTS}
    found = []
    for cut in sorted(cuts):
        with suppress(UsageError):  # an aspect that the model refuses
            found.append(prepared_shape(cut, spec.prepare))
    return found


def _prompt_tokens(task: GenerateTask) -> int:
    """The longest prompt that an engine takes: the image's tokens and room for words, as the memory plan has it."""
    visual = task.visual
    counts = [
        shape.views * (visual.per_tile or shape.height * shape.width // (visual.unit_px or 1) ** 2)
        for shape in prepared_shapes(task.input)
    ]
    return max(counts, default=0) + PROMPT_TOKENS


def _cache_bytes(task: GenerateTask) -> int:
    """Of one image's answer, as the decoder reads it."""
    assert isinstance(task.decoder, OnnxDecoder)
    cache = task.decoder.cache
    return (
        2
        * F32_BYTES
        * cache.layers
        * cache.heads
        * cache.head_dim
        * (_prompt_tokens(task) + task.max_tokens)
        * task.beams
    )


def _output_shapes(manifest: Manifest, encoder: str, folder: Path, role: str) -> list[Sizes]:
    """Axes of an encoder's output: its sizes are written in those of its input, as torch exports them."""
    graph = folder / manifest.graphs[encoder].file
    if role not in manifest.graphs[encoder].outputs or not graph.is_file():
        return []
    name = manifest.graphs[encoder].outputs[role]
    value = next((v for v in onnx.load(graph, load_external_data=False).graph.output if v.name == name), None)
    spans = shape_ranges(manifest, encoder, graph)
    if value is None:
        return []
    axes = [
        [size_of(dim, _symbols(graph, spans, which)) for which in ("least", "usual", "most")] for dim in dims_of(value)
    ]
    return [(least, usual, most) for least, usual, most in axes]


def _symbols(graph: Path, spans: Mapping[str, ShapeRange], which: str) -> dict[str, int]:
    found: dict[str, int] = {}
    for name, dims in inputs(graph).items():
        sizes = zip(dims, getattr(spans[name], which), strict=True)
        found |= {dim: size for dim, size in sizes if isinstance(dim, str)}
    return found
