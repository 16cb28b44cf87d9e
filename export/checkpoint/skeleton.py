"""A transformers model without its weights: parameters on the meta device, buffers as the config computes them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def in_float32(config: PretrainedConfig) -> PretrainedConfig:
    """A copy of the config whose models, towers included, compute in float32 whatever they are stored in."""
    config = copy.deepcopy(config)
    pending = [config]
    while pending:
        part = pending.pop()
        part.dtype = torch.float32
        pending += [sub for name in part.sub_configs if (sub := getattr(part, name, None)) is not None]
    return config


def skeleton(model_class: type[nn.Module], config: PretrainedConfig) -> nn.Module:
    """The model in eval mode. Rotary frequencies, position ids and the like have their values; parameters have none."""
    with _parameters_on_meta():
        model = model_class(in_float32(config))
    return model.eval().requires_grad_(False)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters lose their data when a module takes them, before anything writes to that memory.

    The meta device as default device would do the same to the buffers, which nothing could fill again.
    """
    register = nn.Module.register_parameter

    def without_data(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = without_data
    try:
        yield
    finally:
        nn.Module.register_parameter = register
