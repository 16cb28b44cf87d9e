"""The same adapters applied without merging, to compare with."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edge_rsvlm.export.adapters.updates import LowRank, Update, merge

Hook = Callable[..., Any]


class Unmerged:
    """While open, ``model`` answers with its adapters, its parameters as they were.

    Low-rank parts are computed from the activations, y + w * s * B(A x); tensors that are replaced, and weights that
    are used without a call of their module (multi-head attention), stand in during each call.
    """

    def __init__(self, model: nn.Module, updates: dict[str, tuple[Update, ...]]) -> None:
        self._model, self._updates = model, updates
        self._handles: list[Any] = []

    def __enter__(self) -> nn.Module:
        for name, updates in self._updates.items():
            owner, _, leaf = name.rpartition(".")
            module = self._model.get_submodule(owner)
            caller = self._model.get_submodule(owner.rpartition(".")[0])
            called = caller if isinstance(caller, nn.MultiheadAttention) else module
            low_rank = [u for u in updates if isinstance(u, LowRank) and not isinstance(called, nn.MultiheadAttention)]
            rest = [u for u in updates if u not in low_rank]
            stand_in = _StandIn(module, leaf, rest)
            if rest:
                self._handles.append(called.register_forward_pre_hook(stand_in.put))
            if low_rank:
                self._handles.append(called.register_forward_hook(_added(low_rank)))
            if rest:
                self._handles.append(called.register_forward_hook(stand_in.take_back, always_call=True))
        return self._model

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


class _StandIn:
    """Another value of a module's tensor for the time of a call."""

    def __init__(self, module: nn.Module, leaf: str, updates: list[Update]) -> None:
        self._module, self._leaf, self._updates = module, leaf, updates
        self._own: Tensor | None = None

    def put(self, *_: object) -> None:
        store = self._store()
        self._own = store[self._leaf]
        assert self._own is not None
        value = merge(self._own.detach(), self._updates)
        store[self._leaf] = nn.Parameter(value, requires_grad=False) if store is self._module._parameters else value

    def take_back(self, *_: object) -> None:
        self._store()[self._leaf] = self._own

    def _store(self) -> dict[str, Tensor | None]:
        return self._module._parameters if self._leaf in self._module._parameters else self._module._buffers


def _added(updates: list[LowRank]) -> Hook:
    """A forward hook: output + the sum of weight * change."""

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        changes = [u.weight * _change(module, inputs[0], output, u) for u in updates]
        return output + torch.stack(changes).sum(0).to(output.dtype)

    return hook


def _change(module: nn.Module, x: Tensor, output: Tensor, update: LowRank) -> Tensor:
    delta = update.scale * _low_rank(module, x, update)
    weight = module.weight.detach()
    factor = update.factor(weight.reshape(len(weight), -1))
    if factor is None:
        return delta
    channels = factor.reshape(-1, *[1] * (output.ndim - 2 if _is_convolution(module) else 0))
    bias = getattr(module, "bias", None)
    plain = output if bias is None else output - bias.reshape(-1, *channels.shape[1:])
    return channels * (plain + delta) - plain


def _low_rank(module: nn.Module, x: Tensor, update: LowRank) -> Tensor:
    up, down = update.up.float(), update.down.float()
    if isinstance(module, nn.Embedding):
        return F.embedding(x, up) @ down
    if update.columns_out:
        return x.float() @ up @ down
    if _is_convolution(module):
        kernels = down.reshape(-1, *module.weight.shape[1:])
        return torch.einsum("nr...,or->no...", module._conv_forward(x.float(), kernels, None), up)
    return F.linear(F.linear(x.float(), down), up)


def _is_convolution(module: nn.Module) -> bool:
    return isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
