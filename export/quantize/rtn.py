"""Round to nearest: the scale and zero of every block of a weight, and the numbers nearest to it.

The range of a block is searched for, which no calibration is needed for; onnxruntime's own quantizer takes the whole
range, its scales may be negative, and TensorRT takes none of these.

Letters as in ``nbits``: N outputs, K inputs, G blocks, B inputs of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from edge_rsvlm.export.quantize.nbits import Blocks

SHRINKS = tuple(1 - step / 25 for step in range(13))
"""Ranges tried by ``searched_grid``: of all of the block's, down to about half of it."""
TINY = 2.0**-24  # the least positive number in half precision


@dataclass(frozen=True)
class Grid:
    """Numbers that a weight may take: ``(number - zero) * scale``, with scales above 0.

    Zeros are the middle number where ``symmetric``, else any of the numbers.
    """

    scales_NG: Tensor
    zeros_NG: Tensor
    block: int
    bits: int
    symmetric: bool

    def of_inputs(self, inputs_K: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero [N, K] of each of these inputs."""
        return self.scales_NG[:, inputs_K // self.block], self.zeros_NG[:, inputs_K // self.block]

    def round(self, weight_NK: Tensor) -> Tensor:
        """Numbers (as floats) nearest to the weight."""
        scales_NK, zeros_NK = self.of_inputs(torch.arange(weight_NK.shape[1]))
        return (weight_NK / scales_NK).add_(zeros_NK).round_().clamp_(0, (1 << self.bits) - 1)

    def values(self, numbers_NK: Tensor) -> Tensor:
        scales_NK, zeros_NK = self.of_inputs(torch.arange(numbers_NK.shape[1]))
        return (numbers_NK - zeros_NK).mul_(scales_NK)

    def blocks(self, numbers_NK: Tensor) -> Blocks:
        zeros_NG = None if self.symmetric else self.zeros_NG.to(torch.uint8).numpy()
        return Blocks(numbers_NK.to(torch.uint8).numpy(), self.scales_NG.numpy(), zeros_NG, self.block, self.bits)


def searched_grid(weight_NK: Tensor, importance_K: Tensor, block: int, bits: int, *, symmetric: bool = True) -> Grid:
    """Of several ranges of each block the one with the least squared error, inputs weighed by ``importance_K``.

    A range smaller than the block's clips its outliers and is finer for the rest (as the clipping of AWQ, Lin et al.
    2023, section 4). Scales are positive numbers of half precision: what TensorRT accepts, and both engines hold.
    """
    weight_NGB = _in_blocks(weight_NK, block)
    importance_GB = _in_blocks(importance_K[None], block)[0]
    best = torch.full(weight_NGB.shape[:2], torch.inf)
    scales, zeros = torch.ones_like(best), torch.zeros_like(best)
    for shrink in SHRINKS:
        tried_scales, tried_zeros = _range(weight_NGB, shrink, bits, symmetric)
        error = _error(weight_NGB, importance_GB, tried_scales, tried_zeros, bits)
        better = error < best
        best, scales = torch.where(better, error, best), torch.where(better, tried_scales, scales)
        zeros = torch.where(better, tried_zeros, zeros)
    return Grid(scales, zeros, block, bits, symmetric)


def _range(weight_NGB: Tensor, shrink: float, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    half = 1 << (bits - 1)
    high, low = weight_NGB.amax(-1).clamp(min=0), weight_NGB.amin(-1).clamp(max=0)
    if symmetric:
        scales = _half(shrink * torch.maximum(high / (half - 1), -low / half))
        return scales, torch.full_like(scales, half)
    scales = _half(shrink * (high - low) / (2 * half - 1))
    return scales, (-shrink * low / scales).round_().clamp_(0, 2 * half - 1)


def _half(scales: Tensor) -> Tensor:
    return scales.half().float().clamp(min=TINY)


def _error(weight_NGB: Tensor, importance_GB: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    numbers = (weight_NGB / scales[..., None]).add_(zeros[..., None]).round_().clamp_(0, (1 << bits) - 1)
    return numbers.sub_(zeros[..., None]).mul_(scales[..., None]).sub_(weight_NGB).square_().mul_(importance_GB).sum(-1)


def _in_blocks(weight_NK: Tensor, block: int) -> Tensor:
    """[N, K] -> [N, G, B], the last block filled up with zeros."""
    padded = F.pad(weight_NK, (0, -weight_NK.shape[1] % block))
    return padded.reshape(len(weight_NK), -1, block)
