"""MobileNetV2 1.0, the encoder of ``model.encoder``, as a candidate: folded batch norm, a five-channel stem."""

from __future__ import annotations

from pathlib import Path

from edge_rsvlm.export.default.model import encoder
from edge_rsvlm.export.default.stages.tflite_weights import convolutions

CHANNELS = {name: encoder.CHANNELS[name] for name in ("c2", "c3", "c4", "c5")}


def build(path: Path) -> encoder.Encoder:
    """The encoder with the weights of the TFLite file at ``path``, without the expansion to 1280 and the classifier.

    Raises ValueError when the file is not a MobileNetV2 1.0.
    """
    built = encoder.Encoder()
    encoder.load_rgb_weights(built, encoder.Head1280(), convolutions(path)[:-1])
    return built
