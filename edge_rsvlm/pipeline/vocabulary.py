"""Texts are checked against the words that the task behind a verb learnt, before any work."""

from __future__ import annotations

from collections.abc import Sequence

from edge_rsvlm.bundle import Bundle
from edge_rsvlm.config.inputs import TextEncoder
from edge_rsvlm.config.offered import AnyTask, task_of
from edge_rsvlm.config.task_specs import GenerateTask, ReferTask, TextDetectTask
from edge_rsvlm.tasks.vocabulary import check_words, read_vocabulary, unknown_words


def check_texts(bundle: Bundle, verb: str, texts: Sequence[str]) -> None:
    """UsageError for texts with a word that the bundle's task did not learn; see ``check_words``."""
    name = vocabulary_of(task_of(bundle.manifest, verb))
    examples = isinstance(bundle.manifest.tasks.detect, TextDetectTask)
    check_words(texts, None if name is None else bundle.path(name), examples=examples)


def understood(bundle: Bundle, verb: str, texts: Sequence[str]) -> tuple[str, ...]:
    """Those of ``texts`` whose words the bundle's task learnt."""
    name = vocabulary_of(task_of(bundle.manifest, verb))
    if name is None:
        return tuple(texts)
    known = read_vocabulary(bundle.path(name))
    return tuple(text for text in texts if not unknown_words([text], known))


def vocabulary_of(task: AnyTask) -> str | None:
    """The file of the words that a task takes; None where it takes any."""
    if isinstance(task, (GenerateTask, ReferTask)):
        return task.vocabulary
    text = getattr(task, "text", None)
    return text.vocabulary if isinstance(text, TextEncoder) else None
