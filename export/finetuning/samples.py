"""Samples of a fine-tuning: lines of a JSONL file, and the tensors they become.

A line is {"image", "caption"} or {"image", "captions": [...]}, or {"image", "question", "answer"} (an answer without a
question is a caption), or {"image", "phrase", "box": [x, y, width, height]}; boxes are in pixels of the image. What
else such a line says is not looked at. Prompts are written from the words of the manifest that the device will use, so
training and inference cannot differ.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from PIL import Image, UnidentifiedImageError
from pydantic import Field
from tokenizers import Tokenizer
from torch import Tensor

from edge_rsvlm.config.model import Model, parse
from edge_rsvlm.config.task_specs import BoxFormat, VisualTokens
from edge_rsvlm.errors import InputError, UsageError
from edge_rsvlm.export.families.base import Source
from edge_rsvlm.export.families.generation import GenerativeFamily
from edge_rsvlm.export.families.image_processors import load_image_processor
from edge_rsvlm.export.families.tokenizers import FILE
from edge_rsvlm.export.finetuning.images import is_image, open_file
from edge_rsvlm.tasks.prompt import Layout, write_image

EIGHT_BIT = ("RGB", "RGBA", "L", "P")


class Line(Model):
    image: str
    caption: str | None = None
    captions: tuple[str, ...] | None = Field(default=None, min_length=1)
    question: str | None = None
    answer: str | None = None
    phrase: str | None = None
    box: tuple[float, float, Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] | None = None


@dataclass(frozen=True)
class Sample:
    """``text`` is the question or phrase; ``answer`` is None where ``box_xywh`` is the answer."""

    where: str
    image: Path
    verb: Literal["caption", "ask", "ground"]
    text: str
    answer: str | None
    box_xywh: tuple[float, float, float, float] | None


LEARNT = frozenset({"caption", "captions", "question", "answer", "phrase", "box"})


def read_samples(path: Path, images: Path | None = None) -> list[Sample]:
    """``images`` is the folder or ``.tar`` that holds them; None: names are relative to the file.

    Raises InputError that names the line which is wrong or whose image is missing.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        raise InputError(f"cannot read {path}: {exc}", fix="name a JSONL file") from exc
    known = [
        sample
        for number, line in enumerate(lines, 1)
        if line.strip()
        for sample in _samples(f"{path}:{number}", line, images or path.parent)
    ]
    if not known:
        raise InputError(f"{path} has no samples", fix='add lines such as {"image": "a.png", "caption": "A harbour."}')
    return known


def _samples(where: str, text: str, images: Path) -> list[Sample]:
    line = _line(where, text)
    image = images / line.image
    if not is_image(image):
        raise InputError(
            f"{where}: no file {image}", fix='name images as they are in "images", or beside the JSONL file'
        )
    given = {name for name in LEARNT if getattr(line, name) is not None}
    if given == {"captions"}:
        return [Sample(where, image, "caption", "", caption, None) for caption in line.captions or ()]
    if given in ({"caption"}, {"answer"}):
        return [Sample(where, image, "caption", "", line.caption or line.answer, None)]
    if given == {"question", "answer"}:
        return [Sample(where, image, "ask", str(line.question), line.answer, None)]
    if given == {"phrase", "box"}:
        return [Sample(where, image, "ground", str(line.phrase), None, line.box)]
    raise InputError(
        f"{where} has {', '.join(sorted(given)) or 'nothing to learn'}",
        fix="give a caption, or a question and its answer, or a phrase and its box",
    )


def _line(where: str, text: str) -> Line:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as exc:
        raise InputError(f"{where} is not JSON: {exc}", fix="write one JSON object per line") from exc
    if isinstance(found, dict) and LEARNT & found.keys():
        # Data sets tell more of an image than is learnt here; a key that is meant and misspelt leaves nothing to learn.
        found = {key: value for key, value in found.items() if key in Line.model_fields}
    return parse(Line, found, where, InputError)


@dataclass(frozen=True)
class Encoded:
    """Arguments of a forward for one sample [1, ...]; the last ``answer_tokens`` of ``input_ids`` are learnt."""

    inputs: dict[str, Tensor]
    answer_tokens: int


