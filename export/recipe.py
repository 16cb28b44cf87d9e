"""``RECIPE.toml``: one export, from a checkpoint to a bundle.

version = 1
checkpoint = "geochat-7b"                # folder of a Hugging Face checkpoint, relative to the recipe
target = "onnx:f16"                      # or onnx:f32
profile = "jetson-orin-nano-8gb"         # the device it must fit
out = "geochat.bundle"

[[adapters]]                             # PEFT LoRA, merged as W + weight * delta
path = "harbour-lora"
weight = 1.0
keep = false                             # true: not merged but kept apart, for --adapter NAME
name = "harbour"                         # of one that is kept; left out: that of its folder

[bundle]
name = "geochat"
version = 3
licence = "LLaMA 2 Community License"
training_data = ["GeoChat-Instruct"]
resolution_m = [0.3, 1.0]                # ground resolution it was trained for; left out: not known

[prompts]                                # instead of the family's own
caption = "Describe this image."
label = "a satellite photo of {label}."  # for classify, search and detect by words
ground = "[refer] {text}"                # how it is asked for boxes, with [boxes]

[boxes]                                  # how it writes them: four numbers between open and close
open = "{"
close = "|"
scale = 100                              # of which they are shares; left out: pixels of the prepared image

[images]
max_pixels = 1048576                     # where a model takes images of any size (Qwen2-VL)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from edge_rsvlm.config.manifest import BoxFormat
from edge_rsvlm.config.model import Model
from edge_rsvlm.config.toml import load_toml

Target = Literal["onnx:f32", "onnx:f16"]
Gate = Literal["parity"]


class AdapterChoice(Model):
    path: Path
    weight: float = 1.0
    keep: bool = False
    """Not merged: the bundle answers by it when asked to."""
    name: str | None = None
    """Of one that is kept; default: that of its folder."""

    @property
    def bundle_name(self) -> str:
        return self.name or self.path.resolve().name


class BundleFacts(Model):
    """What only the person who exports knows. ``name`` defaults to that of the checkpoint's folder."""

    name: str | None = None
    version: int = Field(default=1, ge=1)
    description: str = ""
    licence: str | None = None
    training_data: tuple[str, ...] = ()
    resolution_m: tuple[float, float] | None = None


class Prompts(Model):
    """Words of the person who exports; the family writes them into its chat template."""

    caption: str | None = None
    label: str | None = Field(default=None, pattern=r"\{label\}")
    ground: str | None = Field(default=None, pattern=r"\{text\}")


class Images(Model):
    max_pixels: int = Field(default=1 << 20, gt=0)
    """Published settings allow an order more, and attention takes memory with the square of it."""


class Recipe(Model):
    version: Literal[1] = 1
    checkpoint: Path
    target: Target = "onnx:f32"
    profile: str = "host"
    out: Path
    work: Path | None = None
    """Where steps leave their artifacts; default: ``.NAME-export`` beside ``out``."""
    adapters: tuple[AdapterChoice, ...] = ()
    bundle: BundleFacts = BundleFacts()
    prompts: Prompts = Prompts()
    boxes: BoxFormat | None = None
    images: Images = Images()
    allow: tuple[Gate, ...] = ()
    """Gates whose failure does not stop the export; recorded in the bundle."""

    @property
    def merged(self) -> tuple[AdapterChoice, ...]:
        return tuple(choice for choice in self.adapters if not choice.keep)

    @property
    def kept(self) -> tuple[AdapterChoice, ...]:
        return tuple(choice for choice in self.adapters if choice.keep)

    @property
    def precision(self) -> str:
        return self.target.partition(":")[2]

    @property
    def settings(self) -> dict[str, Any]:
        """What decides how graphs and manifest come out, beside the checkpoint and its adapters."""
        said = self.model_dump(mode="json", include={"target", "bundle", "prompts", "boxes", "images"})
        return {**said, "name": self.name}

    @property
    def name(self) -> str:
        return self.bundle.name or self.checkpoint.resolve().name

    @property
    def work_folder(self) -> Path:
        return self.work or self.out.parent / f".{self.out.name}-export"


def load_recipe(path: Path) -> Recipe:
    """Read and check a recipe; its paths are relative to it. UsageError names the wrong key or line."""
    recipe = load_toml(Recipe, path, "recipe")
    base = path.parent
    adapters = tuple(a.model_copy(update={"path": base / a.path}) for a in recipe.adapters)
    placed = {
        "checkpoint": base / recipe.checkpoint, "out": base / recipe.out, "adapters": adapters,
        "work": base / recipe.work if recipe.work else None,
    }  # fmt: skip
    return recipe.model_copy(update=placed)
