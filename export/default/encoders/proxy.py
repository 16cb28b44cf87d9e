"""The proxy task of the comparison: scene classes, UCM's labels and centres of objects, in so many minutes of one core.

Shapes: N tiles, C channels, H, W tile pixels (256), K = 2 groups of classes. Both kinds of tile go through the encoder
in one batch, so that its norms see the same mixture in every step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edge_rsvlm.export import artifact
from edge_rsvlm.export.default.data.scenes import SceneSet, multi_hot, rsicd, training_ucm, ucm
from edge_rsvlm.export.default.data.views import jitter
from edge_rsvlm.export.default.encoders.centres import CLASSES, SETS, DetectData
from edge_rsvlm.export.default.loop import MAX_GRADIENT_NORM, WARMUP_STEPS, Averaged, ahead, rate
from edge_rsvlm.export.default.losses import heat_loss
from edge_rsvlm.export.default.model.layers import ConvNormAct, upsample2
from edge_rsvlm.export.default.splits import held_out

GROUPS = {"airplane": ("airplane",), "vehicle": ("car", "truck", "bus", "van")}
LABELS = {"ucm_scene": 21, "rsicd_scene": 30, "ucm_labels": 17}
BACKBONE = Path(__file__).parents[1] / "weights" / "backbone"
CROP_PX, DETECT_BATCH, SCENE_BATCH = 256, 6, 6
ENCODER_RATE, HEAD_RATE = 3e-4, 2e-3
PRIOR_SCORE = 0.01
WARM_UP_SHARE = 0.1
WIDTH = 48
SCENE_SUM = 320.0
"""Of the spreads of a scene head's inputs: that of the 320 channels which the learning rate was chosen on."""
REPORT_EVERY_S = 30.0
Batch = dict[str, Tensor]


class DenseHead(nn.Module):
    """Maps c2..c5 -> centre logits [N,K,H/4,W/4]: summed from stride 32 to 8, a 3x3 there, a 3x3 at stride 4."""

    def __init__(self, channels: dict[str, int]) -> None:
        super().__init__()
        self.lateral = nn.ModuleDict({name: ConvNormAct(c, WIDTH) for name, c in channels.items()})
        self.stride8, self.stride4 = ConvNormAct(WIDTH, WIDTH, 3), ConvNormAct(WIDTH, WIDTH, 3)
        self.score = nn.Conv2d(WIDTH, len(GROUPS), 1)
        nn.init.normal_(self.score.weight, std=0.01)
        nn.init.constant_(self.score.bias, -math.log(1 / PRIOR_SCORE - 1))

    def forward(self, maps: dict[str, Tensor]) -> Tensor:
        x = self.lateral["c5"](maps["c5"])
        for name in ("c4", "c3"):
            x = self.lateral[name](maps[name]) + upsample2(x)
        x = self.lateral["c2"](maps["c2"]) + upsample2(self.stride8(x))
        return self.score(self.stride4(x))


class Proxy(nn.Module):
    """An encoder with the heads of the proxy task.

    Scene heads read c5's mean in units of its spread over ``scenes`` [N,5,H,W]: the encoders' differ seventyfold, and
    an optimizer that moves all weights alike would hardly train a head on a small one.
    """

    def __init__(self, encoder: nn.Module, channels: dict[str, int], scenes: Sequence[Tensor]) -> None:
        super().__init__()
        self.encoder, self.dense, self.drop = encoder, DenseHead(channels), nn.Dropout(0.2)
        self.scene = nn.ModuleDict({name: nn.Linear(channels["c5"], size) for name, size in LABELS.items()})
        with torch.inference_mode():
            encoder.eval()
            pooled = torch.cat([encoder(batch)["c5"].mean(dim=(2, 3)) for batch in scenes])
        self.register_buffer("centre", pooled.mean(dim=0).clone())
        # A logit moves by the sum over channels: the same sum for all widths.
        self.register_buffer("gain", SCENE_SUM / channels["c5"] / (pooled.std(dim=0) + 1e-3 * pooled.std()))

    def scene_logits(self, c5: Tensor) -> dict[str, Tensor]:
        return self.labels(c5.mean(dim=(2, 3)))

    def labels(self, pooled: Tensor) -> dict[str, Tensor]:
        """Logits of each label set from c5's mean [N,D]."""
        pooled = self.drop((pooled - self.centre) * self.gain)
        return {name: layer(pooled) for name, layer in self.scene.items()}


