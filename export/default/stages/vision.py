"""Stage 2: everything that sees: the encoder, the pyramid, boxes by vectors, the dense map, change, scene labels.

Each step sees one batch per task; the sum of the losses moves all weights. Words come later (``match``): here a query
is a vector of its own, and so is a label of the dense map, which the text encoder then learns to give.
Shapes: N tiles, Q queries, F kinds, K labels, h, w cells.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edge_rsvlm.export import artifact
from edge_rsvlm.export.default.data import objects
from edge_rsvlm.export.default.data.absent import AbsentData
from edge_rsvlm.export.default.data.augment import degraded
from edge_rsvlm.export.default.data.change import ChangeData, change_batch, training_pairs
from edge_rsvlm.export.default.data.objects import KINDS, QUERIES, ObjectData
from edge_rsvlm.export.default.data.scenes import (
    CAPTION_WORDS,
    UCM_LABELS,
    SceneSet,
    frequent_words,
    multi_hot,
    rsicd,
    training_rsicd,
    training_ucm,
    ucm,
    word_shares,
)
from edge_rsvlm.export.default.data.trees import TreeData
from edge_rsvlm.export.default.data.views import jitter
from edge_rsvlm.export.default.loop import ahead, device, train
from edge_rsvlm.export.default.losses import change_loss, covered_loss, heat_loss, known_loss, sides_loss
from edge_rsvlm.export.default.model import boxes, dense
from edge_rsvlm.export.default.model.change import ChangeHead
from edge_rsvlm.export.default.model.encoder import Encoder
from edge_rsvlm.export.default.model.pyramid import Pyramid
from edge_rsvlm.export.default.model.scene import SceneHead
from edge_rsvlm.export.default.splits import held_out

NAME = "vision"
DEFAULTS: dict[str, Any] = {
    "minutes": 100.0,
    "crop_px": 256,
    "objects": 6,
    "pairs": 2,
    "scenes": 8,
    "trees": 1,
    "examples": 6,
    "encoder_rate": 1.5e-4,
    "encoder_warmup": 1000,
    "head_rate": 2e-3,
    "seed": 0,
}
"""The encoder starts slowly. At its full rate the gradients of heads that know nothing yet made its coarsest map the
same for all images within 600 steps, and what ImageNet had taught it had to be learnt anew."""
SCENE_LABELS = {"ucm_scene": 21, "ucm_labels": 17, "rsicd_scene": 30, "words": CAPTION_WORDS}
WORDS_WEIGHT = 20.0  # a mean over 400 words of which a dozen are said
COVERED = {"airplane": objects.PLANES, "cars": ("car", "van"), "ship": ("boat",)}
"""Labels of the ground that boxes show too."""
Batch = dict[str, Tensor]


class Vision(nn.Module):
    """All that this stage trains, so that one state dict holds it."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.pyramid, self.change = Encoder(), Pyramid(), ChangeHead()
        self.boxes, self.dense = boxes.BoxHead(), dense.DenseHead()
        self.queries = nn.Parameter(torch.randn(len(QUERIES), boxes.DIMENSIONS) * 0.1)
        self.labels = nn.Parameter(torch.randn(len(UCM_LABELS), dense.DIMENSIONS) * 0.1)
        self.scene = SceneHead(SCENE_LABELS)


def run(data: Path, work: Path, config: dict[str, Any], backbone: artifact.Artifact) -> artifact.Artifact:
    config = DEFAULTS | config
    digest = artifact.stage_hash(NAME, config, [backbone])
    if found := artifact.find(work / NAME, digest):
        return found
    torch.manual_seed(config["seed"])
    model = Vision().to(device(), memory_format=torch.channels_last)
    model.encoder.load_state_dict(backbone.tensors())
    model.train()
    batches = ahead(BatchMaker.of(data, work / "cache", config, backbone), depth=4)
    groups = [
        {"params": list(model.encoder.parameters()), "lr": config["encoder_rate"], "warmup": config["encoder_warmup"]},
        {"params": [p for n, p in model.named_parameters() if not n.startswith("encoder.")], "lr": config["head_rate"]},
    ]
    losses = Losses(model, int(config["examples"]))
    state, metrics = train(
        model, groups, lambda _: losses(next(batches)), minutes=config["minutes"],
        checkpoint=work / f"{NAME}-{digest[:12]}.pt",
    )  # fmt: skip
    return artifact.write(work / NAME, NAME, digest, config, metrics, state)


