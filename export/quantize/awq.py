"""AWQ: inputs that carry much are scaled up before rounding, and the activations down by as much.

Lin et al. 2023, "AWQ: Activation-aware Weight Quantization for On-Device LLM Compression and Acceleration", section 3.
Letters as in ``nbits``: N outputs, K inputs of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor

from edge_rsvlm.export.quantize.rtn import Grid

GridOf = Callable[[Tensor, Tensor], Grid]
"""Of a weight [N, K], and of the importance of its inputs [K]."""

EXPONENTS = tuple(step / 20 for step in range(20))
"""Of the mean magnitude of an input (equation 5); 0 leaves the weights as they are."""
ROWS = 256
"""Outputs of a layer, evenly spread, on which exponents are compared."""


def input_scales(weights_NK: Iterable[Tensor], hessian_KK: Tensor, magnitude_K: Tensor, grid_of: GridOf) -> Tensor:
    """Scales [K] of the inputs that these layers share: they multiply the weights and divide the activations.

    The exponent is the one with the least error of the outputs after rounding, which the sum of x x^T tells.
    """
    samples = [weight[:: max(1, len(weight) // ROWS)].clone() for weight in weights_NK]
    tried = [_scales(magnitude_K, exponent) for exponent in EXPONENTS]
    losses = [sum(_loss(weight, hessian_KK, scales, grid_of) for weight in samples) for scales in tried]
    return tried[losses.index(min(losses))]


def _scales(magnitude_K: Tensor, exponent: float) -> Tensor:
    """Centred on 1, so that neither weights nor activations leave the range of half precision."""
    scales = magnitude_K.clamp(min=1e-4 * float(magnitude_K.max()) + 1e-12) ** exponent
    return scales / (scales.max() * scales.min()).sqrt()


def _loss(weight_NK: Tensor, hessian_KK: Tensor, scales_K: Tensor, grid_of: GridOf) -> float:
    scaled = weight_NK * scales_K
    grid = grid_of(scaled, hessian_KK.diagonal() / scales_K**2)
    error = grid.values(grid.round(scaled)) / scales_K - weight_NK
    return output_error(error, hessian_KK)


def output_error(error_NK: Tensor, hessian_KK: Tensor) -> float:
    """Sum of squares of what ``error_NK`` of a weight changes in the outputs."""
    return float(((error_NK @ hessian_KK) * error_NK).sum())
