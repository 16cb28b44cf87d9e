"""What a teacher says of images, kept in a JSONL file: one line per answer, written as soon as it is there.

A line is found again by everything that decided it, so any recipe may use the file. Runs may be killed and may write
side by side: a last line that is not whole is dropped by whoever writes next.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import torch

from edge_rsvlm.config.model import Model, parse
from edge_rsvlm.errors import InputError
from edge_rsvlm.export.distilling.generators import Generator
from edge_rsvlm.export.distilling.recipe import Captions
from edge_rsvlm.export.finetuning.images import open_file
from edge_rsvlm.export.finetuning.loop import Process
from edge_rsvlm.export.finetuning.samples import Encoder, Sample

Captioned = Callable[[int, int], None]
"""Called with how many answers are there, and how many there will be."""


class Asked(Model):
    """What decides an answer: ``teacher`` and ``image`` are SHA-256; ``seed`` is 0 where nothing is drawn."""

    teacher: str
    image: str
    prompt: str
    temperature: float
    max_tokens: int
    seed: int


class Written(Asked):
    """``whole``: the teacher came to an end within ``max_tokens``."""

    answer: str
    whole: bool

    @property
    def asked(self) -> Asked:
        return Asked(**self.model_dump(exclude={"answer", "whole"}))


def requests(
    samples: Sequence[Sample], encoder: Encoder, teacher_sha256: str, settings: Captions, seed: int
) -> list[Asked]:
    """What is to be asked of each sample's image."""
    hashes = {image: _image_hash(image) for image in dict.fromkeys(sample.image for sample in samples)}
    return [
        Asked(
            teacher=teacher_sha256,
            image=hashes[sample.image],
            prompt=encoder.prompt(sample),
            temperature=settings.temperature,
            max_tokens=settings.max_tokens,
            seed=seed if settings.temperature else 0,
        )
        for sample in samples
    ]


def _image_hash(image: Path) -> str:
    with open_file(image) as file:
        return hashlib.sha256(file.read()).hexdigest()


def write_captions(
    path: Path,
    wanted: dict[Asked, Sample],
    teacher: Callable[[], Generator],
    process: Process,
    captioned: Captioned,
) -> dict[Asked, Written]:
    """Every answer that is wanted: those of the file, and the rest from the teacher, which is loaded if there is any.

    Each process asks for its share and waits for the others.
    """
    known = read_captions(path)
    missing = [asked for asked in wanted if asked not in known]
    process.wait()  # else a quick process would have written what a slow one has not yet missed
    for number, asked in enumerate(missing[process.rank :: process.count]):
        captioned(len(wanted) - len(missing) + number * process.count, len(wanted))
        append(path, ask(teacher(), wanted[asked], asked))
    process.wait()
    found = read_captions(path)
    captioned(len(wanted), len(wanted))
    return {asked: found[asked] for asked in wanted}


def ask(teacher: Generator, sample: Sample, asked: Asked) -> Written:
    """One answer; drawn ones depend on what is asked and not on what was asked before."""
    draw = hashlib.sha256(asked.model_dump_json().encode()).digest()
    torch.manual_seed(int.from_bytes(draw[:7], "little"))
    ids = teacher.generate(sample, asked.temperature, asked.max_tokens)
    whole = bool(ids) and ids[-1] in teacher.encoder.eos_ids
    return Written(**asked.model_dump(), answer=teacher.encoder.decode(ids), whole=whole)


def read_captions(path: Path) -> dict[Asked, Written]:
    """Whole lines of the file, if there is one. InputError names a line that is none of ours."""
    if not path.is_file():
        return {}
    lines = path.read_bytes().split(b"\n")[:-1]
    found = [_line(f"{path}:{number}", line) for number, line in enumerate(lines, 1)]
    return {written.asked: written for written in found}


def _line(where: str, line: bytes) -> Written:
    try:
        return parse(Written, json.loads(line), where, InputError)
    except ValueError as exc:
        raise InputError(f"{where} is not JSON", fix="remove that line; its caption is written again") from exc


def append(path: Path, written: Written) -> None:
    """One line more."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        _drop_half_line(file)
        file.write(f"{written.model_dump_json()}\n".encode())


def _drop_half_line(file: BinaryIO) -> None:
    if file.seek(0, os.SEEK_END) == 0:
        return
    file.seek(-1, os.SEEK_END)
    if file.read(1) != b"\n":
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
