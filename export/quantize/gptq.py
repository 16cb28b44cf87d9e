"""GPTQ: round one input after another, and let the inputs still to come make up for what rounding changed.

Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", algorithm 1.
Letters as in ``nbits``: N outputs, K inputs of a layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edge_rsvlm.export.quantize.rtn import Grid

DAMP = 0.05
"""Share of the mean of the diagonal added to it. The paper takes 0.01 (section 3.3); tens of images have fewer tokens
than its samples, and what they tell of how inputs go together is trusted less."""
LAZY = 128
"""Inputs whose corrections reach the rest together (section 3.3, step 2)."""


def gptq(weight_NK: Tensor, hessian_KK: Tensor, grid: Grid) -> Tensor:
    """Numbers [N, K] on ``grid`` with a small error of the layer's outputs, ``hessian_KK`` being the sum of x x^T.

    Inputs are rounded in order of their power, greatest first, while those that can make up for it are still free. The
    scales are found before, so each input keeps the block it lies in.
    """
    order = hessian_KK.diagonal().argsort(descending=True)
    weight, inverse = weight_NK[:, order].clone(), _inverse_factor(hessian_KK[order][:, order])
    numbers = torch.empty_like(weight)
    scales, zeros = grid.of_inputs(order)
    most = (1 << grid.bits) - 1
    for start in range(0, len(order), LAZY):
        now = slice(start, min(start + LAZY, len(order)))
        block, factor = weight[:, now], inverse[now, now]
        errors = torch.empty_like(block)
        for k in range(block.shape[1]):
            at = start + k
            numbers[:, at] = (block[:, k] / scales[:, at] + zeros[:, at]).round_().clamp_(0, most)
            rounded = (numbers[:, at] - zeros[:, at]) * scales[:, at]
            errors[:, k] = (block[:, k] - rounded) / factor[k, k]
            block[:, k + 1 :].addr_(errors[:, k], factor[k, k + 1 :], alpha=-1)
        weight[:, now.stop :].addmm_(errors, inverse[now, now.stop :], alpha=-1)
    return numbers[:, order.argsort()]


def _inverse_factor(hessian_KK: Tensor) -> Tensor:
    """Upper Cholesky factor of the inverse of the damped Hessian, which is never inverted: with J for the reversed
    order, J H J = L L^T makes H^-1 = U^T U of U = J L^-1 J.

    Inputs that are always zero get an own diagonal: they are rounded to the nearest and touch nothing.
    """
    hessian = hessian_KK.clone()
    diagonal = hessian.diagonal()
    mean = diagonal.mean().clamp(min=torch.finfo(hessian.dtype).tiny)
    diagonal[diagonal == 0] = mean
    damp = DAMP
    while True:
        diagonal.add_(damp * mean)
        lower, failed = torch.linalg.cholesky_ex(hessian.flip(0, 1))
        if not failed:
            return torch.linalg.solve_triangular(lower, torch.eye(len(lower)), upper=False).flip(0, 1)
        damp *= 10  # nearly dependent inputs, and float32
