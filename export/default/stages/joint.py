"""Stage 2: the encoder with its detect and change heads, and scene labels that keep it good for captions.

Each step sees one batch per task; the sum of the losses moves all weights. Batch norm exists only in the heads.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edge_rsvlm.export import artifact
from edge_rsvlm.export.default.data.change import ChangeData, change_batch, training_pairs
from edge_rsvlm.export.default.data.detect import SETS, DetectData, Example
from edge_rsvlm.export.default.data.scenes import (
    CAPTION_WORDS,
    SceneSet,
    frequent_words,
    multi_hot,
    rsicd,
    ucm,
    word_shares,
)
from edge_rsvlm.export.default.data.views import jitter
from edge_rsvlm.export.default.loop import ahead, device, train
from edge_rsvlm.export.default.losses import change_loss, heat_loss, sides_loss
from edge_rsvlm.export.default.model.change import ChangeHead
from edge_rsvlm.export.default.model.detect import DetectHead
from edge_rsvlm.export.default.model.encoder import Encoder
from edge_rsvlm.export.default.model.scene import SceneHead
from edge_rsvlm.export.default.splits import held_out

NAME = "joint"
DEFAULTS: dict[str, Any] = {
    "minutes": 50.0,
    "crop_px": 256,
    "detect_batch": 8,
    "change_batch": 3,
    "scene_batch": 6,
    "encoder_rate": 3e-4,
    "head_rate": 2e-3,
    "seed": 0,
}
SCENE_LABELS = {"ucm_scene": 21, "ucm_labels": 17, "rsicd_scene": 30, "words": CAPTION_WORDS}
WORDS_WEIGHT = 20.0  # a mean over 400 words of which a dozen are said
Batch = dict[str, Tensor]


class Joint(nn.Module):
    """All that this stage trains, so that one state dict holds it."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.detect, self.change = Encoder(), DetectHead(), ChangeHead()
        self.scene = SceneHead(SCENE_LABELS)


def load_encoder(joint: artifact.Artifact) -> Encoder:
    """The encoder that this stage trained."""
    encoder = Encoder()
    encoder.load_state_dict(artifact.part(joint.tensors(), "encoder"))
    return encoder.eval()


def training_ucm(scenes: SceneSet, backbone: artifact.Artifact) -> np.ndarray:
    """Indices of the UCM images that may be trained on: neither validation nor the same place as one of those."""
    left_out = set(backbone.metrics["ucm_left_out"])
    return np.array([i for i, s in enumerate(scenes.scenes) if s.source == "ucm_train" and s.name not in left_out])


def run(data: Path, work: Path, config: dict[str, Any], backbone: artifact.Artifact) -> artifact.Artifact:
    config = DEFAULTS | config
    digest = artifact.stage_hash(NAME, config, [backbone])
    if found := artifact.find(work / NAME, digest):
        return found
    torch.manual_seed(config["seed"])
    model = Joint().to(device(), memory_format=torch.channels_last)
    model.encoder.load_state_dict(backbone.tensors())
    model.train()
    batches = ahead(batch_maker(data, work / "cache", config, backbone), depth=4)
    groups = [
        {"params": list(model.encoder.parameters()), "lr": config["encoder_rate"]},
        {"params": [p for n, p in model.named_parameters() if not n.startswith("encoder.")], "lr": config["head_rate"]},
    ]
    checkpoint = work / f"{NAME}-{digest[:12]}.pt"
    state, metrics = train(
        model, groups, lambda _: step_losses(model, next(batches)), minutes=config["minutes"], checkpoint=checkpoint
    )
    return artifact.write(work / NAME, NAME, digest, config, metrics, state)


