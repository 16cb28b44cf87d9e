"""What an export will do and how large its result will be, before anything is done."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from edge_rsvlm import profiles
from edge_rsvlm.config.units import format_bytes
from edge_rsvlm.export.checkpoint.skeleton import skeleton
from edge_rsvlm.export.families.base import Family, Source
from edge_rsvlm.export.recipe import Recipe

BYTES_PER_PARAMETER = {"f32": 4.0, "f16": 2.0, "int8": 1.0, "int4": 0.5625}
"""A block of 32 numbers of 4 bits has a scale of 2 bytes."""
HELD_BYTES = {
    "int8": 1.0, "int4": 0.5625, "F16": 2.0, "Q8_0": 1.0625, "Q6_K": 0.82, "Q5_K_M": 0.71, "Q4_K_M": 0.61,
    "Q4_0": 0.5625, "IQ4_XS": 0.54,
}  # fmt: skip
"""A parameter in memory, of what is not widened; llama.cpp maps its file, and reads all of it for every word."""
ARITHMETIC_BYTES = 4
"""The engine on a processor widens f16 weights when it loads them."""
WIDENED = {"f16": 2}
"""Bytes in memory for a byte on disk, of what the engine widens."""
OVERHEAD = 1.25
"""Activations, and what the allocator keeps, on top of weights and cache."""


@dataclass(frozen=True)
class Part:
    """One graph and how many parameters it stores."""

    name: str
    parameters: int


def parts(family: Family, source: Source) -> list[Part]:
    """Every graph of the bundle; weights that two graphs share are stored in both."""
    model = skeleton(family.model_class(source.config), source.config)
    return [Part(plan.name, _count(plan.wrap(model).parameters())) for plan in family.graphs(source)]


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum({id(p): p.numel() for p in parameters}.values())


def cache_bytes(tasks: dict[str, dict[str, Any]]) -> int:
    """The largest key-value cache of a task: its image's tokens are not known here, so its answers alone."""

    def one(task: dict[str, Any]) -> int:
        cache = task.get("decoder", {}).get("cache")
        if cache is None:
            return 0
        per_token = 2 * cache["layers"] * cache["heads"] * cache["head_dim"] * ARITHMETIC_BYTES
        return int(per_token * (task["max_tokens"] + (task["visual"].get("per_tile") or 1024)) * task["beams"])

    return max(map(one, tasks.values()), default=0)


def memory_needed(found: list[Part], tasks: dict[str, dict[str, Any]], bits: str = "f32") -> int:
    """An estimate of the anonymous bytes of one process that runs every graph with weights of so many bits."""
    each = HELD_BYTES.get(bits, ARITHMETIC_BYTES)
    return int((sum(part.parameters for part in found) * each + cache_bytes(tasks)) * OVERHEAD)


def memory_on_disk(graphs: Iterable[tuple[str, int]], tasks: dict[str, dict[str, Any]]) -> int:
    """The same from (precision, bytes on disk) of every graph."""
    weights = sum(size * WIDENED.get(precision, 1) for precision, size in graphs)
    return int((weights + cache_bytes(tasks)) * OVERHEAD)


def explain(recipe: Recipe, family: Family, source: Source) -> str:
    """The plan in words: steps, bytes of every part at each precision, and whether it fits the profile."""
    found, tasks = parts(family, source), family.describe(source).tasks
    smaller = ["calibrate", "quantize", "accuracy"] if recipe.lowered else []
    steps = [
        "checkpoint", *(["merge_lora"] if recipe.merged else []), "compile_onnx", "parity", *smaller, "make_bundle"
    ]  # fmt: skip
    lines = [
        f"{recipe.checkpoint}: {source.config.model_type} ({family.name}), answers {', '.join(sorted(tasks))}",
        f"steps: {', '.join(steps)}",
        "",
        f"{'part':<20}{'parameters':>14}" + "".join(f"{name:>12}" for name in BYTES_PER_PARAMETER),
    ]
    for part in [*found, Part("in all", sum(part.parameters for part in found))]:
        sizes = "".join(f"{format_bytes(int(part.parameters * size)):>12}" for size in BYTES_PER_PARAMETER.values())
        lines.append(f"{part.name:<20}{part.parameters:>14,}{sizes}")
    return "\n".join([*lines, "", _verdict(recipe, memory_needed(found, tasks, recipe.bits))[1]])


def explain_foreign(recipe: Recipe) -> str:
    """The plan for a folder of ONNX files, which are taken as they are."""
    size = sum(path.stat().st_size for path in recipe.checkpoint.rglob("*.onnx*") if path.is_file())
    return f"{recipe.checkpoint}: ONNX files of {format_bytes(size)}\nsteps: checkpoint, take_onnx, make_bundle"


def misfit(recipe: Recipe, family: Family, source: Source) -> str | None:
    """What to tell who exports a model that will not fit the device; None where it will."""
    fits, sentence = _verdict(recipe, memory_needed(parts(family, source), family.describe(source).tasks, recipe.bits))
    return None if fits else sentence


def _verdict(recipe: Recipe, needed: int) -> tuple[bool, str]:
    limit = int(str(profiles.load(recipe.profile)["memory_bytes"]))
    sizes = f"{recipe.target} on {recipe.profile}: about {format_bytes(needed)} of {format_bytes(limit)}"
    return needed <= limit, f"{sizes}: {'fits' if needed <= limit else 'DOES NOT FIT'}"
