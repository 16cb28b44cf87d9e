"""MobileNetV2 encoder with folded batch norm and a five-channel stem.

Shapes: N batch, C channels, H, W tile pixels. Architecture: Sandler et al. 2018, "MobileNetV2", table 2, width 1.0.
ImageNet weights come from a TFLite file, whose 'SAME' padding is asymmetric at stride 2 (0 before, 1 after, for even
sizes). We reproduce that, so that the float network is the one the weights were trained for.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# (expansion, channels out, repeats, stride of the first repeat)
STAGES = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]
STEM_BANDS = ("red", "green", "blue", "nir", "validity")
STEM_CHANNELS = 32
# Channels and strides of the maps c1..c5, taken after the named entries of STAGES.
TAPS = {0: "c1", 1: "c2", 2: "c3", 4: "c4", 6: "c5"}
CHANNELS = {"c1": 16, "c2": 24, "c3": 32, "c4": 96, "c5": 320}
STRIDES = {"c1": 2, "c2": 4, "c3": 8, "c4": 16, "c5": 32}


def same_pad(x: Tensor, stride: int) -> Tensor:
    """Pad for a 3x3 convolution as TFLite does for even H and W: 1+1 at stride 1, 0+1 at stride 2."""
    return F.pad(x, (0, 1, 0, 1)) if stride == 2 else x


class Conv(nn.Module):
    """Convolution with bias and an optional ReLU6; 3x3 kernels pad as `same_pad` says."""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1, relu: bool = True):
        super().__init__()
        padding = 1 if kernel == 3 and stride == 1 else 0
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, groups=groups)
        self.kernel, self.stride, self.groups, self.relu = kernel, stride, groups, relu

    def forward(self, x: Tensor) -> Tensor:
        if self.kernel == 3:
            x = same_pad(x, self.stride)
        if self.stride == 2 and self.groups > 1 and torch.is_autocast_enabled("cpu"):
            # oneDNN takes two to three times as long for the gradients of this kind in bfloat16.
            with torch.autocast("cpu", enabled=False):
                x = self.conv(x.float())
        else:
            x = self.conv(x)
        return F.relu6(x) if self.relu else x


class InvertedResidual(nn.Module):
    """Expand 1x1, depthwise 3x3, project 1x1; a shortcut where shapes allow."""

    def __init__(self, c_in: int, c_out: int, expansion: int, stride: int):
        super().__init__()
        hidden = c_in * expansion
        layers = [Conv(c_in, hidden, 1)] if expansion > 1 else []
        layers += [Conv(hidden, hidden, 3, stride, groups=hidden), Conv(hidden, c_out, 1, relu=False)]
        self.layers = nn.Sequential(*layers)
        self.shortcut = stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return x + y if self.shortcut else y


class Encoder(nn.Module):
    """tiles [N,5,H,W] -> maps c1 .. c5 [N,C,H/s,W/s] with the CHANNELS C and STRIDES s above."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Conv(len(STEM_BANDS), STEM_CHANNELS, 3, stride=2)
        stages: list[nn.Module] = []
        c_in = STEM_CHANNELS
        for expansion, c_out, repeats, stride in STAGES:
            blocks = [
                InvertedResidual(c_in if i == 0 else c_out, c_out, expansion, stride if i == 0 else 1)
                for i in range(repeats)
            ]
            stages.append(nn.Sequential(*blocks))
            c_in = c_out
        self.stages = nn.ModuleList(stages)

    def forward(self, tiles: Tensor, last: str = "c5") -> dict[str, Tensor]:
        """Feature maps by name, up to and including `last`."""
        x = self.stem(tiles)
        maps: dict[str, Tensor] = {}
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if i in TAPS:
                maps[TAPS[i]] = x
            if TAPS.get(i) == last:
                break
        return maps


class Head1280(nn.Module):
    """MobileNetV2's last 1x1 convolution: c5 [N,320,h,w] -> [N,1280,h,w]. Scene classes and captions read it."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = Conv(CHANNELS["c5"], 1280, 1)

    def forward(self, c5: Tensor) -> Tensor:
        out: Tensor = self.expand(c5)
        return out


def convs_in_order(module: nn.Module) -> list[nn.Conv2d]:
    """Every convolution, in the order the forward pass runs them."""
    return [m for m in module.modules() if isinstance(m, nn.Conv2d)]


def load_rgb_weights(encoder: Encoder, head: Head1280, weights: list[tuple[Tensor, Tensor]]) -> None:
    """Copy (kernel, bias) pairs of an RGB MobileNetV2 in execution order; NIR and validity start at zero."""
    targets = convs_in_order(encoder) + convs_in_order(head)
    if len(targets) != len(weights):
        raise ValueError(f"expected {len(targets)} convolutions, the source has {len(weights)}: is it MobileNetV2 1.0?")
    with torch.no_grad():
        for i, (conv, (kernel, bias)) in enumerate(zip(targets, weights, strict=True)):
            if i == 0:
                conv.weight.zero_()
                conv.weight[:, :3] = kernel
            else:
                conv.weight.copy_(kernel)
            assert conv.bias is not None
            conv.bias.copy_(bias)