class Encoder:
    """Samples to tensors, by what a family says of a checkpoint."""

    def __init__(self, source: Source, family: GenerativeFamily) -> None:
        described = family.describe(source)
        self._config, self._tasks, self._mrope = source.config, described.tasks, family.mrope
        self._name = family.name
        self._tokenizer = Tokenizer.from_str(described.files[FILE].decode())
        self._processor = load_image_processor(source.folder)
        if self._tasks["ask"]["visual"]["token"] is None and source.config.image_token_index is None:
            raise UsageError(
                f"{source.folder} has no token for images, as checkpoints of its time had not",
                fix="add one to its tokenizer, and its number to config.json as image_token_index",
            )

    @property
    def vocabulary(self) -> dict[str, int]:
        """Ids by token."""
        return self._tokenizer.get_vocab(with_added_tokens=True)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer."""
        return tuple(self._tasks["ask"]["eos_ids"])

    def __call__(self, sample: Sample) -> Encoded:
        """The prompt and the sample's own answer.

        Raises InputError for an image that cannot be read, and for boxes in a family that cannot write them.
        """
        task, image = self._task(sample), open_image(sample)
        pixels, layout = self._pixels(image)
        answer = sample.answer if sample.answer is not None else _box_text(task["boxes"], sample, image, layout)
        return self._encoded(task, *self._ids(self._prompt(task, sample, layout), answer, task), pixels)

    def answering(self, sample: Sample, answer_ids: Sequence[int]) -> Encoded:
        """The prompt and these tokens, none to let a model go on; raises InputError as above."""
        task = self._task(sample)
        pixels, layout = self._pixels(open_image(sample))
        prompt = self._prompt(task, sample, layout)
        prompt_ids = self._tokenizer.encode(prompt, add_special_tokens=task["tokenizer"]["add_special_tokens"]).ids
        return self._encoded(task, prompt_ids, answer_ids, pixels)

    def prompt(self, sample: Sample) -> str:
        """What the model is asked, the image left as ``{image}``."""
        return str(self._task(sample)["prompt"].replace("{text}", sample.text))

    def decode(self, ids: Sequence[int]) -> str:
        """Tokens of an answer as text."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True).strip()

    def _task(self, sample: Sample) -> dict[str, Any]:
        task = self._tasks.get(sample.verb)
        if task is None:
            raise InputError(
                f"{sample.where}: models of the family '{self._name}' have no form for boxes",
                fix="write the box into an answer, in the form that the model shall use",
            )
        token = task["visual"]["token"]
        if token is not None and token in f"{sample.text} {sample.answer}":
            raise InputError(f"{sample.where}: '{token}' would pass for an image", fix="leave it out")
        return task

    def _prompt(self, task: dict[str, Any], sample: Sample, layout: Layout) -> str:
        image = write_image(VisualTokens.model_validate(task["visual"]), layout)
        return str(task["prompt"].replace("{image}", image).replace("{text}", sample.text))

    def _encoded(
        self, task: dict[str, Any], prompt_ids: list[int], answer_ids: Sequence[int], pixels: dict[str, Tensor]
    ) -> Encoded:
        # Features that come before the text stand in for tokens that only transformers has.
        visual = task["visual"]
        before = [self._config.image_token_index] * int(visual["per_tile"]) if visual["token"] is None else []
        ids = torch.tensor([[*before, *prompt_ids, *answer_ids]])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels}
        if self._mrope:
            inputs["mm_token_type_ids"] = (ids == self._config.image_token_id).int()
        return Encoded(inputs, len(answer_ids))

    def _ids(self, prompt: str, answer: str, task: dict[str, Any]) -> tuple[list[int], list[int]]:
        """Tokens of the prompt as the device writes them, and of the answer with its end."""
        special = task["tokenizer"]["add_special_tokens"]
        before = self._tokenizer.encode(prompt, add_special_tokens=special).ids
        space = " " if prompt and not prompt[-1].isspace() else ""
        whole = self._tokenizer.encode(prompt + space + answer, add_special_tokens=special).ids
        joined = whole[: len(before)] == before
        said = whole[len(before) :] if joined else self._tokenizer.encode(answer, add_special_tokens=False).ids
        return before, [*said, task["eos_ids"][0]]

    def _pixels(self, image: Image.Image) -> tuple[dict[str, Tensor], Layout]:
        splits = {"return_row_col_info": True} if hasattr(self._processor, "do_image_splitting") else {}
        found = dict(self._processor(image, return_tensors="pt", **splits))
        rows, cols = (max(int(found.pop(name, [[1]])[0][0]), 1) for name in ("rows", "cols"))
        values = found["pixel_values"]
        if "image_grid_thw" in found:
            _, down, across = found["image_grid_thw"][0].tolist()
            patch = self._processor.patch_size
            return found, Layout(1, rows, cols, (down * patch, across * patch))
        tiles = values.shape[1] if values.ndim == 5 else 1
        return found, Layout(tiles, rows, cols, (values.shape[-2], values.shape[-1]))


def open_image(sample: Sample) -> Image.Image:
    try:
        with open_file(sample.image) as stream, Image.open(stream) as file:
            if file.mode not in EIGHT_BIT:
                raise InputError(
                    f"{sample.where}: {sample.image} has pixels of mode {file.mode}", fix="convert it to 8-bit RGB"
                )
            return file.convert("RGB")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as exc:
        raise InputError(f"{sample.where}: cannot read {sample.image}: {exc}", fix="replace that image") from exc


def _box_text(form: dict[str, Any], sample: Sample, image: Image.Image, layout: Layout) -> str:
    """The box as the family writes it: shares of the image times a scale, or pixels of the prepared image."""
    boxes = BoxFormat.model_validate(form)
    assert sample.box_xywh is not None
    x, y, width, height = sample.box_xywh
    shares = (x / image.width, y / image.height, (x + width) / image.width, (y + height) / image.height)
    tall, wide = layout.tile_hw
    scales: Sequence[float] = (wide, tall, wide, tall) if boxes.scale is None else (boxes.scale,) * 4
    x0, y0, x1, y1 = (round(min(max(share, 0.0), 1.0) * scale) for share, scale in zip(shares, scales, strict=True))
    numbers = f"{x0}, {y0}, {x1}, {y1}" if boxes.scale is None else f"({x0},{y0}),({x1},{y1})"
    return f"{boxes.open}{numbers}{boxes.close}"
