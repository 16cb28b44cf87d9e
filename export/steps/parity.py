"""Step ``parity``: the bundle computes what the checkpoint computes, its adapters not merged.

Graphs are compared with the transformers model whose tensors are read as they are needed, so that size does not matter.
Models that fit into memory are also compared whole: transformers with its own loading and processors on one side, the
runtime with the manifest alone on the other.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edge_rsvlm.bundle import Bundle, load_bundle
from edge_rsvlm.export.adapters.kept import KeptAdapter
from edge_rsvlm.export.adapters.resolve import Updates
from edge_rsvlm.export.adapters.unmerged import Unmerged
from edge_rsvlm.export.adapters.updates import merge
from edge_rsvlm.export.checkpoint.reading import Checkpoint, LazyTensor
from edge_rsvlm.export.checkpoint.streaming import streamed_model
from edge_rsvlm.export.families.base import Arrays, Family, GraphPlan, Source
from edge_rsvlm.export.graphs.sliced import run_sliced
from edge_rsvlm.export.proof.gates import GATES, Check, divergence_check, tensor_checks
from edge_rsvlm.export.proof.layers import compare_layers, first_above
from edge_rsvlm.export.proof.probe import graph_inputs, probe_image
from edge_rsvlm.export.proof.weights import compare_weights
from edge_rsvlm.export.steps.compile_onnx import BUNDLE, LAYERS, WEIGHTS, GraphProgress
from edge_rsvlm.export.steps.end_to_end import end_to_end
from edge_rsvlm.pipeline.adapters import read_adapter

PROBES, FAILED = "probes", "failed checks"
WORST_LAYERS = 5
WHOLE_BYTES = 1 << 30
"""A model is compared whole up to this size in float32: an export shall not need the memory of its model."""
BY_ADAPTER = "@"
"""Between graph and adapter in the name of a golden probe."""
NO_GOLDEN = ("present.",)
"""Caches are compared, and not kept: they are large and say what the logits say."""


class Parity:
    """One comparison: what is compared, and what came of it; of the base model, or of a kept adapter."""

    def __init__(
        self, family: Family, source: Source, bundle: Bundle, layers: Mapping[str, Mapping[str, str]],
        adapter: str | None = None,
    ) -> None:  # fmt: skip
        self._family, self._source, self._bundle, self._layers = family, source, bundle, layers
        self._adapter = adapter
        self._by = "" if adapter is None else f"{adapter}: "
        self._factors = {} if adapter is None else read_adapter(bundle, adapter)
        self._gate = GATES[bundle.manifest.precision]
        self._image = probe_image()
        self._made: Arrays = {}
        self.checks: list[Check] = []
        self.worst: dict[str, list[str]] = {}

    def graph(self, plan: GraphPlan, model: nn.Module, probes: Path) -> None:
        """Compare one graph, and keep what it computes here of these inputs: the device is to compute the same."""
        inputs = graph_inputs(plan.name, plan.inputs, self._bundle, self._image, self._made)
        expected = _outputs(plan, model, inputs)
        path, factors = self._path(plan.name), self._factors.get(plan.name, {})
        found = dict(run_sliced(path, {**inputs, **factors}, plan.outputs))
        checks = [check for name in plan.outputs for check in self._compare(plan, name, found[name], expected[name])]
        if not all(check.passed for check in checks):
            self._name_layers(plan, model, path, {**inputs, **factors})
        self.checks += checks
        if factors or self._adapter is None:
            self._keep_golden(plan.name, inputs, found, probes)
        self._made |= {name: value for name, value in expected.items() if not name.startswith(NO_GOLDEN)}

    def _keep_golden(self, graph: str, inputs: Arrays, found: Arrays, probes: Path) -> None:
        golden = {name: value for name, value in found.items() if not name.startswith(NO_GOLDEN)}
        arrays = {f"in.{k}": v for k, v in inputs.items()} | {f"out.{k}": v for k, v in golden.items()}
        name = graph if self._adapter is None else f"{graph}{BY_ADAPTER}{self._adapter}"
        np.savez_compressed(probes / f"{name}.npz", **arrays)  # type: ignore[arg-type]

    def whole(self, model: nn.Module) -> None:
        """Compare transformers and the runtime from pixels to answers."""
        found = end_to_end(self._family, self._source, model, self._bundle, self._image, self._gate, self._adapter)
        self.checks += [replace(check, output=f"{self._by}{check.output}") for check in found]

    def _compare(self, plan: GraphPlan, name: str, found: NDArray[Any], expected: NDArray[Any]) -> list[Check]:
        output = f"{self._by}{plan.name}.{name}"
        checks = tensor_checks(output, found, expected, self._gate)
        if name == "logits" and expected.ndim == 3:
            checks.append(divergence_check(output, found[0, -1], expected[0, -1], self._gate))
        return checks

    def weights(self, graph: str, transposed: Mapping[str, bool], merged: Callable[[str], Tensor]) -> None:
        """Compare the weights that a graph holds with those it should, and name the ones that are off."""
        errors = compare_weights(self._path(graph), transposed, merged)
        self.checks.append(
            Check(f"{graph}.weights", "relative error", max(errors.values(), default=0), self._gate.error)
        )
        wrong = sorted(
            (name for name in errors if not errors[name] <= self._gate.error), key=lambda name: -errors[name]
        )
        if wrong:
            lines = [f"not the checkpoint's: {name}, error {errors[name]:.3g}" for name in wrong[:WORST_LAYERS]]
            self.worst[graph] = [*self.worst.get(graph, []), *lines]

    def _path(self, graph: str) -> Path:
        return self._bundle.path(self._bundle.manifest.graphs[graph].file)

    def _name_layers(self, plan: GraphPlan, model: nn.Module, path: Path, inputs: Arrays) -> None:
        rows = compare_layers(path, self._layers[plan.name], model, plan, inputs)
        first = first_above(rows, self._gate.error)
        worst = sorted(rows, key=lambda row: row.growth, reverse=True)[:WORST_LAYERS]
        lines = [f"first off: {first.module}, error {first.error:.3g}"] if first else []
        self.worst[f"{self._by}{plan.name}"] = [
            *lines,
            *(f"{row.module}: error {row.error:.3g}, x{row.growth:.3g}" for row in worst),
        ]


def parity(
    family: Family,
    checkpoint: Checkpoint,
    tensors: Mapping[str, LazyTensor],
    updates: Updates,
    adapters: Sequence[KeptAdapter],
    compiled: Path,
    folder: Path,
    progress: GraphProgress,
) -> tuple[dict[str, Any], Parity]:
    """Fill ``folder`` with golden probes; the metrics hold every check by name."""
    source = Source(checkpoint.folder, checkpoint.config)
    bundle = load_bundle(compiled / BUNDLE, allow_unsigned=True, allow_older=True)
    layers, stored = (json.loads((compiled / name).read_text()) for name in (LAYERS, WEIGHTS))
    compared = Parity(family, source, bundle, layers)
    others = [(adapter, Parity(family, source, bundle, layers, adapter.name)) for adapter in adapters]
    model_class = family.model_class(checkpoint.config)

    def merged(name: str) -> Tensor:
        tensor, changes = tensors[name].read(), updates.get(name, ())
        return merge(tensor, changes, torch.float32) if changes else tensor

    (folder / PROBES).mkdir()
    plans = family.graphs(source)
    for index, plan in enumerate(plans):
        progress(plan.name, index, len(plans))
        # A model of its own for each graph: wrappers may change how it computes.
        model = streamed_model(model_class, checkpoint.config, tensors)
        with Unmerged(model, updates):
            compared.graph(plan, model, folder / PROBES)
            for adapter, other in others:
                with Unmerged(model, adapter.updates):
                    other.graph(plan, model, folder / PROBES)
        compared.weights(plan.name, stored[plan.name], merged)
    size = sum(math.prod(tensor.shape) * torch.float32.itemsize for tensor in tensors.values())
    whole = size <= WHOLE_BYTES
    if whole:
        loaded: Any = model_class
        published = loaded.from_pretrained(checkpoint.folder, dtype=torch.float32, local_files_only=True).eval()
        with Unmerged(published, updates) as model:
            compared.whole(model)
            for adapter, other in others:
                with Unmerged(model, adapter.updates):
                    other.whole(model)
    for _, other in others:
        compared.checks += other.checks
        compared.worst |= other.worst
    metrics = {check.name: check.value for check in compared.checks}
    metrics[FAILED] = sum(not check.passed for check in compared.checks)
    return metrics | {"compared whole": "yes" if whole else "no, it is too large"}, compared


def _outputs(plan: GraphPlan, model: nn.Module, inputs: Arrays) -> Arrays:
    module = plan.wrap(model).eval()
    with torch.no_grad():
        found = module(*(torch.from_numpy(inputs[given.name]) for given in plan.inputs))
    values = found if isinstance(found, tuple) else (found,)
    return {name: value.float().numpy() for name, value in zip(plan.outputs, values, strict=True)}
