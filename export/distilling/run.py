"""Distil a checkpoint: a student learns from a teacher, and is saved as an ordinary checkpoint folder.

Generative models teach generative ones, dual encoders dual encoders. On a CPU, or one GPU; ``torchrun --nproc-per-node
N`` shares every batch between N processes. A run that was stopped goes on from its last checkpoint, and captions that
the teacher wrote are kept.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edge_rsvlm.errors import UsageError
from edge_rsvlm.export.artifact import file_hash, tools
from edge_rsvlm.export.checkpoint.reading import Checkpoint, open_checkpoint
from edge_rsvlm.export.distilling.answers import AnswerGradients, check_vocabularies
from edge_rsvlm.export.distilling.captions import Captioned, Written, requests, write_captions
from edge_rsvlm.export.distilling.data import Item, asked, items, read_data
from edge_rsvlm.export.distilling.generators import Generator
from edge_rsvlm.export.distilling.pairs import PairEncoder, PairGradients, Pairs, check_pairs, has_texts
from edge_rsvlm.export.distilling.recipe import DistillRecipe
from edge_rsvlm.export.families.base import Family, Source
from edge_rsvlm.export.families.dual_encoder import DualEncoder
from edge_rsvlm.export.families.generation import GenerativeFamily
from edge_rsvlm.export.families.registry import family_of
from edge_rsvlm.export.finetuning.answers import load_model, quick_dtype
from edge_rsvlm.export.finetuning.loop import Gradients, Loop, Process, Progress, S, silent, this_process
from edge_rsvlm.export.finetuning.samples import Encoder, Sample

LOG_NAME = "training.json"
KEPT = (".jinja", ".json", ".model", ".txt")
"""Endings of tokenizer and processor files."""


def distill(recipe: DistillRecipe, progress: Progress | None = None, captioned: Captioned | None = None) -> Path:
    """Train, and return the folder of the new checkpoint, where ``training.json`` tells how it was made.

    ``captioned`` hears of the captions that the teacher writes before the training. Raises UsageError for a recipe
    whose models or losses do not go together, InputError for wrong data.
    """
    recipe.check()
    teacher, student = open_side(recipe.teacher), open_side(recipe.student)
    samples = read_data(recipe.data, recipe.images)
    process = this_process()
    try:
        run = Distillation(recipe, teacher, student, samples, process, progress or silent)
        if isinstance(teacher.family, GenerativeFamily) and isinstance(student.family, GenerativeFamily):
            run.generators(teacher.family, student.family, captioned or _silent)
        elif isinstance(teacher.family, DualEncoder) and isinstance(student.family, DualEncoder):
            run.pairs(teacher.family, student.family)
        else:
            raise UsageError(
                f"a model of the family '{teacher.family.name}' cannot teach one of '{student.family.name}'",
                fix="let generative models teach generative ones, and dual encoders dual encoders",
            )
        return recipe.out
    finally:
        process.close()


def _silent(done: int, total: int) -> None:
    return None


@dataclass(frozen=True)
class Side:
    """The teacher's or the student's checkpoint."""

    checkpoint: Checkpoint
    family: Family

    @property
    def source(self) -> Source:
        return Source(self.checkpoint.folder, self.checkpoint.config)

    @cached_property
    def sha256(self) -> str:
        """Of every file: configs and tokenizers decide as much as weights do."""
        return files_hash(self.checkpoint.folder, sorted(f for f in self.checkpoint.folder.iterdir() if f.is_file()))

    def model(self, device: torch.device, dtype: torch.dtype) -> Any:
        return load_model(self.checkpoint, self.family, device, dtype)


def open_side(folder: Path) -> Side:
    checkpoint = open_checkpoint(folder)
    return Side(checkpoint, family_of(checkpoint.config))


def files_hash(folder: Path, files: Sequence[Path]) -> str:
    hashes = [[str(file.relative_to(folder)), file_hash(file)] for file in files]
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()


@dataclass(frozen=True)
class Distillation:
    """One distillation under way, in one process."""

    recipe: DistillRecipe
    teacher: Side
    student: Side
    samples: list[Sample]
    process: Process
    progress: Progress

    def generators(self, teaching: GenerativeFamily, learning: GenerativeFamily, captioned: Captioned) -> None:
        losses, device = self.recipe.losses, self.process.device
        teacher_encoder, encoder = Encoder(self.teacher.source, teaching), Encoder(self.student.source, learning)
        if losses.logits:
            check_vocabularies(teacher_encoder, encoder)
        loaded: list[Generator] = []

        def teacher() -> Generator:
            if not loaded:
                model = self.teacher.model(device, quick_dtype(device)).requires_grad_(False)
                loaded.append(Generator(model, teacher_encoder, device))
            return loaded[0]

        learnt = items(losses, self.samples, self._captions(teacher_encoder, teacher, captioned))
        guide = teacher() if losses.logits or losses.features else None
        loaded.clear()
        model = self._student_model()
        gradients = AnswerGradients(losses, guide, Generator(model, encoder, device), self.process)
        torch.manual_seed(self.recipe.seed)
        self._learn(model, learnt, gradients, gradients.names, gradients.fit(learnt[0].sample), _tally(learnt))

    def pairs(self, teaching: DualEncoder, learning: DualEncoder) -> None:
        device = self.process.device
        teacher_encoder, encoder = (
            PairEncoder(self.teacher.source, teaching),
            PairEncoder(self.student.source, learning),
        )
        check_pairs(self.recipe, self.samples, teacher_encoder, encoder)
        if self.recipe.batch < self.process.count:
            raise UsageError(
                f"a batch of {self.recipe.batch} has nothing for some of {self.process.count} processes",
                fix='give a larger "batch"',
            )
        guide = Pairs(self.teacher.model(device, quick_dtype(device)).requires_grad_(False), teacher_encoder, device)
        model = self._student_model()
        student = Pairs(model, encoder, device)
        gradients = PairGradients(self.recipe, guide, student, self.process, has_texts(self.samples))
        torch.manual_seed(self.recipe.seed)
        maps = gradients.fit(self.samples[0])
        self._learn(model, self.samples, gradients, gradients.names, maps, {"samples": len(self.samples)})

    def _captions(self, encoder: Encoder, teacher: Any, captioned: Captioned) -> list[tuple[Sample, Written]]:
        settings = self.recipe.losses.captions
        if settings is None:
            return []
        samples = asked(self.samples)
        wanted = requests(samples, encoder, self.teacher.sha256, settings, self.recipe.seed)
        found = write_captions(
            self.recipe.captions_file, dict(zip(wanted, samples, strict=True)), teacher, self.process, captioned
        )
        return [(sample, found[key]) for sample, key in zip(samples, wanted, strict=True)]

    def _student_model(self) -> Any:
        """In float32, of which the parameters of ``train`` will change."""
        model = self.student.model(self.process.device, torch.float32)
        if self.recipe.train:
            names = [name for name, _ in model.named_parameters()]
            for pattern in self.recipe.train:
                if not any(re.match(pattern, name) for name in names):
                    parts = sorted({".".join(name.split(".")[:2]) for name in names})
                    raise UsageError(f"train: no parameter is named {pattern}...", fix=f"there are {', '.join(parts)}")
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(any(re.match(pattern, name) for pattern in self.recipe.train))
        return model

    def _learn(
        self, model: Any, samples: list[S], gradients: Gradients[S], names: Sequence[str],
        maps: Mapping[str, nn.Parameter], counts: Mapping[str, int],
    ) -> None:  # fmt: skip
        learnt = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        loop = Loop(self.recipe, self._digest, {**learnt, **maps}, self.process)
        losses = loop.run(samples, gradients, self.progress)
        if self.process.rank == 0:
            columns = zip(("total", *names), zip(*losses, strict=True), strict=True)
            measured = {name: [None if math.isnan(loss) else loss for loss in column] for name, column in columns}
            self._save(model, {**counts, "losses": measured})

    @cached_property
    def _data_sha256(self) -> str:
        path = self.recipe.data
        return file_hash(path) if path.is_file() else files_hash(path, [sample.image for sample in self.samples])

    @property
    def _digest(self) -> str:
        """SHA-256 of what decides how the run goes on."""
        facts = [self.recipe.model_dump_json(), self.teacher.sha256, self.student.sha256, self._data_sha256]
        return hashlib.sha256("".join(facts).encode()).hexdigest()

    def _save(self, model: Any, log: Mapping[str, Any]) -> None:
        """The new checkpoint in the student's own precision, and its log: whole or not at all."""
        unfinished = self.recipe.work_folder / "checkpoint"
        shutil.rmtree(unfinished, ignore_errors=True)
        model.to(self.student.checkpoint.config.dtype or torch.float32).save_pretrained(unfinished)
        for file in self.student.checkpoint.folder.iterdir():
            if file.suffix in KEPT and not file.name.endswith(".index.json") and not (unfinished / file.name).exists():
                shutil.copyfile(file, unfinished / file.name)
        facts = {
            "recipe": json.loads(self.recipe.model_dump_json()), "teacher": self.teacher.sha256,
            "student": self.student.sha256, "data": {"name": self.recipe.data.name, "sha256": self._data_sha256},
            "tools": tools(), **log,
        }  # fmt: skip
        (unfinished / LOG_NAME).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        unfinished.replace(self.recipe.out)
        shutil.rmtree(self.recipe.work_folder)


def _tally(learnt: list[Item]) -> dict[str, int]:
    """How many samples of each kind there were."""
    kinds = [item.answer or "images" for item in learnt]
    return {"samples": len(learnt), **{f"samples_of_{kind}": kinds.count(kind) for kind in sorted(set(kinds))}}
