"""MobileNetV1 1.0 encoder with folded batch norm and a five-channel stem.

Shapes: N batch, C channels, H, W tile pixels. Architecture: Howard et al. 2017, "MobileNets", table 1. The weights come
from a quantised TFLite file and so pad as TFLite does, see ``model.encoder.same_pad``.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from edge_rsvlm.export.default.model.encoder import STEM_BANDS, Conv, convs_in_order
from edge_rsvlm.export.default.stages.tflite_weights import convolutions

# (channels out, stride) of each depthwise-separable block.
BLOCKS = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1)]
STEM_CHANNELS = 32
# Maps are taken after these entries of BLOCKS, the last of each stride.
TAPS = {2: "c2", 4: "c3", 10: "c4", 12: "c5"}
CHANNELS = {"c2": 128, "c3": 256, "c4": 512, "c5": 1024}


class MobileNetV1(nn.Module):
    """tiles [N,5,H,W] -> maps c2 .. c5 [N,C,H/s,W/s]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Conv(len(STEM_BANDS), STEM_CHANNELS, 3, stride=2)
        sizes = [STEM_CHANNELS, *(c_out for c_out, _ in BLOCKS)]
        self.blocks = nn.ModuleList(
            nn.Sequential(Conv(c_in, c_in, 3, stride, groups=c_in), Conv(c_in, c_out, 1))
            for c_in, (c_out, stride) in zip(sizes[:-1], BLOCKS, strict=True)
        )

    def forward(self, tiles: Tensor) -> dict[str, Tensor]:
        x = self.stem(tiles)
        maps: dict[str, Tensor] = {}
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in TAPS:
                maps[TAPS[i]] = x
        return maps


def build(path: Path) -> MobileNetV1:
    """The encoder with the weights of the TFLite file at ``path``; NIR and validity start at zero.

    Raises ValueError when the file is not a MobileNetV1 1.0 without its classifier.
    """
    encoder = MobileNetV1()
    weights, targets = convolutions(path), convs_in_order(encoder)
    if len(weights) != len(targets):
        raise ValueError(
            f"{path.name} has {len(weights)} convolutions, MobileNetV1 {len(targets)}: give the embedding extractor"
        )
    with torch.no_grad():
        targets[0].weight.zero_()
        for conv, (kernel, bias) in zip(targets, weights, strict=True):
            conv.weight[:, : kernel.shape[1]] = kernel
            conv.bias.copy_(bias)
    return encoder
