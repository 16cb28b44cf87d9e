"""Dual encoders as teacher and student: embeddings of images and texts, and the similarities of a batch.

Letters: B images of a batch, N of this process's share, D width of the embeddings.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edge_rsvlm.config import inputs
from edge_rsvlm.errors import InputError, UsageError
from edge_rsvlm.export.distilling.losses import add_gradients, feature_distance, feature_map, similarity_divergence
from edge_rsvlm.export.distilling.recipe import DistillRecipe
from edge_rsvlm.export.families.base import Source
from edge_rsvlm.export.families.dual_encoder import DualEncoder, ImageEmbedding, TextEmbedding, text_inputs
from edge_rsvlm.export.families.image_processors import load_image_processor
from edge_rsvlm.export.families.tokenizers import FILE
from edge_rsvlm.export.finetuning.loop import Process
from edge_rsvlm.export.finetuning.samples import Sample, open_image
from edge_rsvlm.tasks.text import Texts


class PairEncoder:
    """Images and texts to tensors, by what a family says of a checkpoint."""

    def __init__(self, source: Source, family: DualEncoder) -> None:
        described = family.describe(source)
        self.score = family.score
        self._names = [given.name for given in text_inputs(family.masked_text)]
        self._processor = load_image_processor(source.folder)
        spec = inputs.Tokenizer.model_validate(described.tasks["classify"]["text"]["tokenizer"])
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / FILE
            file.write_bytes(described.files[FILE])
            self._texts = Texts(spec, file)

    def images(self, samples: list[Sample]) -> Tensor:
        """[N, 3, H, W]; raises InputError for an image that cannot be read."""
        tiles = [self._processor(open_image(s), return_tensors="pt")["pixel_values"] for s in samples]
        return torch.cat(tiles)

    def texts(self, samples: list[Sample]) -> dict[str, Tensor]:
        """Inputs of the text model, [N, S]."""
        encoded = self._texts.encode([str(sample.answer) for sample in samples])
        return {name: torch.from_numpy(encoded[name]) for name in self._names}


class Pairs:
    """A dual encoder; one in float32 computes in bfloat16 where a GPU does."""

    def __init__(self, model: Any, encoder: PairEncoder, device: torch.device) -> None:
        self.model, self.encoder, self._device = model, encoder, device
        self._mixed = device.type == "cuda" and model.dtype == torch.float32
        self._image, self._text = ImageEmbedding(model), TextEmbedding(model)

    def images(self, samples: list[Sample]) -> Tensor:
        """Unit embeddings [N, D], float32."""
        tiles = self.encoder.images(samples).to(self._device, self.model.dtype)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._mixed):
            embeddings: Tensor = self._image(tiles).float()
        return embeddings

    def texts(self, samples: list[Sample]) -> Tensor:
        """Unit embeddings [N, D], float32."""
        inputs = {name: tensor.to(self._device) for name, tensor in self.encoder.texts(samples).items()}
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._mixed):
            embeddings: Tensor = self._text(**inputs).float()
        return embeddings

    def scale_and_bias(self) -> tuple[Tensor, Tensor]:
        """Of the cosine, as the model learnt them."""
        if hasattr(self.model, "temperature"):
            scale = 1 / self.model.temperature.float()
        else:
            scale = self.model.logit_scale.float().exp()
        bias = self.model.logit_bias.float() if hasattr(self.model, "logit_bias") else torch.zeros_like(scale)
        return scale.reshape(()), bias.reshape(())


def check_pairs(recipe: DistillRecipe, samples: list[Sample], teacher: PairEncoder, student: PairEncoder) -> None:
    """UsageError or InputError for losses that dual encoders, or these ones, or these data, cannot give."""
    losses = recipe.losses
    for name in ("captions", "labels"):
        if name in losses.weights:
            raise UsageError(f"[losses.{name}]: dual encoders write no text", fix="use [losses.features] and logits")
    for sample in samples:
        if sample.verb != "caption":
            raise InputError(f"{sample.where} has no caption, which dual encoders learn from", fix="remove that line")
    if losses.logits is None:
        return
    if not has_texts(samples):
        raise UsageError(
            "[losses.logits] compares images with texts, and a folder of images has none",
            fix="name a JSONL of captions as data, or use [losses.features]",
        )
    if recipe.batch < 2:
        raise UsageError("[losses.logits] compares the pairs of a batch", fix='give a "batch" of more than 1')
    if teacher.score != student.score:
        raise UsageError(
            f"[losses.logits]: the teacher scores pairs by {teacher.score}, the student by {student.score}",
            fix="use [losses.features], or a student of the teacher's family",
        )


def has_texts(samples: list[Sample]) -> bool:
    return all(sample.answer is not None for sample in samples)


class PairGradients:
    """The losses of ``names``: features a mean over images and texts, logits of the whole batch's similarities."""

    def __init__(self, recipe: DistillRecipe, teacher: Pairs, student: Pairs, process: Process, texted: bool) -> None:
        self.names = tuple(recipe.losses.weights)
        self._losses, self._batch, self._process = recipe.losses, recipe.batch, process
        self._teacher, self._student, self._texted = teacher, student, texted
        self._maps = nn.ModuleDict()

    def fit(self, sample: Sample) -> dict[str, nn.Parameter]:
        """Find from one sample how embeddings have to be mapped; what is learnt of that."""
        if self._losses.features is None:
            return {}
        with torch.no_grad():
            widths = [side.images([sample]).shape[1] for side in (self._student, self._teacher)]
        for name in ("image", "text") if self._texted else ("image",):
            self._maps[name] = feature_map(widths[0], widths[1], self._process.device)
        return dict(self._maps.named_parameters(prefix="map"))

    def __call__(self, share: list[Sample]) -> Tensor:
        seen = self._embeddings(self._student, share)
        with torch.no_grad():
            taught = self._embeddings(self._teacher, share)
        parts = []
        for name, weight in self._losses.weights.items():
            if name == "features":
                parts.append((weight, self._features(seen, taught), 1))
            else:
                # Every process has the loss of the whole batch, and gradients of its own share of it.
                parts.append((weight, self._logits(seen, taught), self._process.count))
        add_gradients(torch.stack([weight * loss for weight, loss, _ in parts]).sum())
        found = torch.stack([loss.detach() / shared for _, loss, shared in parts])
        weights = torch.tensor([weight for weight, _, _ in parts], device=found.device)
        return torch.cat([(weights * found).sum()[None], found])

    def _embeddings(self, side: Pairs, share: list[Sample]) -> dict[str, Tensor]:
        found = {"image": side.images(share)}
        if self._texted:
            found["text"] = side.texts(share)
        return found

    def _features(self, seen: dict[str, Tensor], taught: dict[str, Tensor]) -> Tensor:
        """This share's part of the mean over the batch."""
        assert self._losses.features is not None
        kind = self._losses.features.kind
        found = [feature_distance(mapped(seen[name]), taught[name], kind).sum() for name, mapped in self._maps.items()]
        return torch.stack(found).mean() / self._batch

    def _logits(self, seen: dict[str, Tensor], taught: dict[str, Tensor]) -> Tensor:
        assert self._losses.logits is not None
        with torch.no_grad():
            wanted_BB = self._similarities(self._teacher, taught)
        said_BB = self._similarities(self._student, seen)
        return similarity_divergence(said_BB, wanted_BB, self._losses.logits.temperature, self._student.encoder.score)

    def _similarities(self, side: Pairs, embeddings: dict[str, Tensor]) -> Tensor:
        """Logits of the batch's images (rows) and texts [B, B].

        Scale and bias join the share's own rows, so that over all processes their gradients count once.
        """
        scale, bias = side.scale_and_bias()
        images, texts = embeddings["image"] * scale, embeddings["text"]
        images = torch.cat([images, bias.expand(len(images), 1)], dim=1)
        texts = torch.cat([texts, torch.ones_like(texts[:, :1])], dim=1)
        return self._whole(images) @ self._whole(texts).T

    def _whole(self, own_ND: Tensor) -> Tensor:
        """Rows of all processes in the order of the batch [B, D], with gradients for one's own."""
        places = torch.arange(self._process.rank, self._batch, self._process.count, device=own_ND.device)
        rows_BD = own_ND.new_zeros(self._batch, own_ND.shape[1]).index_copy(0, places, own_ND.detach())
        return self._process.total(rows_BD).index_copy(0, places, own_ND)
