"""Answers to a question about an image; a scene larger than a tile is asked tile by tile, and its tiles vote."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_rsvlm.config.task_specs import AnswerTask, GenerateTask, GgufTask
from edge_rsvlm.errors import InputError
from edge_rsvlm.pipeline.outcome import Emit, Outcome
from edge_rsvlm.pipeline.per_tile import EachTile, Kept, emit_tile, mapper_of
from edge_rsvlm.pipeline.runtime import Runtime
from edge_rsvlm.pipeline.stream import Seen, TileBatch, View
from edge_rsvlm.tasks.generate import Sampling


@dataclass
class AskOutcome(Outcome):
    """``answer`` is None when no pixel of the image is valid."""

    answer: str | None = None


Answers = Sequence[tuple[str, float]]
"""What may be the answer, with scores, best first."""


def ask(
    runtime: Runtime,
    task: GenerateTask | GgufTask | AnswerTask,
    view: View,
    question: str,
    sampling: Sampling | None,
    emit: Emit,
) -> EachTile[AskOutcome, Answers]:
    """Emits ``{"answer", "box"}`` per tile (box x, y, w, h in raster pixels); the outcome has the image's answer."""
    outcome = AskOutcome()
    mapper = mapper_of(view, outcome)
    votes = Votes()

    def use(seen: Seen, answers: Answers) -> None:
        emit_tile(emit, mapper, seen, said(answers, isinstance(task, AnswerTask)))
        votes.add(answers, seen.valid_px)

    def answers(tiles: TileBatch, kept: Kept) -> Sequence[Answers]:
        date = tiles.dates[0]
        if isinstance(task, AnswerTask):
            return runtime.answerer(task)(date.pixels_NCHW(kept), question)
        texts = runtime.generator("ask", task)(date.chosen(kept), question, sampling)
        return [[(text, 1.0)] for text in texts]

    def conclude() -> None:
        outcome.answer = votes.winner()

    return EachTile(outcome, view.size, answers, use, conclude)


def ask_features(
    runtime: Runtime, task: AnswerTask, features_RD: NDArray[np.float32], question: str, emit: Emit
) -> AskOutcome:
    """The answer from features of an image's regions; emits ``{"answer", "score"}``."""
    outcome = AskOutcome(processed_px=1.0)
    with outcome.clock("engine"):
        (answers,) = runtime.answerer(task)(features_RD[None], question)
    emit(said(answers, True), None)
    outcome.answer = answers[0][0]
    return outcome


def said(answers: Answers, scored: bool) -> dict[str, Any]:
    """The record of the best answer."""
    text, score = answers[0]
    return {"answer": text} | ({"score": round(float(score), 4)} if scored else {})


class Votes:
    """Answers of tiles, each weighted by its score and its valid area; spelling differences do not count.

    A tile votes for one spelling of a meaning, its best: together they could outvote the answer that it thinks best.
    """

    def __init__(self) -> None:
        self._by_meaning: dict[str, Counter[str]] = {}

    def add(self, answers: Answers, weight: float) -> None:
        best: dict[str, tuple[str, float]] = {}
        for text, score in answers:
            best.setdefault(" ".join(re.findall(r"\w+", text.casefold())) or text, (text, score))
        for meaning, (text, score) in best.items():
            self._by_meaning.setdefault(meaning, Counter())[text] += weight * score  # type: ignore[assignment]

    def winner(self) -> str | None:
        """The heaviest answer as it was spelt most; of equals, the first."""
        if not self._by_meaning:
            return None
        best = max(self._by_meaning.values(), key=lambda spellings: sum(spellings.values()))
        return max(best, key=lambda text: best[text])


def is_features(path: str) -> bool:
    """Whether a path names features of regions, which lie nowhere, and not an image."""
    return Path(path).suffix.lower() == ".npy"


def read_features(path: str) -> NDArray[np.float32]:
    """Features of regions [R, D] from a ``.npy`` file; InputError when it holds something else."""
    try:
        features = np.load(Path(path), allow_pickle=False)
    except (OSError, ValueError) as exc:
        raise InputError(
            f"{path}: cannot be read as region features ({exc})", fix="give a .npy of float32 [regions, size]"
        ) from exc
    if features.ndim == 3 and len(features) == 1:
        features = features[0]
    if features.ndim != 2 or features.dtype.kind != "f" or not features.size or not np.isfinite(features).all():
        raise InputError(
            f"{path}: holds {features.dtype} of shape {features.shape}, no region features",
            fix="give a .npy of finite float32 [regions, size]",
        )
    regions_RD: NDArray[np.float32] = features.astype(np.float32)
    return regions_RD
