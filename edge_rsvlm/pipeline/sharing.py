"""One run of an encoder for every task that looks at the same tiles."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_rsvlm.config.task_specs import AnswerTask, GgufTask, MatchTask, OpenDetectTask
from edge_rsvlm.tasks.match import EMBEDDING
from edge_rsvlm.tasks.open_detect import OUTPUTS

Arrays = Mapping[str, NDArray[Any]]
Run = Callable[[Arrays, Sequence[str]], list[NDArray[Any]]]


class Shared:
    """What a graph gave last, kept for the tasks that ask it the same in turn. Nothing is kept of no ``outputs``."""

    def __init__(self) -> None:
        self._outputs: tuple[str, ...] = ()
        self._inputs: Arrays | None = None
        self._found: Arrays = {}

    def keep(self, outputs: tuple[str, ...]) -> None:
        """Run for all of ``outputs`` from now on, whichever of them is asked for."""
        self._outputs, self._inputs, self._found = outputs, None, {}

    def run(self, run: Run, inputs: Arrays, outputs: Sequence[str]) -> list[NDArray[Any]]:
        if not set(outputs) <= set(self._outputs):
            return run(inputs, outputs)
        if self._inputs is None or not _equal(self._inputs, inputs):
            self._found = dict(zip(self._outputs, run(inputs, self._outputs), strict=True))
            self._inputs = inputs
        return [self._found[name] for name in outputs]


def _equal(a: Arrays, b: Arrays) -> bool:
    """To compare tiles is little beside encoding them, and holds however a task put them together."""
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def shared_outputs(tasks: Iterable[Any]) -> dict[str, tuple[str, ...]]:
    """By encoder that several of ``tasks`` use, the outputs that they need of it."""
    asked = [found for task in tasks if (found := encoded(task)) is not None]
    uses = Counter(encoder for encoder, _ in asked)
    return {
        encoder: tuple(dict.fromkeys(name for other, names in asked if other == encoder for name in names))
        for encoder, count in uses.items()
        if count > 1
    }


def encoded(task: Any) -> tuple[str, tuple[str, ...]] | None:
    """The encoder of a task, and the outputs that it asks for; None of a task that sees by itself."""
    if isinstance(task, (AnswerTask, GgufTask)):
        return None
    if isinstance(task, OpenDetectTask):
        return task.encoder, OUTPUTS
    if isinstance(task, MatchTask) and task.head is None:
        return task.encoder, EMBEDDING
    return task.encoder, task.encoder_outputs
