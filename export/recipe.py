"""``RECIPE.toml``: one export, from a checkpoint to a bundle.

version = 1
checkpoint = "geochat-7b"                # folder of a Hugging Face checkpoint, relative to the recipe
target = "onnx:f16"                      # onnx:f32, onnx:int8, onnx:int4, gguf:Q4_K_M and other types of llama.cpp
engines = ["onnxruntime"]                # "tensorrt" beside it: graphs that `engine build` takes on the device
profile = "jetson-orin-nano-8gb"         # the device it must fit
out = "geochat.bundle"
goal = "size=4GiB"                       # or latency=50ms, accuracy-loss=0.5: precisions are then searched for

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

[calibration]                            # for targets of fewer bits: images like those of the mission
images = "tiles"                         # folder, glob or .tar; or a list of them
without = []                             # files of names, one per line, that are left alone: those that judge
count = 64
texts = ["how many ships are there?"]    # for tasks that take a text

[precision]                              # of single graphs, instead of what the target gives them
detect = "f16"                           # f32, f16, int8, int8-dynamic, int4

[int8]
ranges = "percentile"                    # or minmax, entropy
smooth = 0.5                             # SmoothQuant of matrix products; 0: not
equalise = true                          # convolutions that follow each other
keep = []                                # layers that stay as they are

[int4]
method = "gptq"                          # or awq, rtn
block = 32

[gguf]
vision = "onnx"                          # or mmproj: llama.cpp sees too

[tensorrt]                               # where engines name it
graphs = ["encoder"]                     # left out: all of them; the others run on ONNX Runtime

[[evaluate]]                             # labels that judge what fewer bits cost; without them, agreement does
task = "caption"                         # detect, change, caption, ask, classify, segment
labels = "val.jsonl"                     # as for `edge-rsvlm eval`
images = "val.tar"
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from edge_rsvlm.config.model import Model
from edge_rsvlm.config.task_specs import BoxFormat
from edge_rsvlm.config.toml import load_toml
from edge_rsvlm.export.quantize.settings import CalibrationImages, Int4, Int8, Precision

Target = Literal[
    "onnx:f32", "onnx:f16", "onnx:int8", "onnx:int4", "gguf:F32", "gguf:F16", "gguf:Q8_0", "gguf:Q6_K", "gguf:Q5_K_M",
    "gguf:Q4_K_M", "gguf:Q4_0", "gguf:IQ4_XS",
]  # fmt: skip
EngineName = Literal["onnxruntime", "tensorrt"]
Gate = Literal["parity", "accuracy"]


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


class Gguf(Model):
    vision: Literal["onnx", "mmproj"] = "onnx"
    """What makes visual tokens of an image: graphs of ONNX Runtime, or llama.cpp itself."""


class TensorRt(Model):
    graphs: tuple[str, ...] | None = None
    """Those that are made for it too; None: every graph."""


class Evaluate(Model):
    """Labels of one task, as ``edge-rsvlm eval`` reads them."""

    task: Literal["detect", "change", "caption", "ask", "classify", "segment"]
    labels: Path
    images: str = ""
    """Folder or .tar; of change the folder of ``labels`` holds them."""
    only: Path | None = None
    """Names of the images to score, one per line."""
    ignore: tuple[str, ...] = ()
    alias: dict[str, str] = Field(default_factory=dict)
    """As the options of ``edge-rsvlm eval detect``."""
    label: str = ""
    """Of segment: the word whose mask is scored, on points."""


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
    engines: tuple[EngineName, ...] = ("onnxruntime",)
    calibration: CalibrationImages | None = None
    precision: dict[str, Precision] = Field(default_factory=dict)
    int8: Int8 = Int8()
    int4: Int4 = Int4()
    gguf: Gguf = Gguf()
    tensorrt: TensorRt = TensorRt()
    evaluate: tuple[Evaluate, ...] = ()
    goal: str | None = None
    """Which mix of precisions is wanted, as ``quantize.search.parse_goal`` reads it."""
    allow: tuple[Gate, ...] = ()
    """Gates whose failure does not stop the export; recorded in the bundle."""

    @property
    def merged(self) -> tuple[AdapterChoice, ...]:
        return tuple(choice for choice in self.adapters if not choice.keep)

    @property
    def kept(self) -> tuple[AdapterChoice, ...]:
        return tuple(choice for choice in self.adapters if choice.keep)

    @property
    def format(self) -> str:
        """``onnx`` or ``gguf``."""
        return self.target.partition(":")[0]

    @property
    def bits(self) -> str:
        """What the target says of weights: f32, int8, Q4_K_M ..."""
        return self.target.partition(":")[2]

    @property
    def lowered(self) -> bool:
        """Whether a compiled bundle is changed further."""
        return (
            self.bits in ("int8", "int4")
            or self.format == "gguf"
            or bool(self.precision or self.goal)
            or "tensorrt" in self.engines
        )

    @property
    def stored(self) -> Literal["f32", "f16"]:
        """How graphs are compiled; what wants fewer bits begins with half precision."""
        return "f32" if self.target in ("onnx:f32", "gguf:F32") else "f16"

    @property
    def settings(self) -> dict[str, Any]:
        """What decides how graphs and manifest are compiled, beside the checkpoint and its adapters: another target of
        fewer bits begins with the same."""
        said = self.model_dump(mode="json", include={"bundle", "prompts", "boxes", "images"})
        return {**said, "stored": self.stored, "name": self.name}

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
        "work": base / recipe.work if recipe.work else None, "calibration": _calibration(base, recipe.calibration),
        "evaluate": tuple(_evaluate(base, choice) for choice in recipe.evaluate),
    }  # fmt: skip
    return recipe.model_copy(update=placed)


def _calibration(base: Path, choice: CalibrationImages | None) -> CalibrationImages | None:
    if choice is None:
        return None
    pairs = base / choice.pairs if choice.pairs else None
    images, without = (tuple(base / place for place in places) for places in (choice.images, choice.without))
    return choice.model_copy(update={"images": images, "pairs": pairs, "without": without})


def _evaluate(base: Path, choice: Evaluate) -> Evaluate:
    images = str(base / choice.images) if choice.images else ""
    only = base / choice.only if choice.only else None
    return choice.model_copy(update={"labels": base / choice.labels, "images": images, "only": only})
