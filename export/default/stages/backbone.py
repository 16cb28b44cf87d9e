"""Stage 1: ImageNet weights of MobileNetV2 1.0, dequantised from TFLite, checked by a linear probe on UCM scenes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from edge_rsvlm.export import artifact
from edge_rsvlm.export.default.data.scenes import TILE_PX, SceneSet, ucm
from edge_rsvlm.export.default.data.views import RGB_BANDS, U8_RANGE, cut
from edge_rsvlm.export.default.model.encoder import Encoder, Head1280, load_rgb_weights
from edge_rsvlm.export.default.splits import by_hash, near_duplicates
from edge_rsvlm.export.default.stages.tflite_weights import convolutions

NAME = "backbone"
FILE = Path("backbones") / "tf2_mobilenet_v2_1.0_224_ptq.tflite"
BATCH = 32


def run(data: Path, work: Path, config: dict[str, Any]) -> artifact.Artifact:
    """Import the weights; metrics hold the accuracy of a probe on c5 and on the 1280-channel expansion.

    ``ucm_left_out`` names the UCM training images that show the same place as a validation image: later stages must
    not train on them.
    """
    digest = artifact.stage_hash(NAME, config, [])
    if found := artifact.find(work / NAME, digest):
        return found
    encoder, head = Encoder().eval(), Head1280().eval()
    # The last convolution of the file is the ImageNet classifier.
    load_rgb_weights(encoder, head, convolutions(data / FILE)[:-1])
    scenes = ucm(data, work / "cache")
    narrow, wide = pooled(scenes, encoder, head)
    labels = np.array([scenes.class_index(i) for i in range(len(scenes))])
    test = by_hash([s.name for s in scenes.scenes], 0.2)
    validation = np.array([s.source == "ucm_val" for s in scenes.scenes])
    left_out = np.flatnonzero(near_duplicates(wide, validation))
    metrics = {
        "ucm_probe_c5": probe(narrow, labels, test),
        "ucm_probe_1280": probe(wide, labels, test),
        "ucm_left_out": [scenes.scenes[i].name for i in left_out],
    }
    return artifact.write(work / NAME, NAME, digest, config, metrics, encoder.state_dict())


@torch.inference_mode()
def pooled(
    scenes: SceneSet, encoder: Encoder, head: Head1280
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Mean c5 [N,320] and mean 1280-channel map [N,1280] of every whole image."""
    narrow, wide = [], []
    for start in range(0, len(scenes), BATCH):
        tiles = np.stack([scenes.tile(i) for i in range(start, min(start + BATCH, len(scenes)))])
        c5 = encoder(torch.from_numpy(tiles))["c5"]
        narrow.append(c5.mean(dim=(2, 3)).numpy())
        wide.append(head(c5).mean(dim=(2, 3)).numpy())
    return np.concatenate(narrow), np.concatenate(wide)


@torch.inference_mode()
def whole_image_features(
    backbone: artifact.Artifact, images: Sequence[npt.NDArray[np.uint8]]
) -> npt.NDArray[np.float32]:
    """Mean c5 [N,320] of whole images [H,W,3] of any size, each stretched to one tile."""
    encoder = Encoder().eval()
    encoder.load_state_dict(backbone.tensors())
    found = []
    for image in images:
        box = (0.0, 0.0, float(image.shape[1]), float(image.shape[0]))
        tile = cut(image, box, (TILE_PX, TILE_PX), RGB_BANDS, U8_RANGE)
        found.append(encoder(torch.from_numpy(tile)[None])["c5"].mean(dim=(2, 3)).numpy()[0])
    return np.stack(found)


def probe(
    features_ND: npt.NDArray[np.float32], labels_N: npt.NDArray[np.int64], test_N: npt.NDArray[np.bool_]
) -> float:
    """Accuracy on the test part of a ridge regression to one-hot labels, fitted on the rest."""
    x = (features_ND - features_ND[~test_N].mean(axis=0)) / (features_ND[~test_N].std(axis=0) + 1e-6)
    x = np.hstack([x, np.ones((len(x), 1))])
    y = np.eye(labels_N.max() + 1)[labels_N]
    a = x[~test_N]
    weights = np.linalg.solve(a.T @ a + 100 * np.eye(a.shape[1]), a.T @ y[~test_N])
    return float(((x[test_N] @ weights).argmax(axis=1) == labels_N[test_N]).mean())
