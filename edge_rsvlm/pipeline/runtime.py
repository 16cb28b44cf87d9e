"""A bundle made ready: its sessions, opened when first needed and shared by every task and input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol, TypeVar

from edge_rsvlm.budget import MemoryPlan
from edge_rsvlm.bundle import Bundle
from edge_rsvlm.config.manifest import CaptionTask, ChangeTask, DetectTask, Manifest
from edge_rsvlm.errors import UsageError
from edge_rsvlm.pipeline.outcome import Deadline, Progress
from edge_rsvlm.tasks.caption import Captioner, CaptionSessions
from edge_rsvlm.tasks.change import ChangeDetector
from edge_rsvlm.tasks.detect import Detector
from edge_rsvlm.types import InferenceSession

T = TypeVar("T")


class Engine(Protocol):
    """What the runtime needs of an engine."""

    def open(self, graph: Path) -> InferenceSession: ...


@dataclass(frozen=True)
class Pace:
    """How a scene is processed; none of it changes a complete result."""

    plan: MemoryPlan
    threads: int = 1
    deadline: Deadline = field(default_factory=lambda: Deadline(None))
    progress: Progress | None = None


class Runtime:
    """Sessions of one bundle on one engine."""

    def __init__(self, bundle: Bundle, engine: Engine) -> None:
        self.bundle, self._engine = bundle, engine

    @property
    def manifest(self) -> Manifest:
        return self.bundle.manifest

    def open(self, name: str) -> InferenceSession:
        return self._engine.open(self.bundle.path(name))

    @cached_property
    def encoder(self) -> InferenceSession:
        return self.open(self.manifest.encoder)

    @cached_property
    def _detect_head(self) -> InferenceSession:
        return self.open(detect_task(self.manifest).head)

    def detector(self, score_threshold: float | None = None) -> Detector:
        return Detector(detect_task(self.manifest), self._detect_head, score_threshold=score_threshold)

    @cached_property
    def change_detector(self) -> ChangeDetector:
        task = change_task(self.manifest)
        return ChangeDetector(task, self.open(task.head))

    @cached_property
    def captioner(self) -> Captioner:
        task = caption_task(self.manifest)
        sessions = CaptionSessions(self.open(task.prefix), self.open(task.embed), self.open(task.decoder))
        return Captioner(task, sessions, self.bundle.path(task.tokenizer))


def _offered(task: T | None, name: str, manifest: Manifest) -> T:
    if task is None:
        raise UsageError(f"bundle '{manifest.name}' has no {name} head", fix="name another with --bundle")
    return task


def detect_task(manifest: Manifest) -> DetectTask:
    return _offered(manifest.tasks.detect, "detect", manifest)


def change_task(manifest: Manifest) -> ChangeTask:
    return _offered(manifest.tasks.change, "change", manifest)


def caption_task(manifest: Manifest) -> CaptionTask:
    return _offered(manifest.tasks.caption, "caption", manifest)


EngineFactory = Callable[[int, int], Engine]
"""(threads, arena bytes) -> engine."""


def cpu_engine(threads: int, arena_bytes: int) -> Engine:
    """onnxruntime, imported here so that nothing before the admitted plan pays for it."""
    from edge_rsvlm.engines.onnxruntime import OnnxRuntimeEngine

    return OnnxRuntimeEngine(threads=threads, arena_bytes=arena_bytes)
