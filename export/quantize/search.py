"""The mix of precisions that meets a goal: which graph in how many bits, and which of its layers stay as they are.

Losses of layers add up, and so do bytes. Of every graph the choices are its precisions, each with the most sensitive
layers kept; of all graphs together, the mixes that no other beats in both.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from edge_rsvlm.config.units import parse_bytes, parse_seconds
from edge_rsvlm.errors import UsageError
from edge_rsvlm.export.quantize.sensitivity import LayerLoss
from edge_rsvlm.export.quantize.settings import Precision

BYTES: Mapping[str, float] = {"f16": 2.0, "int8": 1.0, "int8-dynamic": 1.0, "int4": 0.5625}
KEPT_BYTES: Mapping[str, float] = {"int8": 4.0, "int8-dynamic": 4.0, "int4": 2.0}
"""Of a weight that stays as it is: graphs in 8 bits hold those in float32."""
LOSS_OF = {"int8": "int8", "int8-dynamic": "int8", "int4": "int4"}
KEPT = (0, 1, 2, 3, 5, 8, 12)
"""How many of a graph's layers may stay as they are."""
WIDTH = 400
"""Mixes that are followed at once."""


@dataclass(frozen=True)
class Goal:
    """``kind`` is size (bytes), latency (seconds of all graphs, one after another) or accuracy-loss (points)."""

    kind: str
    limit: float


def parse_goal(text: str) -> Goal:
    """``size=12MiB``, ``latency=50ms`` or ``accuracy-loss=0.5``; UsageError for anything else."""
    kind, _, value = text.partition("=")
    if kind == "size":
        return Goal(kind, float(parse_bytes(value)))
    if kind == "latency":
        return Goal(kind, parse_seconds(value))
    if kind == "accuracy-loss" and re.fullmatch(r"[0-9]*\.?[0-9]+", value):
        return Goal(kind, float(value))
    raise UsageError(f"no goal is '{text}'", fix="say size=12MiB, latency=50ms or accuracy-loss=0.5 (points)")


@dataclass(frozen=True)
class Choice:
    """One graph at one precision; ``keep`` names the layers that stay as they are."""

    graph: str
    precision: Precision
    keep: tuple[str, ...]
    bytes: float
    loss: float
    seconds: float = 0.0


@dataclass(frozen=True)
class Mix:
    choices: tuple[Choice, ...] = ()

    @property
    def bytes(self) -> float:
        return sum(choice.bytes for choice in self.choices)

    @property
    def loss(self) -> float:
        return sum(choice.loss for choice in self.choices)

    @property
    def seconds(self) -> float:
        return sum(choice.seconds for choice in self.choices)

    def __str__(self) -> str:
        return ", ".join(
            f"{c.graph} {c.precision}" + (f" ({len(c.keep)} layer{'s' * (len(c.keep) > 1)} kept)" if c.keep else "")
            for c in self.choices
        )


def choices_of(
    graph: str, precisions: Sequence[Precision], layers: Sequence[LayerLoss], seconds: Mapping[str, float]
) -> list[Choice]:
    """Half precision, and each of ``precisions`` with none, one, two ... layers kept; ``seconds`` by precision."""
    whole = sum(layer.weights for layer in layers)
    found = [Choice(graph, "f16", (), whole * BYTES["f16"], 0.0, seconds.get("f16", 0.0))]
    for precision in precisions:
        lossy = [layer for layer in layers if LOSS_OF[precision] in layer.loss]
        ranked = sorted(lossy, key=lambda layer: -layer.loss[LOSS_OF[precision]] / layer.weights)
        for count in sorted({min(k, len(ranked)) for k in KEPT}):
            found.append(_choice(graph, precision, ranked, count, whole, seconds))
    return found


def _choice(
    graph: str, precision: Precision, ranked: Sequence[LayerLoss], count: int, whole: int, seconds: Mapping[str, float]
) -> Choice:
    narrow = ranked[count:]
    weights = sum(layer.weights for layer in narrow)
    share = weights / max(whole, 1)
    # Layers that stay as they are take as long as before: time is taken to follow the weights.
    time = share * seconds.get(precision, 0.0) + (1 - share) * seconds.get("f16", 0.0)
    loss = sum(layer.loss[LOSS_OF[precision]] for layer in narrow)
    size = weights * BYTES[precision] + (whole - weights) * KEPT_BYTES[precision]
    return Choice(graph, precision, tuple(layer.layer for layer in ranked[:count]), size, loss, time)


def front(graphs: Sequence[Sequence[Choice]], by: str = "bytes") -> list[Mix]:
    """Mixes of one choice per graph, by rising cost (``bytes`` or ``seconds``) and falling loss."""
    mixes = [Mix()]
    for choices in graphs:
        joined = (Mix((*mix.choices, choice)) for mix, choice in itertools.product(mixes, choices))
        mixes = _unbeaten(sorted(joined, key=lambda mix: (getattr(mix, by), mix.loss)))
        mixes = mixes[:: max(1, len(mixes) // WIDTH)]
    return mixes


def _unbeaten(mixes: Sequence[Mix]) -> list[Mix]:
    """Of mixes by rising cost, those with less loss than all before."""
    found: list[Mix] = []
    for mix in mixes:
        if not found or mix.loss < found[-1].loss:
            found.append(mix)
    return found


def within(mixes: Sequence[Mix], goal: Goal) -> Mix:
    """The least lossy mix inside a goal of latency; UsageError says what the fastest takes."""
    fitting = [mix for mix in mixes if mix.seconds <= goal.limit]
    if not fitting:
        raise _out_of_reach(goal, f"{min(mix.seconds for mix in mixes) * 1e3:.0f}ms")
    return min(fitting, key=lambda mix: mix.loss)


def made_within(mixes: Sequence[Mix], goal: Goal, made: Callable[[Mix], int]) -> Mix:
    """The least lossy mix of a front whose bundle, ``made`` and counted, is inside a goal of size; UsageError says what
    the smallest takes.

    By halving: weights alone leave out scales, probes and graphs for another engine, but bundles grow with them.
    """
    low, high = 0, len(mixes) - 1
    if made(mixes[high]) <= goal.limit:
        return mixes[high]
    if (smallest := made(mixes[low])) > goal.limit:
        raise _out_of_reach(goal, f"{smallest / 2**20:.1f}MiB")
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if made(mixes[middle]) <= goal.limit else (low, middle - 1)
    return mixes[low]


def _out_of_reach(goal: Goal, least: str) -> UsageError:
    return UsageError(f"no mix reaches the goal; the {goal.kind} of the smallest is {least}", fix="ask for more")
