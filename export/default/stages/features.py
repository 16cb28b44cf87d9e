"""What the frozen encoder makes of the scene images, computed once for the stages that only read it.

Shapes: N images, V views, C = TOKEN_CHANNELS, h, w cells of c5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Regex, normalizers
from torch import Tensor

from edge_rsvlm.export import artifact
from edge_rsvlm.export.default.data.captions import BOS, EOS, FeatureStore, cached_features, train_tokenizer
from edge_rsvlm.export.default.data.objects import QUERIES
from edge_rsvlm.export.default.data.phrases import every_phrase
from edge_rsvlm.export.default.data.questions import asked
from edge_rsvlm.export.default.data.scenes import UCM_LABELS, SceneSet, rsicd, training_rsicd, training_ucm, ucm
from edge_rsvlm.export.default.data.words import class_words, label_words, sentences
from edge_rsvlm.export.default.model.encoder import Encoder, Head1280
from edge_rsvlm.export.default.model.language import TOKEN_CHANNELS, visual_tokens
from edge_rsvlm.export.default.stages.backbone import FILE
from edge_rsvlm.export.default.stages.tflite_weights import convolutions

VIEWS = {"ucm": 8, "rsicd": 2}
ASK, ANSWER = "<ask>", "<answer>"
SPECIALS = (BOS, EOS, ASK, ANSWER)
"""Tokens that no answer shows."""


@dataclass(frozen=True)
class Part:
    """One set of scenes: its images that may be trained on, and their features in so many views."""

    name: str
    scenes: SceneSet
    usable: npt.NDArray[np.int64]
    views: int
    store: FeatureStore


@dataclass(frozen=True)
class Scenes:
    """Both sets, and the tokenizer of their words and of those of phrases."""

    parts: tuple[Part, ...]
    tokenizer: Any


def of_scenes(data: Path, work: Path, backbone: artifact.Artifact, vision: artifact.Artifact) -> Scenes:
    """UCM and RSICD, whose validation images have features too, but are not usable."""
    encoder = load_encoder(vision)
    parts = []
    for name, (scenes, usable) in _sets(data, work, backbone).items():
        cache = work / "cache" / f"tokens-{name}-{vision.hash[:12]}.f16"
        store = cached_features(encoder, scenes, VIEWS[name], cache, TOKEN_CHANNELS, tokens_of)
        parts.append(Part(name, scenes, usable, VIEWS[name], store))
    return Scenes(tuple(parts), tokenizer(data, work, backbone))


def _sets(data: Path, work: Path, backbone: artifact.Artifact) -> dict[str, tuple[SceneSet, npt.NDArray[np.int64]]]:
    """Scenes by name, and which of them may be trained on."""
    cache = work / "cache"
    of_ucm, of_rsicd = ucm(data, cache), rsicd(data, cache)
    return {"ucm": (of_ucm, training_ucm(of_ucm, backbone)), "rsicd": (of_rsicd, training_rsicd(of_rsicd))}


def tokenizer(data: Path, work: Path, backbone: artifact.Artifact) -> Any:
    """Of all that is said in training, of scenes and of objects; it needs no image."""
    return tokenizer_of([*texts([*_sets(data, work, backbone).values()]), *every_phrase()])


def tokenizer_of(said: Sequence[str]) -> Any:
    """That of all texts, which it reads in lower case and without the marks that end a sentence."""
    made = train_tokenizer(said, SPECIALS)
    marks, spaces = Regex(r"[?!.;:\"]+"), Regex(r"\s+")
    made.normalizer = normalizers.Sequence(
        [
            normalizers.Lowercase(),
            normalizers.Replace(marks, " "),
            normalizers.Replace(spaces, " "),
            normalizers.Strip(),
        ]
    )
    return made


def texts(parts: Sequence[tuple[SceneSet, npt.NDArray[np.int64]]]) -> list[str]:
    """All that is said of scenes in training, one by one: the words that their tasks take are of these."""
    found = [word for query in QUERIES for word in query.words]
    found += [word for label in UCM_LABELS for word in label_words(label)]
    for scenes, usable in parts:
        for i in usable:
            scene = scenes.scenes[int(i)]
            found += [*sentences(scene), *class_words(scene)]
            found += [text.lower() for q in asked(scene) if q.names_its_thing for text in (q.question, q.answer)]
    return found


def tokens_of(maps: dict[str, Tensor]) -> Tensor:
    """What the decoder reads of the encoder's maps."""
    return visual_tokens(maps["c4"], maps["c5"])


def load_encoder(vision: artifact.Artifact) -> Encoder:
    """The encoder that the vision stage trained."""
    encoder = Encoder()
    encoder.load_state_dict(artifact.part(vision.tensors(), "encoder"))
    return encoder.eval()


def load_head(head: Head1280, data: Path) -> None:
    """ImageNet weights of MobileNetV2's last convolution."""
    kernel, bias = convolutions(data / FILE)[-2]
    conv = head.expand.conv
    assert conv.bias is not None
    with torch.no_grad():
        conv.weight.copy_(kernel)
        conv.bias.copy_(bias)
