"""Step ``compile_onnx``: every graph traced and filled, and the draft of the bundle around them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from edge_rsvlm.export.adapters.kept import KeptAdapter
from edge_rsvlm.export.bundle_writer import write_manifest
from edge_rsvlm.export.checkpoint.skeleton import skeleton
from edge_rsvlm.export.explain import memory_needed, parts
from edge_rsvlm.export.families.base import Description, Family, Source
from edge_rsvlm.export.graphs.external_data import write
from edge_rsvlm.export.graphs.switching import switchable, unused, write_adapters
from edge_rsvlm.export.graphs.tracing import trace
from edge_rsvlm.export.recipe import Recipe
from edge_rsvlm.export.steps.merge_lora import ModelWeights

BUNDLE, LAYERS, WEIGHTS = "bundle", "layers.json", "weights.json"
TILE_BYTES = 256 << 20
UNKNOWN_LICENCE = "unknown: ask who made the checkpoint"
GraphProgress = Callable[[str, int, int], None]


def compile_onnx(
    family: Family, source: Source, weights: ModelWeights, recipe: Recipe, adapters: Sequence[KeptAdapter],
    folder: Path, progress: GraphProgress,
) -> dict[str, Any]:  # fmt: skip
    """Fill ``folder`` with ``bundle/`` (not measured, not proven), and with what parity needs: where in the graphs
    layers end (``layers.json``), and which weights they hold, transposed or not (``weights.json``)."""
    target = folder / BUNDLE
    target.mkdir()
    layers: dict[str, dict[str, str]] = {}
    stored: dict[str, dict[str, bool]] = {}
    adapted: dict[str, frozenset[str]] = {}
    model_class = family.model_class(weights.config)
    for plan in family.graphs(source):
        changed = switchable(trace(model_class, weights.config, plan), adapters, skeleton(model_class, weights.config))
        traced, adapted[plan.name] = changed.traced, changed.weights
        layers[plan.name] = dict(traced.layers)
        stored[plan.name] = {name: weight.transposed for name, weight in traced.weights.items()}

        def report(done: int, total: int, name: str = plan.name) -> None:
            progress(name, done, total)

        write(traced, weights.tensors, target / f"{plan.name}.onnx", recipe.stored, report)
    (folder / LAYERS).write_text(json.dumps(layers, indent=1) + "\n")
    (folder / WEIGHTS).write_text(json.dumps(stored, indent=1) + "\n")
    description = family.describe(source)
    for name, content in description.files.items():
        (target / name).write_bytes(content)
    fields = draft(recipe, description, memory_needed(parts(family, source), description.tasks))
    fields["adapters"] = write_adapters(adapters, adapted, target, recipe.stored, description.tasks)
    write_manifest(target, fields)
    metrics = {"bytes": sum(path.stat().st_size for path in target.iterdir()), "graphs": len(layers)}
    return metrics | {f"layers of {a.name} that have no effect": len(unused(a, adapted)) for a in adapters}


def draft(recipe: Recipe, description: Description, session_bytes: int) -> dict[str, Any]:
    """Fields of a manifest whose memory is estimated and whose probe is empty."""
    facts, known = recipe.bundle, description.facts
    adapted = [choice.path.resolve().name for choice in recipe.merged]
    name = facts.name or "-".join([known.get("name", recipe.name), *adapted])
    return {
        "name": name, "version": facts.version,
        "description": facts.description or known.get("description", f"exported from {recipe.name}"),
        "licence": facts.licence or known.get("licence", UNKNOWN_LICENCE),
        "training_data": facts.training_data or known.get("training_data", ()),
        "graphs": {
            name: {"file": f"{name}.onnx", "precision": recipe.stored, **roles}
            for name, roles in description.graphs.items()
        },
        "tasks": tasks(recipe, description, session_bytes), "probe": [],
    }  # fmt: skip


def tasks(recipe: Recipe, description: Description, session_bytes: int) -> dict[str, Any]:
    """The family's tasks with what the recipe says of them."""
    memory = {"session_bytes": session_bytes, "tile_bytes": TILE_BYTES, "measured": False}
    found: dict[str, Any] = {verb: {**task, "memory": memory} for verb, task in description.tasks.items()}
    if recipe.prompts.ground and recipe.boxes and "ask" in found:
        question = found["ask"]["prompt"].replace("{text}", recipe.prompts.ground)
        found["ground"] = {**found["ask"], "prompt": question, "boxes": recipe.boxes.model_dump()}
    for task in found.values():
        if task.get("input"):
            task["input"] = _input(recipe, task["input"])
        for key in ("label_prompt", "query_prompt"):
            if recipe.prompts.label and key in task:
                task[key] = recipe.prompts.label
    if recipe.prompts.caption and "ask" in found and "caption" in found:
        found["caption"] = {**found["ask"], "prompt": found["ask"]["prompt"].replace("{text}", recipe.prompts.caption)}
    return found


def _input(recipe: Recipe, spec: dict[str, Any]) -> dict[str, Any]:
    most = recipe.images.max_pixels
    steps = [
        {**step, "max_pixels": min(step["max_pixels"], most)} if step["op"] == "smart_resize" else step
        for step in spec.get("prepare", ())
    ]
    return {**spec, "prepare": steps, "resolution_m": recipe.bundle.resolution_m or spec["resolution_m"]}
