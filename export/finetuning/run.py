"""Fine-tune a generative checkpoint: LoRA by peft on a JSONL file, saved as an ordinary peft adapter.

On a CPU, or one GPU; ``torchrun --nproc-per-node N`` shares every batch between N processes. A run that was stopped
goes on from its last checkpoint. Samples go through the model one by one and gradients are summed, so that images of
any size and number of tiles make a batch, and the result does not depend on the number of processes.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from edge_rsvlm.errors import UsageError
from edge_rsvlm.export.artifact import file_hash, tools
from edge_rsvlm.export.default.family import Default
from edge_rsvlm.export.default.finetune import TARGETS, CaptionEncoder, viewed
from edge_rsvlm.export.families.base import Source
from edge_rsvlm.export.families.generation import GenerativeFamily
from edge_rsvlm.export.families.registry import family_of, open_source
from edge_rsvlm.export.finetuning.answers import AnswerLoss, load_model, quick_dtype
from edge_rsvlm.export.finetuning.loop import Loop, Progress, silent, this_process
from edge_rsvlm.export.finetuning.recipe import ALL_LINEAR, FinetuneRecipe
from edge_rsvlm.export.finetuning.samples import Encoded, Encoder, Sample, read_samples

LOG_NAME = "training.json"


def finetune(recipe: FinetuneRecipe, progress: Progress | None = None) -> Path:
    """Train, and return the folder of the adapter, where ``training.json`` tells how it was made.

    Raises UsageError for a recipe or a checkpoint that cannot be trained, InputError for wrong data.
    """
    recipe.check()
    checkpoint = open_source(recipe.checkpoint)
    family = family_of(checkpoint.config)
    if not isinstance(family, (GenerativeFamily, Default)):
        raise UsageError(f"models of the family '{family.name}' do not write text", fix="name a generative checkpoint")
    samples = read_samples(recipe.data, recipe.images)
    process = this_process()
    try:
        base = load_model(checkpoint, family, process.device, quick_dtype(process.device))
        if isinstance(family, Default):
            cache = recipe.work_folder / f"{recipe.digest()[:12]}-{process.rank}.f16"
            lesson = _Lesson(CaptionEncoder(recipe.checkpoint, base, samples, cache), viewed(samples), TARGETS)
        else:
            encoder = Encoder(Source(recipe.checkpoint, checkpoint.config), family)
            lesson = _Lesson(encoder, samples, _text_linears(base, family))
        model = _with_lora(recipe, base, lesson.linears)
        learnt = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        loop = Loop(recipe, recipe.digest(), learnt, process)
        losses = loop.run(lesson.samples, AnswerLoss(model, lesson.encoder, process), progress or silent)
        if process.rank == 0:
            _save(recipe, model, {"samples": len(samples), "losses": [loss for (loss,) in losses]})
        return recipe.out
    finally:
        process.close()


@dataclass(frozen=True)
class _Lesson:
    """What is learnt: ``encoder`` makes tensors of ``samples``; ``linears`` names the linear layers that write text."""

    encoder: Callable[[Any], Encoded]
    samples: Sequence[Sample]
    linears: str


def _with_lora(recipe: FinetuneRecipe, base: nn.Module, linears: str) -> nn.Module:
    """The frozen model with LoRA in float32."""
    torch.manual_seed(recipe.seed)
    targets = linears if recipe.targets == ALL_LINEAR else recipe.targets
    names = targets if isinstance(targets, str) else list(targets)
    try:
        config = LoraConfig(r=recipe.rank, lora_alpha=recipe.alpha, target_modules=names)
        return get_peft_model(base, config).eval()
    except ValueError as exc:
        raise UsageError(f"targets: {exc}", fix=f"name modules of the model, or '{ALL_LINEAR}'") from exc


def _text_linears(model: nn.Module, family: GenerativeFamily) -> str:
    """A regular expression for every linear layer of the text model; its head is left alone."""
    body = family.text_model(model).body
    prefix = next(name for name, module in model.named_modules() if module is body)
    leaves = sorted({n.rpartition(".")[2] for n, m in body.named_modules() if isinstance(m, nn.Linear)})
    return rf"{re.escape(prefix)}\..*\.({'|'.join(leaves)})"


def _save(recipe: FinetuneRecipe, model: nn.Module, log: dict[str, Any]) -> None:
    """The adapter and its log, whole or not at all."""
    unfinished = recipe.work_folder / "adapter"
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    data = {"file": recipe.data.name, "sha256": file_hash(recipe.data)}
    facts = {"recipe": json.loads(recipe.model_dump_json()), "data": data, "tools": tools(), **log}
    (unfinished / LOG_NAME).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    unfinished.replace(recipe.out)
    shutil.rmtree(recipe.work_folder)
