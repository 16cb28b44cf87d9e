"""A bundle made ready: its sessions and tasks, made when first needed and shared by every input."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from edge_rsvlm.budget import MemoryPlan
from edge_rsvlm.bundle import Bundle
from edge_rsvlm.config.inputs import TextEncoder
from edge_rsvlm.config.manifest import Graph, Manifest
from edge_rsvlm.config.offered import AnyTask, object_task, present
from edge_rsvlm.config.task_specs import (
    AnswerTask,
    ChangeTask,
    DetectTask,
    GenerateTask,
    GgufDecoder,
    GgufTask,
    MatchTask,
    OnnxDecoder,
    OpenDetectTask,
    ReferTask,
    SegmentTask,
    Tasks,
    TextDetectTask,
)
from edge_rsvlm.errors import BundleError
from edge_rsvlm.pipeline.adapters import Factors, read_adapter
from edge_rsvlm.pipeline.outcome import Deadline, Progress
from edge_rsvlm.pipeline.sharing import Shared, shared_outputs
from edge_rsvlm.tasks.answer import Answerer
from edge_rsvlm.tasks.change import ChangeDetector
from edge_rsvlm.tasks.decoder import OnnxLanguage, cache_names
from edge_rsvlm.tasks.detect import Detector
from edge_rsvlm.tasks.generate import Generator, Vision
from edge_rsvlm.tasks.gguf import GgufGenerator, VisionLanguageModel
from edge_rsvlm.tasks.like import LikeDetector
from edge_rsvlm.tasks.match import Matcher, embed_texts, unit
from edge_rsvlm.tasks.open_detect import OpenDetector
from edge_rsvlm.tasks.refer import Referrer
from edge_rsvlm.tasks.segment import Segmenter
from edge_rsvlm.tasks.text import Texts
from edge_rsvlm.tasks.text_detect import TextDetector
from edge_rsvlm.types import InferenceSession, LanguageModel

T = TypeVar("T")


class Engine(Protocol):
    """What the runtime needs of an engine."""

    def open(self, graph: Path) -> InferenceSession: ...
    def open_language(self, model: Path, context_tokens: int, beams: int = 1) -> LanguageModel: ...
    def open_vision_language(self, model: Path, projector: Path, context_tokens: int) -> VisionLanguageModel: ...


@dataclass(frozen=True)
class Pace:
    """How a scene is processed; none of it changes a complete result."""

    plan: MemoryPlan
    threads: int = 1
    deadline: Deadline = field(default_factory=lambda: Deadline(None))
    progress: Progress | None = None


class RoleSession:
    """A session spoken to in roles, which the manifest maps to the graph's own names.

    Inputs that the graph does not list are not fed. ``caches`` keep their names. ``factors``, which may change from
    run to run, are fed as they are.
    """

    def __init__(
        self,
        session: InferenceSession,
        graph: Graph,
        caches: frozenset[str],
        factors: Factors | None = None,
        shared: Shared | None = None,
    ) -> None:
        self._session, self._outputs = session, graph.outputs
        self._factors: Factors = {} if factors is None else factors
        self._shared = Shared() if shared is None else shared
        self._inputs = graph.inputs | {name: name for name in caches}

    def run(self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> list[NDArray[Any]]:
        return self._shared.run(self._run, inputs, outputs)

    def _run(self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> list[NDArray[Any]]:
        fed = {self._inputs[role]: value for role, value in inputs.items() if role in self._inputs}
        return self._session.run(fed | self._factors, [self._outputs.get(role, role) for role in outputs])


class Runtime:
    """Sessions and tasks of one bundle on one engine."""

    def __init__(self, bundle: Bundle, engine: Engine) -> None:
        self.bundle, self._engine = bundle, engine
        self._made: dict[Hashable, Any] = {}
        self._factors: dict[str, Factors] = {graph: {} for graph in bundle.manifest.graphs}
        self._shared = {graph: Shared() for graph in bundle.manifest.graphs}

    @property
    def manifest(self) -> Manifest:
        return self.bundle.manifest

    def switch(self, adapter: str | None) -> None:
        """Answer by this adapter of the bundle from now on (None: as the base model), also where sessions are open.

        UsageError for one that the bundle does not have.
        """
        found = {} if adapter is None else read_adapter(self.bundle, adapter)
        for graph, factors in self._factors.items():
            factors.clear()
            factors.update(found.get(graph, {}))

    def open(self, graph: str) -> InferenceSession:
        """The session of a graph that the manifest names."""
        if graph not in self.manifest.graphs:
            raise BundleError(f"bundle '{self.manifest.name}' has no graph '{graph}'", fix="make the bundle again")
        return self._once(("graph", graph), lambda: self._open(graph))

    def _open(self, name: str) -> InferenceSession:
        graph = self.manifest.graphs[name]
        session, caches = self._engine.open(self.bundle.path(graph.file)), _caches(self.manifest.tasks, name)
        return RoleSession(session, graph, caches, self._factors[name], self._shared[name])

    @contextmanager
    def sharing(self, tasks: Sequence[AnyTask]) -> Iterator[None]:
        """Within, an encoder that several of ``tasks`` use runs once on tiles that they look at in turn.

        A task that refers to objects sees as the detect task does, which finds them.
        """
        kept = shared_outputs(self.manifest.tasks.detect if isinstance(task, ReferTask) else task for task in tasks)
        for encoder, outputs in kept.items():
            self._shared[encoder].keep(outputs)
        try:
            yield
        finally:
            for encoder in kept:
                self._shared[encoder].keep(())

    def _once(self, key: Hashable, make: Callable[[], T]) -> T:
        if key not in self._made:
            self._made[key] = make()
        made: T = self._made[key]
        return made

    def detector(self, task: DetectTask, score_threshold: float | None = None) -> Detector:
        return Detector(task, self.open(task.head), score_threshold=score_threshold)

    def open_detector(
        self, task: OpenDetectTask, labels: Sequence[str], score_threshold: float | None = None
    ) -> OpenDetector:
        """Kept from input to input, since it holds the embedded ``labels``."""

        def make() -> OpenDetector:
            text = self.open(task.text.graph)
            return OpenDetector(
                task, self.open(task.encoder), text, self._texts(task.text), labels, score_threshold=score_threshold
            )

        return self._once(("open", task.encoder, *labels, score_threshold), make)

    def text_detector(self, task: TextDetectTask) -> TextDetector:
        return TextDetector(task, self.open(task.head))

    def like_detector(self, task: TextDetectTask) -> LikeDetector:
        """Opens what only examples need."""
        classes_QD = self.text_queries(task, task.classes)
        return LikeDetector(task, self.open(task.like.graph), self.text_detector(task), classes_QD)

    def text_queries(self, task: TextDetectTask, labels: Sequence[str]) -> NDArray[np.float32]:
        """Unit vectors [Q, D] of the words looked for, embedded once."""

        def make() -> NDArray[np.float32]:
            prompts = [task.query_prompt.replace("{label}", label) for label in labels]
            text = self.open(task.text.graph)
            return unit(embed_texts(text, self._texts(task.text), prompts, task.text.output))

        return self._once(("queries", task.head, *labels), make)

    def referrer(self, task: ReferTask) -> Referrer:
        def make() -> Referrer:
            texts = Texts(task.tokenizer, self.bundle.path(task.tokenizer.file))
            return Referrer(self.open(task.graph), texts, len(object_task(self.manifest).classes))

        return self._once(("refer", task.graph), make)

    def change_detector(self, task: ChangeTask) -> ChangeDetector:
        return ChangeDetector(task, self.open(task.encoder), self.open(task.head))

    @overload
    def generator(self, verb: str, task: GenerateTask) -> Generator: ...
    @overload
    def generator(self, verb: str, task: GenerateTask | GgufTask) -> Generator | GgufGenerator: ...

    def generator(self, verb: str, task: GenerateTask | GgufTask) -> Generator | GgufGenerator:
        """What writes the answers of a task."""

        def make() -> Generator | GgufGenerator:
            if isinstance(task, GgufTask):
                return GgufGenerator(task, self.vision_language(task))
            project = None if task.project is None else self.open(task.project)
            vision = Vision(self.open(task.encoder), project)
            return Generator(task, vision, self.language(task), self.bundle.path(task.tokenizer.file))

        return self._once(("generate", verb), make)

    def language(self, task: GenerateTask) -> LanguageModel:
        """What writes a task's answers; a GGUF model is loaded once, with caches for the task that needs the most."""
        spec = task.decoder
        if isinstance(spec, GgufDecoder):
            file = self.bundle.path(spec.model.file)
            context_tokens, beams = _most(self.manifest.tasks, spec.model.file)
            return self._once(
                ("language", spec.model.file), lambda: self._engine.open_language(file, context_tokens, beams)
            )
        roles = frozenset(self.manifest.graphs[spec.graph].inputs)
        return OnnxLanguage(spec, self.open(spec.embed), self.open(spec.graph), roles)

    def vision_language(self, task: GgufTask) -> VisionLanguageModel:
        """What answers a task all alone; shared by tasks of the same files."""
        key = ("vision-language", task.model.file, task.projector.file, task.context_tokens)
        files = self.bundle.path(task.model.file), self.bundle.path(task.projector.file)
        return self._once(key, lambda: self._engine.open_vision_language(*files, task.context_tokens))

    def answerer(self, task: AnswerTask) -> Answerer:
        def make() -> Answerer:
            answers = _lines(self.bundle.path(task.answers))
            texts = Texts(task.tokenizer, self.bundle.path(task.tokenizer.file))
            return Answerer(task, self.open(task.graph), texts, answers)

        return self._once(("answer", task.graph), make)

    def matcher(self, verb: str, task: MatchTask) -> Matcher:
        def make() -> Matcher:
            head = None if task.head is None else self.open(task.head)
            text = self.open(task.text.graph)
            return Matcher(task, self.open(task.encoder), text, self._texts(task.text), head)

        return self._once(("match", verb), make)

    def segmenter(self, task: SegmentTask, labels: Sequence[str]) -> Segmenter:
        """Kept from input to input, since it holds the embedded ``labels``."""

        def make() -> Segmenter:
            text = self.open(task.text.graph)
            return Segmenter(task, self.open(task.head), text, self._texts(task.text), labels)

        return self._once(("segment", *labels), make)

    def _texts(self, encoder: TextEncoder) -> Texts:
        return Texts(encoder.tokenizer, self.bundle.path(encoder.tokenizer.file))


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as exc:
        raise BundleError(f"{path.name} is not UTF-8 ({exc})", fix="make the bundle again") from exc


def _caches(tasks: Tasks, graph: str) -> frozenset[str]:
    """Names of the cache inputs of a graph that decodes."""
    decoders = [task.decoder for _, task in present(tasks) if isinstance(task, GenerateTask)]
    caches = [d.cache for d in decoders if isinstance(d, OnnxDecoder) and d.graph == graph]
    return frozenset(name for cache in caches for name in cache_names(cache).values())


def _most(tasks: Tasks, model: str) -> tuple[int, int]:
    """The longest context and the most beams of the tasks whose answers this GGUF model writes."""
    found = [
        (task.decoder.context_tokens, task.beams)
        for _, task in present(tasks)
        if isinstance(task, GenerateTask) and isinstance(task.decoder, GgufDecoder) and task.decoder.model.file == model
    ]
    contexts, beams = zip(*found, strict=True)
    return max(contexts), max(beams)


EngineFactory = Callable[[int, int], Engine]
"""(threads, arena bytes) -> engine."""


def cpu_engine(threads: int, arena_bytes: int) -> Engine:
    """Libraries are imported when they are used, so that nothing before the admitted plan pays for them."""
    from edge_rsvlm.pipeline.engines import CpuEngine

    return CpuEngine(threads, arena_bytes)
