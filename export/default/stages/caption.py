"""Stage 4: the caption decoder, on cached features of the finished encoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from edge_rsvlm.export import artifact
from edge_rsvlm.export.default.data.captions import (
    BOS_ID,
    EOS_ID,
    FeatureStore,
    cached_features,
    points_somewhere,
    tidy,
    train_tokenizer,
)
from edge_rsvlm.export.default.data.scenes import SceneSet, rsicd, ucm
from edge_rsvlm.export.default.loop import ahead, device, train
from edge_rsvlm.export.default.model.decoder import Captioner, DecoderConfig, packed_layout
from edge_rsvlm.export.default.model.encoder import Encoder
from edge_rsvlm.export.default.stages.joint import load_encoder, training_ucm

NAME = "caption"
DEFAULTS: dict[str, Any] = {
    "minutes": 25.0,
    "images": 48,
    "ucm_share": 0.4,
    "ucm_views": 8,
    "rsicd_views": 3,
    "rate": 1.5e-3,
    "dropout": 0.15,
    "label_smoothing": 0.1,
    "seed": 0,
}
SENTENCES = 3  # of an image's five, at a time: they repeat each other
MOST_TOKENS = 24
IGNORE = -100
TOKENIZER_NAME = "tokenizer.json"
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Part:
    """One set: features, the sentences of each image as tokens (with end), and which hold for every view."""

    features: FeatureStore
    images: np.ndarray
    sentences: list[list[list[int]]]
    turnable: list[list[list[int]]]
    views: int


def run(data: Path, work: Path, config: dict[str, Any], joint: artifact.Artifact) -> artifact.Artifact:
    """Train; the artifact also holds ``tokenizer.json``."""
    config = DEFAULTS | config
    digest = artifact.stage_hash(NAME, config, [joint])
    if found := artifact.find(work / NAME, digest):
        return found
    torch.manual_seed(config["seed"])
    encoder = load_encoder(joint)
    scenes = ucm(data, work / "cache"), rsicd(data, work / "cache")
    chosen = training_ucm(scenes[0], artifact.load(work / "backbone")), np.arange(len(scenes[1]))
    captions = [tidy(c) for part, use in zip(scenes, chosen, strict=True) for i in use for c in part.scenes[i].captions]
    tokenizer = train_tokenizer(captions)
    views = config["ucm_views"], config["rsicd_views"]
    parts = [
        _part(encoder, part, use, count, tokenizer, work / "cache" / f"c5-{name}-{joint.hash[:12]}.f16")
        for name, part, use, count in zip(("ucm", "rsicd"), scenes, chosen, views, strict=True)
    ]
    decoder = DecoderConfig(tokenizer.get_vocab_size(), dropout=config["dropout"])
    model = Captioner(decoder).to(device()).train()
    batches = ahead(_batch_maker(parts, config), depth=4)
    state, metrics = train(
        model,
        [{"params": list(model.parameters()), "lr": config["rate"]}],
        lambda _: {"words": _loss(model, next(batches), config["label_smoothing"])},
        minutes=config["minutes"],
        checkpoint=work / f"{NAME}-{digest[:12]}.pt",
    )
    texts = {TOKENIZER_NAME: tokenizer.to_str()}
    return artifact.write(work / NAME, NAME, digest, config, metrics, state, texts)


def _part(encoder: Encoder, scenes: SceneSet, images: np.ndarray, views: int, tokenizer: Any, cache: Path) -> Part:
    def tokens(captions: list[str]) -> list[list[int]]:
        return [[*e.ids[: MOST_TOKENS - 1], EOS_ID] for e in tokenizer.encode_batch(captions)]

    said = [[tidy(c) for c in scene.captions] for scene in scenes.scenes]
    turnable = [[c for c in captions if not points_somewhere(c)] for captions in said]
    store = cached_features(encoder, scenes, views, cache)
    return Part(store, images, [tokens(c) for c in said], [tokens(c) for c in turnable], views)


def _batch_maker(parts: list[Part], config: dict[str, Any]) -> Callable[[], Batch]:
    rng = np.random.default_rng(config["seed"])

    def make() -> Batch:
        features: list[np.ndarray] = []
        targets: list[list[list[int]]] = []
        while len(features) < config["images"]:
            part = parts[0] if rng.random() < config["ucm_share"] else parts[1]
            image, view = int(rng.choice(part.images)), int(rng.integers(part.views))
            sentences = part.sentences[image] if view == 0 else part.turnable[image]
            if sentences:
                features.append(part.features[image, view])
                targets.append([sentences[k] for k in rng.permutation(len(sentences))[:SENTENCES]])
        return {"c5": torch.from_numpy(np.stack(features)), **_padded(targets)}

    return make


def _padded(targets: list[list[list[int]]]) -> Batch:
    """``tokens`` fed [N, S, T] (with BOS) and ``targets`` expected [N, S, T], IGNORE beyond the end."""
    longest = max(len(s) for sentences in targets for s in sentences)
    shape = (len(targets), SENTENCES, longest)
    fed, expected = np.full(shape, EOS_ID, np.int64), np.full(shape, IGNORE, np.int64)
    for n, sentences in enumerate(targets):
        for s, sentence in enumerate(sentences):
            fed[n, s, : len(sentence)] = [BOS_ID, *sentence[:-1]]
            expected[n, s, : len(sentence)] = sentence
    return {"tokens": torch.from_numpy(fed), "targets": torch.from_numpy(expected)}


def _loss(model: Captioner, batch: Batch, smoothing: float) -> Tensor:
    where = device()
    batch = {name: value.to(where) for name, value in batch.items()}
    count, sentences, length = batch["tokens"].shape
    with torch.autocast(where.type, torch.bfloat16):
        prefix = model.prefix(batch["c5"])
        positions, mask = packed_layout(prefix.shape[1], sentences, length)
        words = model.decoder.embed(batch["tokens"].flatten(1)).to(prefix.dtype)
        positions_NT = positions.to(where).expand(count, -1)
        hidden, _ = model.decoder(torch.cat([prefix, words], dim=1), positions_NT, mask.to(where))
        known = batch["targets"].flatten(1) != IGNORE
        logits = model.decoder.logits(hidden[:, prefix.shape[1] :][known])
    return F.cross_entropy(logits.float(), batch["targets"].flatten(1)[known], label_smoothing=smoothing)
