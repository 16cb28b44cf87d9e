"""Stage 4: images and texts in one space, on cached features of the finished encoder, and the text encoder for all.

The pooled head and the text encoder learn from captions, class names and labels; the text encoder also learns to give
the vectors that the vision stage found for its queries and labels. Shapes: B images and as many texts, D dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from edge_rsvlm.export import artifact
from edge_rsvlm.export.default.data.captions import points_somewhere
from edge_rsvlm.export.default.data.objects import QUERIES
from edge_rsvlm.export.default.data.scenes import UCM_LABELS
from edge_rsvlm.export.default.data.words import class_names, class_words, label_words, sentences
from edge_rsvlm.export.default.loop import ahead, device, train
from edge_rsvlm.export.default.model.encoder import CHANNELS
from edge_rsvlm.export.default.model.pooled import PooledHead
from edge_rsvlm.export.default.model.text import TextEncoder
from edge_rsvlm.export.default.stages import features

NAME = "match"
DEFAULTS: dict[str, Any] = {
    "minutes": 15.0,
    "images": 160,
    "ucm_share": 0.4,
    "class_share": 0.15,
    "label_share": 0.1,
    "rate": 1e-3,
    "dropout": 0.2,
    "seed": 0,
}
FIRST_SCALE, MOST_SCALE = 14.0, 100.0
WORD_TEMPLATES = ("{}", "{}", "a {}", "the {}", "all {}")
Batch = dict[str, Tensor]


class Match(nn.Module):
    """All that this stage trains."""

    def __init__(self, vocabulary: int, dropout: float) -> None:
        super().__init__()
        self.pooled, self.text = PooledHead(dropout), TextEncoder(vocabulary, dropout)
        self.log_scale = nn.Parameter(torch.tensor(FIRST_SCALE).log())


def run(
    data: Path, work: Path, config: dict[str, Any], backbone: artifact.Artifact, vision: artifact.Artifact
) -> artifact.Artifact:
    config = DEFAULTS | config
    digest = artifact.stage_hash(NAME, config, [backbone, vision])
    if found := artifact.find(work / NAME, digest):
        return found
    torch.manual_seed(config["seed"])
    seen = features.of_scenes(data, work, backbone, vision)
    model = Match(seen.tokenizer.get_vocab_size(), config["dropout"])
    features.load_head(model.pooled.head, data)
    model = model.to(device()).train()
    taught = Taught(seen.tokenizer, vision)
    batches = ahead(BatchMaker(seen, config, np.random.default_rng(config["seed"])), depth=4)
    state, metrics = train(
        model, [{"params": list(model.parameters()), "lr": config["rate"]}],
        lambda _: {**matched(model, next(batches)), **taught(model.text)},
        minutes=config["minutes"], checkpoint=work / f"{NAME}-{digest[:12]}.pt",
    )  # fmt: skip
    return artifact.write(work / NAME, NAME, digest, config, metrics, state)


@dataclass
class BatchMaker:
    """Images with a text each, and which of the texts are true of which images; and names of all classes."""

    seen: features.Scenes
    config: dict[str, Any]
    rng: np.random.Generator
    said: list[list[list[str]]] = field(init=False)

    def __post_init__(self) -> None:
        self.said = [[sentences(scene) for scene in part.scenes.scenes] for part in self.seen.parts]

    def __call__(self) -> Batch:
        chosen = [self._image() for _ in range(self.config["images"])]
        texts = [self._text(part, image, view) for part, image, view in chosen]
        holds = self._holds([(part, image) for part, image, _ in chosen], texts)
        pixels = [self.seen.parts[part].store[image, view][: CHANNELS["c5"]] for part, image, view in chosen]
        return {
            "c5": torch.from_numpy(np.stack(pixels)),
            "holds": torch.from_numpy(holds),
            **tokens(self.seen.tokenizer, [text for _, text in texts]),
            **self._classes([(part, image) for part, image, _ in chosen]),
        }

    def _classes(self, images: list[tuple[int, int]]) -> Batch:
        """``class_input_ids`` and ``class_attention_mask`` [K,T] of a name of every class of both sets, ``of_set``
        [B,K] where a name is of the image's own set, and the number ``class`` [B] of the true one."""
        sets = [part.scenes.classes for part in self.seen.parts]
        names = [str(self.rng.choice(class_names(name))) for classes in sets for name in classes]
        set_of = np.repeat(np.arange(len(sets)), [len(classes) for classes in sets])
        first = np.cumsum([0, *map(len, sets[:-1])])
        part = np.array([part for part, _ in images])
        true = [first[p] + self.seen.parts[p].scenes.class_index(image) for p, image in images]
        named = tokens(self.seen.tokenizer, names)
        return {
            **{f"class_{name}": value for name, value in named.items()},
            "of_set": torch.from_numpy(part[:, None] == set_of[None]),
            "class": torch.tensor(true),
        }

    def _image(self) -> tuple[int, int, int]:
        part = 0 if self.rng.random() < self.config["ucm_share"] else 1
        found = self.seen.parts[part]
        return part, int(self.rng.choice(found.usable)), int(self.rng.integers(found.views))

    def _text(self, part: int, image: int, view: int) -> tuple[str, str]:
        """A text and its kind: ``class``, ``label``, or ``caption``, which holds for the view of the image."""
        scene = self.seen.parts[part].scenes.scenes[image]
        draw = self.rng.random()
        if draw < self.config["class_share"]:
            return "class", str(self.rng.choice(class_words(scene)))
        if draw < self.config["class_share"] + self.config["label_share"] and scene.labels:
            return "label", str(self.rng.choice(label_words(str(self.rng.choice(scene.labels)))))
        said = [s for s in self.said[part][image] if view == 0 or not points_somewhere(s)]
        return ("caption", said[int(self.rng.integers(len(said)))]) if said else ("class", class_words(scene)[0])

    def _holds(self, images: list[tuple[int, int]], texts: list[tuple[str, str]]) -> npt.NDArray[np.int8]:
        """[B,B], row by image and column by text: 1 true, 0 false, -1 not known (a label, of an unlabelled image)."""
        holds = np.zeros((len(images), len(texts)), np.int8)
        for row, (part, image) in enumerate(images):
            scene = self.seen.parts[part].scenes.scenes[image]
            true = {"caption": set(self.said[part][image]), "class": set(class_words(scene)),
                    "label": {w for label in scene.labels for w in label_words(label)}}  # fmt: skip
            unknown = not scene.labels
            holds[row] = [1 if t in true[kind] else -1 if kind == "label" and unknown else 0 for kind, t in texts]
        np.fill_diagonal(holds, 1)
        return holds


