"""A transformers model of any size on the CPU: parameters are read from the checkpoint whenever a module uses them.

It is the reference that exported graphs are compared with, slow (every pass reads every weight) and exact: float32
arithmetic on the stored values.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from edge_rsvlm.export.checkpoint.reading import LazyTensor
from edge_rsvlm.export.checkpoint.skeleton import skeleton

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def streamed_model(
    model_class: type[nn.Module], config: PretrainedConfig, weights: Mapping[str, LazyTensor]
) -> nn.Module:
    """The model in eval mode, as published, with ``weights`` by the names of its state dict.

    ``module.weight`` reads that tensor, so it is held only as long as the one operation that uses it. Iterating over
    ``parameters()`` gives NaNs without memory, which tell shape, dtype and device.
    """
    model = skeleton(model_class, config)
    for prefix, module in model.named_modules():
        names = {name: f"{prefix}.{name}" if prefix else name for name in (*module._parameters, *module._buffers)}
        sources = {name: weights[full] for name, full in names.items() if full in weights}
        module.__dict__["_parameters"] = _ReadParameters(module._parameters, sources)
        for name in module._buffers.keys() & sources.keys():
            module._buffers[name] = _widened(sources[name].read())
    return model


class _ReadParameters(dict[str, Any]):
    """Stands in for ``nn.Module._parameters``, which ``nn.Module.__getattr__`` looks names up in."""

    def __init__(self, parameters: Mapping[str, nn.Parameter | None], sources: Mapping[str, LazyTensor]) -> None:
        super().__init__({name: _without_memory(parameter) for name, parameter in parameters.items()})
        self._sources = sources
        self._instead: dict[str, nn.Parameter | None] = {}
        self._given_out: dict[str, int] = {}

    def __getitem__(self, name: str) -> nn.Parameter | None:
        if name in self._instead:
            return self._instead[name]
        if super().__getitem__(name) is None:
            return None
        parameter = nn.Parameter(_widened(self._sources[name].read()), requires_grad=False)
        self._given_out[name] = id(parameter)
        return parameter

    def __setitem__(self, name: str, parameter: nn.Parameter | None) -> None:
        """Another value until the one that was read last is put back, which is not kept."""
        self._instead[name] = parameter
        if id(parameter) == self._given_out.get(name):
            del self._instead[name]


def _without_memory(parameter: nn.Parameter | None) -> nn.Parameter | None:
    if parameter is None:
        return None
    return nn.Parameter(torch.full((), torch.nan).expand(parameter.shape), requires_grad=False)


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


@contextmanager
def captured_outputs(model: nn.Module, names: Iterable[str], folder: Path) -> Iterator[dict[str, Path]]:
    """Write what the named modules return (the first tensor, of their last call) to ``.npy`` files in ``folder``.

    The mapping fills while the model runs; modules that never run are not in it.
    """
    files: dict[str, Path] = {}
    hooks = [
        model.get_submodule(name).register_forward_hook(partial(_save, files, name, folder / f"{index}.npy"))
        for index, name in enumerate(names)
    ]
    try:
        yield files
    finally:
        for hook in hooks:
            hook.remove()


def _save(files: dict[str, Path], name: str, path: Path, module: nn.Module, args: Any, output: Any) -> None:
    tensor = output if isinstance(output, Tensor) else output[0]
    np.save(path, tensor.detach().numpy())
    files[name] = path
