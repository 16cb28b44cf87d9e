"""The tasks that a manifest offers, by the name of their verb."""

from __future__ import annotations

from typing import NoReturn

from edge_rsvlm.config.manifest import Manifest
from edge_rsvlm.config.task_specs import (
    AnswerTask,
    AnyDetectTask,
    ChangeTask,
    DetectTask,
    GenerateTask,
    GgufDecoder,
    GgufTask,
    MatchTask,
    OpenDetectTask,
    ReferTask,
    SegmentTask,
    Tasks,
    TextDetectTask,
)
from edge_rsvlm.errors import UsageError

AnyTask = (
    DetectTask | OpenDetectTask | TextDetectTask | ChangeTask | GenerateTask | GgufTask | AnswerTask | MatchTask
    | ReferTask | SegmentTask
)  # fmt: skip


def present(tasks: Tasks) -> list[tuple[str, AnyTask]]:
    """Verbs and what is behind them."""
    found = [(verb, getattr(tasks, verb)) for verb in Tasks.model_fields]
    return [(verb, task) for verb, task in found if task is not None]


def offered_verbs(manifest: Manifest) -> tuple[str, ...]:
    return tuple(verb for verb, _ in present(manifest.tasks))


def _refuse(manifest: Manifest, verb: str) -> NoReturn:
    can = ", ".join(offered_verbs(manifest)) or "nothing"
    raise UsageError(f"bundle '{manifest.name}' has no {verb} task, it can do: {can}", fix="name another with --bundle")


def task_of(manifest: Manifest, verb: str) -> AnyTask:
    """The task behind a verb (``search`` for both index and search); UsageError when the bundle does not have it, as
    below."""
    task: AnyTask | None = getattr(manifest.tasks, verb)
    return task or _refuse(manifest, verb)


def ask_task(manifest: Manifest) -> GenerateTask | GgufTask | AnswerTask:
    return manifest.tasks.ask or _refuse(manifest, "ask")


def caption_task(manifest: Manifest) -> GenerateTask | GgufTask:
    return manifest.tasks.caption or _refuse(manifest, "caption")


def change_task(manifest: Manifest) -> ChangeTask:
    return manifest.tasks.change or _refuse(manifest, "change")


def classify_task(manifest: Manifest) -> MatchTask:
    return manifest.tasks.classify or _refuse(manifest, "classify")


def detect_task(manifest: Manifest) -> AnyDetectTask:
    return manifest.tasks.detect or _refuse(manifest, "detect")


def ground_task(manifest: Manifest) -> GenerateTask | GgufTask | OpenDetectTask | ReferTask:
    return manifest.tasks.ground or _refuse(manifest, "ground")


def search_task(manifest: Manifest) -> MatchTask:
    return manifest.tasks.search or _refuse(manifest, "search")


def segment_task(manifest: Manifest) -> SegmentTask:
    return manifest.tasks.segment or _refuse(manifest, "segment")


def object_task(manifest: Manifest) -> TextDetectTask:
    """What finds the objects of a ReferTask; only for a manifest that has one."""
    task = manifest.tasks.detect
    assert isinstance(task, TextDetectTask), "the manifest was checked"
    return task


def by_llama(task: AnyTask | None) -> bool:
    """Whether llama.cpp writes a task's words."""
    return isinstance(task, GgufTask) or (isinstance(task, GenerateTask) and isinstance(task.decoder, GgufDecoder))