@dataclass
class BatchMaker:
    """Makes the next batch of every task."""

    config: dict[str, Any]
    rng: np.random.Generator
    sets: list[ObjectData]
    absent: AbsentData
    pairs: ChangeData
    trees: TreeData
    scenes: tuple[SceneSet, SceneSet]
    usable: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]
    words: tuple[str, ...]

    @classmethod
    def of(cls, data: Path, cache: Path, config: dict[str, Any], backbone: artifact.Artifact) -> BatchMaker:
        scenes = ucm(data, cache), rsicd(data, cache)
        usable = training_ucm(scenes[0], backbone), training_rsicd(scenes[1])
        return cls(
            config,
            np.random.default_rng(config["seed"]),
            [ObjectData(spec, data, cache, held_out(spec.name)) for spec in objects.SETS],
            AbsentData(scenes[0], usable[0]),
            ChangeData(training_pairs(data)),
            TreeData(data / "naip_trees", held_out("naip_trees")),
            scenes,
            usable,
            frequent_words([part.scenes[i] for part, chosen in zip(scenes, usable, strict=True) for i in chosen]),
        )

    def __call__(self) -> Batch:
        changes = [self.pairs.sample(self.rng, self.config["crop_px"]) for _ in range(self.config["pairs"])]
        trees = [self.trees.sample(self.rng, self.config["crop_px"]) for _ in range(self.config["trees"])]
        return {
            **self._objects(),
            **change_batch(changes),
            **self._scenes(),
            "tree_tile": torch.from_numpy(np.stack([tile for tile, _ in trees])),
            "tree_known": torch.from_numpy(np.stack([known for _, known in trees])),
        }

    def _objects(self) -> Batch:
        share = np.array([*(d.spec.weight for d in self.sets), self.absent.weight])
        chosen = self.rng.choice(len(share), self.config["objects"], p=share / share.sum())
        made = [
            self.sets[i].sample(self.rng, self.config["crop_px"])
            if i < len(self.sets)
            else self.absent.sample(self.rng)
            for i in map(int, chosen)
        ]
        peaks = [np.insert(t.peaks, 0, n, axis=1) for n, (_, t) in enumerate(made)]
        names = ("heat", "trust", "sides", "sides_weight")
        return {
            "object_tile": torch.from_numpy(np.stack([tile for tile, _ in made])),
            "object_peaks": torch.from_numpy(self._examples(np.concatenate(peaks))),
            **{f"object_{n}": torch.from_numpy(np.stack([getattr(t, n) for _, t in made])) for n in names},
        }

    def _examples(self, peaks: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Some of the objects [E,4] (tile, kind, row, column), rare kinds as likely as frequent ones."""
        if not len(peaks):
            return peaks
        counts = np.bincount(peaks[:, 1], minlength=len(KINDS))
        chance = 1 / counts[peaks[:, 1]]
        count = min(self.config["examples"], len(peaks))
        return peaks[self.rng.choice(len(peaks), count, replace=False, p=chance / chance.sum())]

    def _scenes(self) -> Batch:
        """Half UCM, half RSICD; labels of the other set are absent and marked by -1."""
        tiles, ucm_scene, rsicd_scene, labels, said = [], [], [], [], []
        for k in range(self.config["scenes"]):
            from_ucm = k % 2 == 0
            part, usable = self.scenes[k % 2], self.usable[k % 2]
            i = int(self.rng.choice(usable))
            zoom, shift = float(self.rng.uniform(1.0, 1.3)), self.rng.uniform(-1, 1, 2)
            light = jitter(self.rng, 0.15, 0.05, 0.03)
            tile = part.tile(i, int(self.rng.integers(8)), light, zoom, *map(float, shift))
            tiles.append(degraded(self.rng, tile))
            said.append(word_shares(part.scenes[i], self.words))
            ucm_scene.append(part.class_index(i) if from_ucm else -1)
            rsicd_scene.append(-1 if from_ucm else part.class_index(i))
            labels.append(multi_hot(part.scenes[i]) if from_ucm else np.full(len(UCM_LABELS), -1, np.float32))
        return {
            "scene_tile": torch.from_numpy(np.stack(tiles)),
            "scene_ucm_scene": torch.tensor(ucm_scene),
            "scene_rsicd_scene": torch.tensor(rsicd_scene),
            "scene_words": torch.from_numpy(np.stack(said)),
            "scene_ucm_labels": torch.from_numpy(np.stack(labels)),
        }


class Losses:
    """Losses of a batch; matrix products in bfloat16, losses in float32."""

    def __init__(self, model: Vision, examples: int) -> None:
        self._model, self._examples = model, examples
        where = device()
        self._queries = [torch.from_numpy(mask).to(where) for mask in objects.query_tables()]
        self._kinds = [torch.from_numpy(mask).to(where) for mask in objects.example_tables()]

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        where = device()
        batch = {name: value.to(where, non_blocking=True) for name, value in batch.items()}
        with torch.autocast(where.type, torch.bfloat16):
            pyramid = self._model.pyramid(self._encoded(batch["object_tile"]))
            found = self._model.boxes(pyramid["p2"])
            shown = self._model.dense(pyramid["p3"])
            scene_maps = self._encoded(batch["scene_tile"])
            scene = self._model.scene(scene_maps["c5"])
            scene_dense = self._dense(scene_maps)
            tree_dense = self._dense(self._encoded(batch["tree_tile"]))
            change = self._change(batch)
        return {
            **self._objects(batch, found),
            "change": change_loss(change.float()[:, 0], batch["change_mask"]),
            **self._scenes(batch, scene),
            "dense": self._ground(batch, scene_dense, tree_dense, shown),
        }

    def _encoded(self, tiles: Tensor, last: str = "c5") -> dict[str, Tensor]:
        maps: dict[str, Tensor] = self._model.encoder(tiles.contiguous(memory_format=torch.channels_last), last=last)
        return maps

    def _dense(self, maps: dict[str, Tensor]) -> Tensor:
        out: Tensor = self._model.dense(self._model.pyramid(maps, last="c3")["p3"])
        return out

    def _change(self, batch: Batch) -> Tensor:
        dates = self._encoded(torch.cat([batch["change_before"], batch["change_after"]]), last="c4")
        half = len(batch["change_before"])
        out: Tensor = self._model.change(
            {k: v[:half] for k, v in dates.items()}, {k: v[half:] for k, v in dates.items()}
        )
        return out

    def _objects(self, batch: Batch, found: boxes.Found) -> dict[str, Tensor]:
        heat, trust = asked(batch["object_heat"], batch["object_trust"], *self._queries)
        losses = {
            "heat": heat_loss(found.logits(self._model.queries), heat, trust),
            "sides": 2 * sides_loss(found.log_sides.float(), batch["object_sides"], batch["object_sides_weight"]),
        }
        tile, kind, row, column = batch["object_peaks"].T
        if len(kind):
            like = boxes.unit(found.embeddings)[tile, :, row, column]
            heat, trust = asked(batch["object_heat"], batch["object_trust"], *(table[kind] for table in self._kinds))
            around_itself(trust, tile, row, column)
            losses["like"] = 0.5 * heat_loss(found.logits(like), heat, trust)
        return losses

    def _scenes(self, batch: Batch, scene: dict[str, Tensor]) -> dict[str, Tensor]:
        known = batch["scene_ucm_labels"] >= 0
        words = F.binary_cross_entropy_with_logits(scene["words"].float(), batch["scene_words"])
        return {
            "words": WORDS_WEIGHT * words,
            "scene": 0.5 * F.cross_entropy(scene["ucm_scene"].float(), batch["scene_ucm_scene"], ignore_index=-1)
            + 0.5 * F.cross_entropy(scene["rsicd_scene"].float(), batch["scene_rsicd_scene"], ignore_index=-1)
            + F.binary_cross_entropy_with_logits(scene["ucm_labels"].float()[known], batch["scene_ucm_labels"][known]),
        }

    def _ground(self, batch: Batch, scenes: Tensor, trees: Tensor, shown: Tensor) -> Tensor:
        """The dense map from labels of whole images, from tree points, and from boxes."""
        model = self._model
        known = batch["scene_ucm_labels"][:, 0] >= 0
        tree = UCM_LABELS.index("trees")
        loss = covered_loss(model.dense.logits(scenes[known], model.labels), batch["scene_ucm_labels"][known])
        loss = loss + known_loss(model.dense.logits(trees, model.labels[[tree]])[:, 0], batch["tree_known"])
        logits = model.dense.logits(shown, model.labels[[UCM_LABELS.index(label) for label in COVERED]])
        return loss + known_loss(logits, covered_by(batch["object_heat"], batch["object_trust"]))


def asked(heat_NFhw: Tensor, trust_NFhw: Tensor, kinds_QF: Tensor, unsure_QF: Tensor) -> tuple[Tensor, Tensor]:
    """Heat and its weight [N,Q,h,w] of queries that mean some kinds and cannot tell for others."""
    heat = torch.stack([heat_NFhw[:, kinds].amax(dim=1) for kinds in kinds_QF], dim=1)
    trust = torch.stack([trust_NFhw[:, kinds].all(dim=1) for kinds in kinds_QF], dim=1)
    other = torch.stack([(heat_NFhw * unsure[None, :, None, None]).amax(dim=1) for unsure in unsure_QF], dim=1)
    return heat, ((trust & (other < 0.01)) | (heat == 1)).float()


def around_itself(trust_NEhw: Tensor, tile: Tensor, row: Tensor, column: Tensor, radius: int = 1) -> None:
    """An example is no evidence for what looks like itself: the cells around it do not count."""
    for example, (n, i, j) in enumerate(zip(tile.tolist(), row.tolist(), column.tolist(), strict=True)):
        rows, columns = (slice(max(k - radius, 0), k + radius + 1) for k in (i, j))
        trust_NEhw[n, example, rows, columns] = 0


def covered_by(heat_NFhw: Tensor, trust_NFhw: Tensor) -> Tensor:
    """Per label of COVERED and cell of the dense map [N,C,h/2,w/2]: 1 with such an object, 0 without, -1 unknown."""
    ratio = dense.STRIDE // boxes.STRIDE
    parts = []
    for kinds in COVERED.values():
        chosen = [KINDS.index(kind) for kind in kinds]
        heat = F.max_pool2d(heat_NFhw[:, chosen].amax(dim=1, keepdim=True), ratio)
        trust = -F.max_pool2d(-trust_NFhw[:, chosen].all(dim=1, keepdim=True).float(), ratio)
        parts.append(torch.where(heat > 0.5, 1.0, torch.where((trust > 0) & (heat < 0.01), 0.0, -1.0)))
    return torch.cat(parts, dim=1)
