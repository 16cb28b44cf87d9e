"""Batch norm put back where it was folded, and folded again. Shapes: N images, C channels.

A folded convolution is y = w * x + b. Its batch norm is put back as (w * x - m) / sqrt(v + eps) * gamma + beta with m
and v measured, gamma = sqrt(v + eps) and beta = m + b: the same function, with a normalisation that training moves.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from itertools import pairwise

import torch
from torch import Tensor, nn

EPS, MOMENTUM = 1e-3, 0.03


class _Moments:
    """Mean and variance per channel of all that a convolution gives."""

    def __init__(self, conv: nn.Conv2d) -> None:
        self.count = 0
        self.total, self.squares = torch.zeros(2, conv.out_channels, dtype=torch.float64)
        self.handle = conv.register_forward_hook(self._see)

    def _see(self, conv: nn.Conv2d, given: tuple[Tensor, ...], out: Tensor) -> None:
        values = out.detach().double()
        self.count += values.numel() // values.shape[1]
        self.total += values.sum(dim=(0, 2, 3))
        self.squares += values.square().sum(dim=(0, 2, 3))

    def mean_variance(self) -> tuple[Tensor, Tensor]:
        mean = self.total / self.count
        return mean, (self.squares / self.count - mean.square()).clamp(min=0)


@torch.no_grad()
def insert_norms(module: nn.Module, batches: Iterable[Tensor]) -> nn.Module:
    """A copy whose convolutions with a bias are each followed by a batch norm, measured on ``batches`` [N,C,H,W].

    In eval mode it is the same function.
    """
    copied = copy.deepcopy(module).eval()
    moments = {
        conv: _Moments(conv) for conv in copied.modules() if isinstance(conv, nn.Conv2d) and conv.bias is not None
    }
    for batch in batches:
        copied(batch)
    if any(found.count == 0 for found in moments.values()):
        raise ValueError("no batch reached every convolution: give at least one")
    for parent in list(copied.modules()):
        for name, child in list(parent.named_children()):
            if child in moments:
                moments[child].handle.remove()
                setattr(parent, name, _with_norm(child, *moments[child].mean_variance()))
    return copied


def _with_norm(conv: nn.Conv2d, mean: Tensor, variance: Tensor) -> nn.Sequential:
    assert conv.bias is not None
    norm = nn.BatchNorm2d(conv.out_channels, eps=EPS, momentum=MOMENTUM).eval()
    norm.running_mean.copy_(mean - conv.bias)
    norm.running_var.copy_(variance)
    norm.weight.copy_((norm.running_var + EPS).sqrt())
    norm.bias.copy_(mean)
    conv.bias = None
    return nn.Sequential(conv, norm)


@torch.no_grad()
def fold_norms(module: nn.Module) -> nn.Module:
    """A copy in eval mode whose batch norms are folded into the convolutions before them."""
    copied = copy.deepcopy(module).eval()
    for chain in [m for m in copied.modules() if isinstance(m, nn.Sequential)]:
        parts = list(chain.named_children())
        for (name, conv), (after, norm) in pairwise(parts):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(chain, name, _folded(conv, norm))
                setattr(chain, after, nn.Identity())
    return copied


def _folded(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    gain = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    bias = torch.zeros_like(gain) if conv.bias is None else conv.bias.double()
    folded = nn.Conv2d(
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, groups=conv.groups
    )
    assert folded.bias is not None
    folded.weight.copy_(conv.weight.double() * gain[:, None, None, None])
    folded.bias.copy_(norm.bias.double() + (bias - norm.running_mean.double()) * gain)
    return folded.to(conv.weight.device)
