"""Step ``take_onnx``: the draft of a bundle around graphs that others exported, and what these graphs compute.

There is no model to compare them with, so the golden probe says what they compute here, and the device repeats it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from edge_rsvlm.bundle import Bundle, load_bundle
from edge_rsvlm.config.manifest import Graph
from edge_rsvlm.config.task_specs import GenerateTask
from edge_rsvlm.export.bundle_writer import write_manifest
from edge_rsvlm.export.families.base import Arrays, GraphInput
from edge_rsvlm.export.graphs.sliced import run_sliced
from edge_rsvlm.export.onnx_folder.parts import OnnxFolder
from edge_rsvlm.export.proof.probe import graph_inputs, probe_image
from edge_rsvlm.export.recipe import Recipe
from edge_rsvlm.export.steps.compile_onnx import BUNDLE, draft
from edge_rsvlm.export.steps.parity import PROBES
from edge_rsvlm.tasks.decoder import cache_names

OVERHEAD = 1.25
ORDER = ("embed", "decoder")
"""The decoder reads what the embedding gives; other graphs stand alone."""


def take_onnx(taken: OnnxFolder, recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Fill ``folder`` with ``bundle/`` and ``probes/``."""
    target = folder / BUNDLE
    target.mkdir()
    files = taken.write(target)
    for name, content in taken.description.files.items():
        (target / name).write_bytes(content)
    size = sum(path.stat().st_size for path in target.iterdir())
    fields = draft(recipe, taken.description, int(size * OVERHEAD))
    for name, graph in fields["graphs"].items():
        graph |= {"file": files[name], "precision": "f32"}
    write_manifest(target, fields)
    _probe(load_bundle(target, allow_unsigned=True, allow_older=True), folder / PROBES)
    return {"bytes": size, "graphs": len(files)}


def _probe(bundle: Bundle, folder: Path) -> None:
    folder.mkdir()
    made: Arrays = {}
    graphs = bundle.manifest.graphs
    for name in sorted(graphs, key=lambda name: ORDER.index(name) if name in ORDER else -1):
        graph = graphs[name]
        given = graph_inputs(name, _inputs(bundle, name, graph), bundle, probe_image(), made)
        inputs = {graph.inputs.get(role, role): value for role, value in given.items()}
        outputs = dict(run_sliced(bundle.path(graph.file), inputs, set(graph.outputs.values())))
        made |= {role: outputs[value] for role, value in graph.outputs.items() if role == "inputs_embeds"}
        arrays = {f"in.{k}": v for k, v in inputs.items()} | {f"out.{k}": v for k, v in outputs.items()}
        np.savez_compressed(folder / f"{name}.npz", **arrays)  # type: ignore[arg-type]


def _inputs(bundle: Bundle, name: str, graph: Graph) -> list[GraphInput]:
    """Inputs by role, as a plan would list them; sizes that the probe decides have names."""
    words = ("input_ids", "attention_mask", "token_type_ids")
    found = [GraphInput(role, ("batch", "text") if role in words else ("batch",)) for role in graph.inputs]
    for _, task in bundle.manifest.tasks:
        if isinstance(task, GenerateTask) and task.decoder.kind == "onnx" and task.decoder.graph == name:
            rows = (3,) if task.positions == "mrope" else ()
            found = [GraphInput(role, (*rows, "batch", "text"), torch.int64) for role in graph.inputs]
            shape = ("batch", task.decoder.cache.heads, "past", task.decoder.cache.head_dim)
            found += [GraphInput(past, shape) for past in cache_names(task.decoder.cache).values()]
            break
    return found
