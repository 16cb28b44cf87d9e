"""``FINETUNE.toml``: one fine-tuning, and what it has in common with every other training.

version = 1
checkpoint = "geochat-7b"        # folder of a Hugging Face checkpoint, relative to this file
data = "harbours/train.jsonl"    # see finetuning/samples.py
images = "harbours/train.tar"    # or a folder; left out: beside the data
out = "harbour-lora"             # the adapter's folder, which an export takes
minutes = 30                     # or: steps = 400
rank = 16
rate = 1e-4
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

from pydantic import Field

from edge_rsvlm.config.model import Model
from edge_rsvlm.config.toml import load_toml
from edge_rsvlm.errors import UsageError
from edge_rsvlm.export.artifact import file_hash

ALL_LINEAR = "all-linear"


class TrainingRecipe(Model):
    """What the loop must know."""

    data: Path
    out: Path
    steps: int | None = Field(default=None, gt=0)
    minutes: float | None = Field(default=None, gt=0)
    rate: float = Field(default=1e-4, gt=0)
    batch: int = Field(default=8, gt=0)
    seed: int = 0

    @property
    def work_folder(self) -> Path:
        """Where an unfinished run keeps its state."""
        return self.out.parent / f".{self.out.name}-training"

    def check(self) -> None:
        """UsageError where the run has no end, or its result would replace something."""
        if (self.steps is None) == (self.minutes is None):
            raise UsageError("a training needs an end", fix='give either "steps" or "minutes"')
        if self.out.exists():
            raise UsageError(f"{self.out} exists already", fix="remove it, or name another folder")


class FinetuneRecipe(TrainingRecipe):
    version: Literal[1] = 1
    checkpoint: Path
    images: Path | None = None
    """Folder or ``.tar`` of the data's images; default: the folder of the data."""
    rank: int = Field(default=16, gt=0)
    alpha: int = Field(default=32, gt=0)
    targets: str | tuple[str, ...] = ALL_LINEAR
    """Modules as peft takes them, a regular expression or ends of names; all-linear: those of the text model."""

    def digest(self) -> str:
        """SHA-256 of what decides how a run goes on."""
        return hashlib.sha256((self.model_dump_json() + file_hash(self.data)).encode()).hexdigest()


def load_finetune_recipe(path: Path) -> FinetuneRecipe:
    """Read and check a recipe; its paths are relative to it. UsageError names the wrong key or line."""
    recipe = load_toml(FinetuneRecipe, path, "recipe")
    given = {name: getattr(recipe, name) for name in ("checkpoint", "data", "images", "out")}
    placed = {name: path.parent / value for name, value in given.items() if value is not None}
    return recipe.model_copy(update=placed)
