"""Stage 3: the change head alone, on the frozen encoder: the vision stage sees few of the few change pairs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edge_rsvlm.export import artifact
from edge_rsvlm.export.default.data.change import ChangeData, change_batch, training_pairs
from edge_rsvlm.export.default.loop import ahead, device, train
from edge_rsvlm.export.default.losses import change_loss
from edge_rsvlm.export.default.model.change import ChangeHead
from edge_rsvlm.export.default.model.encoder import Encoder
from edge_rsvlm.export.default.stages.features import load_encoder

NAME = "change"
DEFAULTS: dict[str, Any] = {"minutes": 10.0, "crop_px": 256, "pairs": 8, "rate": 1e-3, "seed": 2}
Batch = dict[str, Tensor]


def run(data: Path, work: Path, config: dict[str, Any], vision: artifact.Artifact) -> artifact.Artifact:
    """The head's weights, started from the vision stage's."""
    config = DEFAULTS | config
    digest = artifact.stage_hash(NAME, config, [vision])
    if found := artifact.find(work / NAME, digest):
        return found
    torch.manual_seed(config["seed"])
    encoder = load_encoder(vision).to(device(), memory_format=torch.channels_last)
    head = ChangeHead()
    head.load_state_dict(artifact.part(vision.tensors(), "change"))
    head = head.to(device(), memory_format=torch.channels_last).train()
    batches = ahead(batch_maker(data, config), depth=4)
    state, metrics = train(
        head,
        [{"params": list(head.parameters()), "lr": config["rate"]}],
        lambda _: {"change": step_loss(encoder, head, next(batches))},
        minutes=config["minutes"],
        checkpoint=work / f"{NAME}-{digest[:12]}.pt",
    )
    return artifact.write(work / NAME, NAME, digest, config, metrics, state)


def batch_maker(data: Path, config: dict[str, Any]) -> Callable[[], Batch]:
    rng = np.random.default_rng(config["seed"])
    pairs = ChangeData(training_pairs(data))
    return lambda: change_batch([pairs.sample(rng, config["crop_px"]) for _ in range(config["pairs"])])


def step_loss(encoder: Encoder, head: ChangeHead, batch: Batch) -> Tensor:
    where = device()
    batch = {name: value.to(where, non_blocking=True) for name, value in batch.items()}
    count = len(batch["change_before"])
    dates = torch.cat([batch["change_before"], batch["change_after"]]).contiguous(memory_format=torch.channels_last)
    with torch.autocast(where.type, torch.bfloat16):
        with torch.no_grad():
            maps = encoder(dates, last="c4")
        logits = head({k: v[:count] for k, v in maps.items()}, {k: v[count:] for k, v in maps.items()})
    return change_loss(logits.float()[:, 0], batch["change_mask"])
