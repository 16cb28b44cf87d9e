"""The table of candidates: which file builds it from which weights, and whether batch norm is put back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from edge_rsvlm.export.default.encoders import mobilenet_v1, mobilenet_v2, shufflenet_v2
from edge_rsvlm.export.default.encoders.norms import insert_norms

MAPS = ("c2", "c3", "c4", "c5")


@dataclass(frozen=True)
class Candidate:
    """``graph`` is what candidates of one architecture share: folded, they are the same graph."""

    name: str
    graph: str
    weights: str
    builder: Callable[[Path], nn.Module]
    channels: dict[str, int]
    put_norms_back: bool

    def build(self, data: Path, batches: Iterable[Tensor]) -> nn.Module:
        """The encoder with ImageNet weights, ready for training; ``batches`` measure the norms that are put back."""
        encoder = self.builder(data / "backbones" / self.weights)
        return insert_norms(encoder, batches) if self.put_norms_back else encoder


V1_FILE, V2_FILE = "mobilenet_v1_1.0_224_quant_embedding_extractor.tflite", "tf2_mobilenet_v2_1.0_224_ptq.tflite"
CANDIDATES = (
    Candidate("mobilenet_v2", "MobileNetV2 1.0", V2_FILE, mobilenet_v2.build, mobilenet_v2.CHANNELS, False),
    Candidate("mobilenet_v2_norms", "MobileNetV2 1.0", V2_FILE, mobilenet_v2.build, mobilenet_v2.CHANNELS, True),
    Candidate("mobilenet_v1_norms", "MobileNetV1 1.0", V1_FILE, mobilenet_v1.build, mobilenet_v1.CHANNELS, True),
    Candidate(
        "shufflenet_v2", "ShuffleNetV2 0.5", "shufflenetv2.pth", shufflenet_v2.build, shufflenet_v2.CHANNELS, False
    ),
)
