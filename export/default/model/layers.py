"""Small building blocks shared by the heads. Shapes: N batch, C channels, h, w map cells."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class ConvNormAct(nn.Sequential):
    """Convolution, batch norm (folded at compile time), ReLU. [N,C_in,h,w] -> [N,C_out,h,w]."""

    def __init__(self, c_in: int, c_out: int, kernel: int = 1, groups: int = 1):
        super().__init__(
            nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, groups=groups, bias=False),
            nn.BatchNorm2d(c_out, momentum=0.03),
            nn.ReLU(inplace=True),
        )


class Separable(nn.Sequential):
    """Depthwise k x k then pointwise, each with norm and ReLU."""

    def __init__(self, c_in: int, c_out: int, kernel: int = 3):
        super().__init__(ConvNormAct(c_in, c_in, kernel, groups=c_in), ConvNormAct(c_in, c_out, 1))


def upsample2(x: Tensor) -> Tensor:
    """Nearest-neighbour doubling, [N,C,h,w] -> [N,C,2h,2w]."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")
