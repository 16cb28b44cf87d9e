"""``DISTILL.toml``: one distillation.

version = 1
teacher = "qwen2-vl-7b"          # folders of Hugging Face checkpoints, relative to this file
student = "qwen2-vl-2b"          # where the student starts; it is not changed
data = "scenes"                  # a folder of images, or a JSONL as finetuning/samples.py reads it
images = "scenes.tar"            # of that JSONL; default: its folder
out = "qwen2-vl-2b-distilled"    # the new checkpoint, which an export takes
steps = 4000                     # or: minutes = 300
rate = 1e-4
train = ["model.visual"]         # starts of parameter names, as regular expressions; left out: all of the student
captions = "captions.jsonl"      # what teachers wrote, kept for other recipes; default: beside out

[losses.captions]                # cross entropy of what the teacher says of the images
weight = 1.0
temperature = 0.7                # 0, the default: its likeliest tokens
max_tokens = 128

[losses.labels]                  # cross entropy of the data's own answers
weight = 0.5

[losses.logits]                  # KL from the teacher's next tokens, on the answers of captions and labels
weight = 1.0                     # (their weights may be 0); of dual encoders: of the batch's similarities
temperature = 2.0

[losses.features]                # distance of image features; of dual encoders: of image and text embeddings
weight = 1.0
kind = "cosine"                  # or mse
pool = false                     # true: of their mean over an image
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from edge_rsvlm.config.model import Model
from edge_rsvlm.config.toml import load_toml
from edge_rsvlm.errors import UsageError
from edge_rsvlm.export.finetuning.recipe import TrainingRecipe

CAPTIONS_NAME = "distill-captions.jsonl"


class Loss(Model):
    weight: float = Field(default=1.0, ge=0)


class Logits(Loss):
    temperature: float = Field(default=1.0, gt=0)


class Features(Loss):
    kind: Literal["cosine", "mse"] = "cosine"
    pool: bool = False


class Captions(Loss):
    temperature: float = Field(default=0.0, ge=0)
    max_tokens: int = Field(default=128, gt=0)


class Losses(Model):
    """Those that are given are measured, and added by their weights."""

    captions: Captions | None = None
    labels: Loss | None = None
    logits: Logits | None = None
    features: Features | None = None

    @property
    def weights(self) -> dict[str, float]:
        return {name: loss.weight for name, loss in self if loss is not None}


class DistillRecipe(TrainingRecipe):
    version: Literal[1] = 1
    teacher: Path
    student: Path
    images: Path | None = None
    """Folder or ``.tar`` of the images that a JSONL names; default: its folder."""
    train: tuple[str, ...] = ()
    captions: Path | None = None
    losses: Losses

    @property
    def captions_file(self) -> Path:
        return self.captions or self.out.parent / CAPTIONS_NAME

    def check(self) -> None:
        super().check()
        if not any(self.losses.weights.values()):
            raise UsageError(
                "nothing to learn", fix="give one of [losses.captions], labels, logits, features a weight above 0"
            )


def load_distill_recipe(path: Path) -> DistillRecipe:
    """Read and check a recipe; its paths are relative to it. UsageError names the wrong key or line."""
    recipe = load_toml(DistillRecipe, path, "recipe")
    given = {name: getattr(recipe, name) for name in ("teacher", "student", "data", "images", "out", "captions")}
    return recipe.model_copy(update={name: path.parent / value for name, value in given.items() if value is not None})