def tokens(tokenizer: Tokenizer, texts: list[str]) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask`` [N,T], padded on the right."""
    encoded = [e.ids for e in tokenizer.encode_batch(texts, add_special_tokens=False)]
    longest = max(map(len, encoded))
    ids, mask = (np.zeros((len(encoded), longest), np.int64) for _ in range(2))
    for row, numbers in enumerate(encoded):
        ids[row, : len(numbers)], mask[row, : len(numbers)] = numbers, 1
    return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}


def matched(model: Match, batch: Batch) -> dict[str, Tensor]:
    """Cross-entropy over texts of an image and over images of a text (Radford et al. 2021, "CLIP"), with all that is
    true as likely as each other (Khosla et al. 2020, "Supervised Contrastive Learning") and what is unknown left out;
    and over the classes of an image's own set, as ``classify`` will ask.
    """
    where = device()
    batch = {name: value.to(where) for name, value in batch.items()}
    with torch.autocast(where.type, torch.bfloat16):
        images = model.pooled(batch["c5"])
        texts = model.text(batch["input_ids"], batch["attention_mask"])["embedding"]
        classes = model.text(batch["class_input_ids"], batch["class_attention_mask"])["embedding"]
    scale = model.log_scale.exp().clamp(max=MOST_SCALE)
    logits = (_cosines(images, texts) * scale).masked_fill(batch["holds"] < 0, -1e4)
    true = (batch["holds"] > 0).float()
    per_image = (logits.log_softmax(dim=1) * true).sum(dim=1) / true.sum(dim=1)
    per_text = (logits.log_softmax(dim=0) * true).sum(dim=0) / true.sum(dim=0)
    of_class = (_cosines(images, classes) * scale).masked_fill(~batch["of_set"], -1e4)
    return {
        "image": -per_image.mean(),
        "text": -per_text.mean(),
        "class": F.cross_entropy(of_class, batch["class"]),
    }


def _cosines(images_BD: Tensor, texts_TD: Tensor) -> Tensor:
    """[B,T]."""
    return F.normalize(images_BD.float(), dim=1) @ F.normalize(texts_TD.float(), dim=1).T


class Taught:
    """The vectors that the vision stage found, as the text encoder shall give them for each of their words."""

    def __init__(self, tokenizer: Tokenizer, vision: artifact.Artifact) -> None:
        tensors, where = vision.tensors(), device()
        words = {
            "query": [(w, q) for q, query in enumerate(QUERIES) for w in query.words],
            "label": [(w, k) for k, label in enumerate(UCM_LABELS) for w in label_words(label)],
        }
        self._vectors = {"query": tensors["queries"].to(where), "label": tensors["labels"].to(where)}
        self._tokens = {
            space: tokens(tokenizer, [t.format(w) for w, _ in found for t in WORD_TEMPLATES])
            for space, found in words.items()
        }
        self._numbers = {
            space: torch.tensor([n for _, n in found for _ in WORD_TEMPLATES], device=where)
            for space, found in words.items()
        }

    def __call__(self, text: TextEncoder) -> dict[str, Tensor]:
        losses = {}
        for space, vectors in self._vectors.items():
            given = text(**{name: value.to(vectors.device) for name, value in self._tokens[space].items()})[space]
            wanted = F.normalize(vectors[self._numbers[space]].float(), dim=1)
            losses[space] = 2 * (1 - (F.normalize(given.float(), dim=1) * wanted).sum(dim=1)).mean()
        return losses