def batch_maker(data: Path, cache: Path, config: dict[str, Any], backbone: artifact.Artifact) -> Callable[[], Batch]:
    """A function that makes the next batch of every task."""
    rng = np.random.default_rng(config["seed"])
    sets = [DetectData(spec, data, cache, held_out(spec.name)) for spec in SETS]
    share = np.array([d.spec.weight for d in sets])
    pairs = ChangeData(training_pairs(data))
    scenes = ucm(data, cache), rsicd(data, cache)
    ucm_train = training_ucm(scenes[0], backbone)
    words = frequent_words([*(scenes[0].scenes[i] for i in ucm_train), *scenes[1].scenes])

    def make() -> Batch:
        chosen = rng.choice(len(sets), config["detect_batch"], p=share / share.sum())
        examples = [sets[int(i)].sample(rng, config["crop_px"]) for i in chosen]
        changes = [pairs.sample(rng, config["crop_px"]) for _ in range(config["change_batch"])]
        return {
            **_detect_batch(examples),
            **change_batch(changes),
            **_scene_batch(rng, scenes, ucm_train, words, config),
        }

    return make


def _detect_batch(examples: list[Example]) -> Batch:
    names = ("tile", "heat", "weight", "sides", "sides_weight")
    return {f"detect_{n}": torch.from_numpy(np.stack([getattr(e, n) for e in examples])) for n in names}


def _scene_batch(
    rng: np.random.Generator,
    scenes: tuple[SceneSet, SceneSet],
    ucm_train: np.ndarray,
    words: tuple[str, ...],
    config: dict[str, Any],
) -> Batch:
    """Half UCM, half RSICD; labels of the other set are absent and marked by -1."""
    tiles, ucm_scene, rsicd_scene, labels, said = [], [], [], [], []
    for k in range(config["scene_batch"]):
        from_ucm = k % 2 == 0
        part = scenes[0] if from_ucm else scenes[1]
        i = int(rng.choice(ucm_train)) if from_ucm else int(rng.integers(len(part)))
        zoom, shift = float(rng.uniform(1.0, 1.3)), rng.uniform(-1, 1, 2)
        tiles.append(part.tile(i, int(rng.integers(8)), jitter(rng, 0.15, 0.05, 0.03), zoom, *map(float, shift)))
        said.append(word_shares(part.scenes[i], words))
        ucm_scene.append(part.class_index(i) if from_ucm else -1)
        rsicd_scene.append(-1 if from_ucm else part.class_index(i))
        labels.append(multi_hot(part.scenes[i]) if from_ucm else np.full(SCENE_LABELS["ucm_labels"], -1, np.float32))
    return {
        "scene_tile": torch.from_numpy(np.stack(tiles)),
        "scene_ucm_scene": torch.tensor(ucm_scene),
        "scene_rsicd_scene": torch.tensor(rsicd_scene),
        "scene_words": torch.from_numpy(np.stack(said)),
        "scene_ucm_labels": torch.from_numpy(np.stack(labels)),
    }


def step_losses(model: Joint, batch: Batch) -> dict[str, Tensor]:
    """Losses of one batch per task; matrix products in bfloat16, losses in float32."""
    where = device()
    batch = {name: value.to(where, non_blocking=True) for name, value in batch.items()}

    def tiles(name: str) -> Tensor:
        return batch[name].contiguous(memory_format=torch.channels_last)

    with torch.autocast(where.type, torch.bfloat16):
        logits, log_sides = model.detect(model.encoder(tiles("detect_tile")))
        dates = model.encoder(torch.cat([tiles("change_before"), tiles("change_after")]), last="c4")
        half = len(batch["change_before"])
        change = model.change({k: v[:half] for k, v in dates.items()}, {k: v[half:] for k, v in dates.items()})
        scene = model.scene(model.encoder(tiles("scene_tile"))["c5"])
    known = batch["scene_ucm_labels"] >= 0
    return {
        "heat": heat_loss(logits.float(), batch["detect_heat"], batch["detect_weight"]),
        "sides": 2 * sides_loss(log_sides.float(), batch["detect_sides"], batch["detect_sides_weight"]),
        "change": change_loss(change.float()[:, 0], batch["change_mask"]),
        "words": WORDS_WEIGHT * F.binary_cross_entropy_with_logits(scene["words"].float(), batch["scene_words"]),
        "scene": 0.5 * F.cross_entropy(scene["ucm_scene"].float(), batch["scene_ucm_scene"], ignore_index=-1)
        + 0.5 * F.cross_entropy(scene["rsicd_scene"].float(), batch["scene_rsicd_scene"], ignore_index=-1)
        + F.binary_cross_entropy_with_logits(scene["ucm_labels"].float()[known], batch["scene_ucm_labels"][known]),
    }
