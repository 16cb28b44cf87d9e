"""A session made of a Python function: lets every layer above the engine be tested without one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from numpy.typing import NDArray


class FakeSession:
    """``function(inputs)`` returns a mapping of output name to array; calls are counted in ``calls``."""

    def __init__(self, function: Callable[[Mapping[str, NDArray[Any]]], Mapping[str, NDArray[Any]]]) -> None:
        self._function = function
        self.calls = 0

    def run(self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> list[NDArray[Any]]:
        self.calls += 1
        found = self._function(inputs)
        return [found[name] for name in outputs]
