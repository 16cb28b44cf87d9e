"""What a distillation sees: images of a folder or of a JSONL, and the answers that are learnt on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edge_rsvlm.errors import InputError, UsageError
from edge_rsvlm.export.distilling.captions import Written
from edge_rsvlm.export.distilling.recipe import Losses
from edge_rsvlm.export.finetuning.samples import Sample, read_samples

IMAGES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Item:
    """A sample, and whose its answer is: None where the image alone is learnt from.

    ``whole``: the answer ends, as its last token says.
    """

    sample: Sample
    answer: Literal["captions", "labels"] | None
    whole: bool = True


def read_data(path: Path, images: Path | None = None) -> list[Sample]:
    """Samples of a JSONL, whose images are in ``images`` or beside it, or else every image below a folder, without an
    answer. InputError where there are none."""
    if not path.is_dir():
        return read_samples(path, images)
    found = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGES and file.is_file())
    if not found:
        raise InputError(f"no images in {path}", fix=f"put some there ({', '.join(IMAGES)})")
    return [Sample(str(image), image, "caption", "", None, None) for image in found]


def asked(samples: Sequence[Sample]) -> list[Sample]:
    """What the teacher is asked: each question once, and a caption of each image that has one. Boxes are left out:
    families write them in forms of their own."""
    found = {(s.image, s.verb, s.text): s for s in samples if s.box_xywh is None}
    if not found:
        raise UsageError("the data has boxes only, which teachers are not asked for", fix="leave out [losses.captions]")
    return list(found.values())


def items(losses: Losses, samples: Sequence[Sample], written: Sequence[tuple[Sample, Written]]) -> list[Item]:
    """What is learnt, of which an epoch sees everything once: what the teacher wrote, and the data's own answers.

    Raises UsageError for losses that these data cannot give.
    """
    if losses.logits is not None and losses.captions is None and losses.labels is None:
        raise UsageError(
            "[losses.logits] compares next tokens of answers, and there are none",
            fix="add [losses.captions] or [losses.labels], with weight = 0 to use their words only",
        )
    said = [(sample, text) for sample, text in written if text.answer or text.whole]
    if written and not said:
        raise UsageError(
            "the teacher found no words", fix="check the teacher, or give [losses.captions] more max_tokens"
        )
    found = [Item(answered(sample, text.answer), "captions", text.whole) for sample, text in said]
    if losses.labels is not None:
        if any(s.answer is None and s.box_xywh is None for s in samples):
            raise UsageError(
                "[losses.labels] needs answers, and a folder of images has none",
                fix="name a JSONL as data, or use [losses.captions]",
            )
        found += [Item(sample, "labels") for sample in samples]
    return found or [Item(sample, None) for sample in _images(samples)]


def answered(sample: Sample, answer: str) -> Sample:
    return Sample(sample.where, sample.image, sample.verb, sample.text, answer, None)


def _images(samples: Sequence[Sample]) -> list[Sample]:
    """One sample of each image."""
    return list({sample.image: sample for sample in samples}.values())