def grouped(planes_Khw: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Heat or weight of the model's classes [7,h,w] -> of GROUPS [2,h,w], the largest of each group."""
    return np.stack([planes_Khw[[CLASSES.index(c) for c in members]].max(axis=0) for members in GROUPS.values()])


def usable_ucm(scenes: SceneSet) -> npt.NDArray[np.int64]:
    """Indices of UCM images that may be trained on."""
    return training_ucm(scenes, artifact.load(BACKBONE))


def batch_maker(data: Path, cache: Path, seed: int = 0) -> Callable[[], Batch]:
    """A function that makes the next batch: crops with centres, then scenes, half UCM and half RSICD."""
    rng = np.random.default_rng(seed)
    sets = [DetectData(spec, data, cache, held_out(spec.name)) for spec in SETS]
    share = np.array([d.spec.weight for d in sets])
    parts = ucm(data, cache), rsicd(data, cache)
    usable = usable_ucm(parts[0]), np.arange(len(parts[1]))

    def make() -> Batch:
        chosen = rng.choice(len(sets), DETECT_BATCH, p=share / share.sum())
        examples = [sets[int(i)].sample(rng, CROP_PX) for i in chosen]
        tiles, labels = [e.tile for e in examples], []
        for k in range(SCENE_BATCH):
            part, i = parts[k % 2], int(rng.choice(usable[k % 2]))
            zoom, shift = float(rng.uniform(1.0, 1.3)), rng.uniform(-1, 1, 2)
            tiles.append(part.tile(i, int(rng.integers(8)), jitter(rng, 0.15, 0.05, 0.03), zoom, *map(float, shift)))
            labels.append((part.class_index(i), multi_hot(part.scenes[i])))
        classes = torch.tensor([c for c, _ in labels])
        return {
            "tiles": torch.from_numpy(np.stack(tiles)),
            "heat": torch.from_numpy(np.stack([grouped(e.heat) for e in examples])),
            "weight": torch.from_numpy(np.stack([grouped(e.weight) for e in examples])),
            "ucm_scene": classes[0::2],
            "rsicd_scene": classes[1::2],
            "ucm_labels": torch.from_numpy(np.stack([said for _, said in labels[0::2]])),
        }

    return make


def step_losses(model: Proxy, batch: Batch) -> dict[str, Tensor]:
    """Losses of one batch; products in bfloat16, losses in float32."""
    with torch.autocast("cpu", torch.bfloat16):
        maps = model.encoder(batch["tiles"].contiguous(memory_format=torch.channels_last))
        logits = model.dense({name: value[:DETECT_BATCH] for name, value in maps.items()})
        scene = model.scene_logits(maps["c5"][DETECT_BATCH:])
    return {
        "heat": heat_loss(logits.float(), batch["heat"], batch["weight"]),
        "scene": 0.5 * F.cross_entropy(scene["ucm_scene"][0::2].float(), batch["ucm_scene"])
        + 0.5 * F.cross_entropy(scene["rsicd_scene"][1::2].float(), batch["rsicd_scene"]),
        "labels": F.binary_cross_entropy_with_logits(scene["ucm_labels"][0::2].float(), batch["ucm_labels"]),
    }


def finetune(model: Proxy, make: Callable[[], Batch], minutes: float) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Train for ``minutes`` of processor time; returns averaged weights and what was seen.

    Processor time, with the making of batches in it, is the same budget on a busy machine as on an idle one.
    """
    model.to(memory_format=torch.channels_last).train()
    heads = [p for name, p in model.named_parameters() if not name.startswith("encoder.")]
    optimizer = torch.optim.AdamW(
        [{"params": list(model.encoder.parameters()), "lr": ENCODER_RATE}, {"params": heads, "lr": HEAD_RATE}],
        weight_decay=0.01, betas=(0.9, 0.98),
    )  # fmt: skip
    peaks, average, batches = [ENCODER_RATE, HEAD_RATE], Averaged(model), ahead(make, depth=2)
    step, seen, reported, begun = 0, dict[str, float](), 0.0, time.process_time()
    while (spent := time.process_time() - begun) < minutes * 60:
        progress = spent / (minutes * 60)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            # The warm-up is a share of the budget: in steps, a slow candidate would spend more of its time on it.
            group["lr"] = peak * rate(progress, int(progress / WARM_UP_SHARE * WARMUP_STEPS))
        losses = step_losses(model, next(batches))
        optimizer.zero_grad(set_to_none=True)
        torch.stack(list(losses.values())).sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
        optimizer.step()
        average.update()
        step += 1
        seen = {name: 0.98 * seen.get(name, loss.item()) + 0.02 * loss.item() for name, loss in losses.items()}
        if spent - reported > REPORT_EVERY_S:
            reported = spent
            print(f"{spent / 60:6.1f} of {minutes:g} min, step {step}: {seen}", flush=True)
    return average.state, {"steps": float(step), **{f"loss_{name}": round(v, 4) for name, v in seen.items()}}
