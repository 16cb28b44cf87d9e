"""How much every input of every matrix of a text model matters: its mean square over what calibration fed the decoder.

llama.cpp weighs the rounding error of column j of a matrix by E[x_j^2] ("importance matrix", ggml-org/llama.cpp,
tools/imatrix): the expected squared error of the product, if inputs were independent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edge_rsvlm.export.checkpoint.streaming import streamed_model
from edge_rsvlm.export.families.base import Family, GraphPlan, Source
from edge_rsvlm.export.gguf.text import text_parts

if TYPE_CHECKING:
    from edge_rsvlm.export.steps.merge_lora import ModelWeights

Progress = Callable[[int, int], None]
"""Calls done, calls in all."""
HEADS = ("output.weight", "token_embd.weight")
"""The matrix that gives logits: the second where there is no first."""


def decoder_plan(family: Family, source: Source) -> GraphPlan:
    """The graph that a runtime feeds with embeddings: calibration recorded its inputs."""
    return next(plan for plan in family.graphs(source) if plan.inputs[0].name == "inputs_embeds")


def measure_importance(
    family: Family,
    source: Source,
    weights: ModelWeights,
    samples: Sequence[Mapping[str, NDArray[Any]]],
    progress: Progress | None = None,
) -> dict[str, NDArray[np.float32]]:
    """E[x^2] [in] of every matrix by its name in the GGUF file; ``samples`` are inputs of the decoder's graph.

    The model runs in float32, its weights read as they are used, so that a model of any size fits.
    """
    parts = text_parts(family, source, weights.tensors, weights.config)
    plan = decoder_plan(family, source)
    model = streamed_model(family.model_class(weights.config), weights.config, weights.tensors)
    decoder = plan.wrap(model)
    sums = {name: _Squares() for name, its in parts.names.items() if len(weights.tensors[its].shape) > 1}
    hooks = [_hook(model, parts.names, name, found) for name, found in sums.items()]
    try:
        for index, call in enumerate(samples):
            with torch.no_grad():
                decoder(*(torch.from_numpy(call[given.name]) for given in plan.inputs))
            if progress is not None:
                progress(index + 1, len(samples))
    finally:
        for hook in hooks:
            hook.remove()
    return {name: found.mean() for name, found in sums.items() if found.count}


def _hook(model: nn.Module, names: Mapping[str, str], name: str, found: _Squares) -> Any:
    """What multiplies a matrix: the input of its layer. The head's, tied or not, is the last norm's output for the
    last token, the only one whose logits a runtime asks for."""
    if name in HEADS:
        norm = model.get_submodule(names["output_norm.weight"].removesuffix(".weight"))
        wanted = name == HEADS[0] or HEADS[0] not in names
        return norm.register_forward_hook(lambda _, args, output: found.add(output[:, -1:]) if wanted else None)
    layer = model.get_submodule(names[name].removesuffix(".weight"))
    return layer.register_forward_pre_hook(lambda _, args: found.add(args[0]))


@dataclass
class _Squares:
    """Sums of squares over rows."""

    total: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.float64))
    count: int = 0

    def add(self, values: Tensor) -> None:
        rows = values.reshape(-1, values.shape[-1])
        self.total = self.total + rows.double().square().sum(0)
        self.count += len(rows)

    def mean(self) -> NDArray[np.float32]:
        return (self.total / self.count).float().numpy()
