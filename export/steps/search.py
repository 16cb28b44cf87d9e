"""Step ``search``: losses of every layer, and the mix of precisions that the goal asks for.

Leaves ``layers.txt`` (sensitivity), ``front.txt`` and ``front.png`` (mixes that no other beats), ``choice.json``.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from edge_rsvlm.bundle import Bundle
from edge_rsvlm.config.units import format_bytes
from edge_rsvlm.engines.onnxruntime import OnnxRuntimeEngine
from edge_rsvlm.errors import UsageError
from edge_rsvlm.export.quantize.calibration import Samples
from edge_rsvlm.export.quantize.choose import int8_kind
from edge_rsvlm.export.quantize.search import Choice, Goal, Mix, choices_of, front, made_within, parse_goal, within
from edge_rsvlm.export.quantize.sensitivity import LARGEST_BYTES, LayerLoss, layer_losses, table
from edge_rsvlm.export.quantize.settings import Precision
from edge_rsvlm.export.recipe import Recipe
from edge_rsvlm.export.steps.quantize import Quantizer

CHOICE, LAYERS, FRONT, PLOT = "choice.json", "layers.txt", "front.txt", "front.png"
RUNS, TRIES = 5, 6
Report = Callable[[str, int, int], None]
Lost = Callable[[Recipe], float]
"""The greatest loss of a task, in points, of the bundle that a recipe makes."""
Made = Callable[[Recipe], int]
"""Bytes of the bundle that a recipe makes."""


@dataclass(frozen=True)
class Search:
    recipe: Recipe
    before: Bundle
    samples: Samples
    report: Report

    def run(self, folder: Path, lost: Lost, made: Made) -> dict[str, Any]:
        """Fill ``folder``; the metrics say what was chosen."""
        goal = parse_goal(self.recipe.goal or "")
        layers = {name: self._layers(name) for name in self.before.manifest.graphs}
        graphs = [self._choices(name, found, goal) for name, found in layers.items()]
        mixes = front(graphs, "seconds" if goal.kind == "latency" else "bytes")
        if goal.kind == "accuracy-loss":
            mix = self._lossless_enough(mixes, goal, lost)
        elif goal.kind == "size":
            mix = made_within(mixes, goal, lambda mix: made(applied(self.recipe, _choice(mix))))
        else:
            mix = within(mixes, goal)
        self._write(folder, [row for found in layers.values() for row in found], mixes, mix)
        return {"goal": self.recipe.goal or "", "mix": str(mix), "bytes of layers": int(mix.bytes), "loss": mix.loss}

    def _layers(self, name: str) -> tuple[LayerLoss, ...]:
        path, samples = self._path(name), self.samples.of(name)
        data = path.with_name(f"{path.name}.data")
        if not samples or int8_kind(path) == "f16" or (data.exists() and data.stat().st_size > LARGEST_BYTES):
            return ()
        return layer_losses(
            name,
            path,
            samples,
            self.recipe.int4.block,
            lambda done, total: self.report(f"layers of {name}", done, total),
        )

    def _path(self, name: str) -> Path:
        return self.before.path(self.before.manifest.graphs[name].file)

    def _choices(self, name: str, layers: Sequence[LayerLoss], goal: Goal) -> list[Choice]:
        if not layers:
            return [Choice(name, "f16", (), 0.0, 0.0, 0.0)]
        precisions: list[Precision] = [int8_kind(self._path(name))]
        if all("int4" in layer.loss for layer in layers):
            precisions.append("int4")
        seconds = self._seconds(name, precisions) if goal.kind == "latency" else {}
        return choices_of(name, precisions, layers, seconds)

    def _seconds(self, name: str, precisions: Sequence[Precision]) -> dict[str, float]:
        """Of one run over a sample, on one thread, by precision."""
        found: dict[str, float] = {}
        with tempfile.TemporaryDirectory(prefix="search-") as folder:
            wanted: tuple[Precision, ...] = ("f16", *precisions)
            for precision in wanted:
                self.report(f"time of {name}", len(found), len(precisions) + 1)
                into = Path(folder) / precision
                into.mkdir()
                quantizer = Quantizer(self.recipe, self.before.folder, self.samples, into)
                quantizer.graph(name, self.before.manifest.graphs[name].file, precision, None)
                found[precision] = _time(into / self._path(name).name, self.samples.of(name)[0])
        return found

    def _lossless_enough(self, mixes: Sequence[Mix], goal: Goal, lost: Lost) -> Mix:
        """The smallest mix whose measured loss is inside the goal, by halving: losses rise as bytes fall."""
        if not self.recipe.evaluate:
            raise UsageError("a goal of accuracy needs labels", fix="add [[evaluate]] to the recipe")
        low, high, found = 0, len(mixes) - 1, None
        for _ in range(TRIES):
            if low > high:
                break
            middle = (low + high) // 2
            if lost(applied(self.recipe, _choice(mixes[middle]))) <= goal.limit:
                found, high = mixes[middle], middle - 1
            else:
                low = middle + 1
        if found is None:
            raise UsageError("no mix that was tried stays inside the goal", fix="allow more, or take target onnx:f16")
        return found

    def _write(self, folder: Path, rows: Sequence[LayerLoss], mixes: Sequence[Mix], mix: Mix) -> None:
        (folder / CHOICE).write_text(json.dumps(_choice(mix), indent=1) + "\n")
        (folder / LAYERS).write_text(table(rows) + "\n")
        lines = [
            f"{format_bytes(int(m.bytes)):>12}{m.loss:>12.2e}  {m}{'   <- chosen' if m == mix else ''}" for m in mixes
        ]
        (folder / FRONT).write_text("\n".join([f"{'layers':>12}{'loss':>12}  mix", *lines]) + "\n")
        plot(folder / PLOT, mixes, mix)


def _time(graph: Path, sample: dict[str, Any]) -> float:
    session = OnnxRuntimeEngine(threads=1).open(graph)
    outputs = [value.name for value in onnx.load(graph, load_external_data=False).graph.output]
    times = []
    for _ in range(RUNS):
        begun = time.perf_counter()
        session.run(sample, outputs)
        times.append(time.perf_counter() - begun)
    return float(np.median(times))


def applied(recipe: Recipe, choice: Mapping[str, Mapping[str, Any]]) -> Recipe:
    """The recipe that makes this mix, given as ``choice.json`` holds it."""

    def keep(*precisions: str) -> tuple[str, ...]:
        return tuple(name for found in choice.values() if found["precision"] in precisions for name in found["keep"])

    int8 = recipe.int8.model_copy(update={"keep": recipe.int8.keep + keep("int8", "int8-dynamic")})
    int4 = recipe.int4.model_copy(update={"keep": recipe.int4.keep + keep("int4")})
    precision = {name: found["precision"] for name, found in choice.items()} | recipe.precision
    return recipe.model_copy(update={"precision": precision, "int8": int8, "int4": int4, "goal": None})


def _choice(mix: Mix) -> dict[str, dict[str, Any]]:
    return {c.graph: {"precision": c.precision, "keep": list(c.keep)} for c in mix.choices}


def plot(path: Path, mixes: Sequence[Mix], mix: Mix) -> None:
    """Bytes against loss, the chosen mix marked; what loses nothing has no place on a scale of powers."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([m.bytes / 2**20 for m in mixes], [m.loss for m in mixes], ".-", color="0.5")
    axes.plot([mix.bytes / 2**20], [mix.loss], "o", color="tab:red", label=str(mix).replace(", ", "\n"))
    axes.set(xlabel="weights of layers, MiB", ylabel="sum of squared relative errors", yscale="log")
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)
