"""Which token comes next: the likeliest one, the likeliest sentence, or one drawn by chance.

Letters: N sequences, B beams, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_rsvlm.errors import UsageError
from edge_rsvlm.types import Advance

Tokens = NDArray[np.int64]
Logits = NDArray[np.float32]


@dataclass(frozen=True)
class Stop:
    """A sequence ends with any of ``eos_ids``, or after ``max_tokens``."""

    eos_ids: tuple[int, ...]
    max_tokens: int


@dataclass(frozen=True)
class Sampling:
    """Tokens are drawn from the smallest set whose probability reaches ``top_p`` (Holtzman et al. 2020, "The Curious
    Case of Neural Text Degeneration"), at ``temperature``. One seed gives one answer, whatever else is in the batch.

    Temperature 0 draws nothing: the task's own search answers. ``max_tokens`` None is the task's own limit.
    """

    temperature: float
    top_p: float = 1.0
    seed: int = 0
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 100:
            raise UsageError(f"temperature {self.temperature:g} is outside 0 ... 100", fix="1 is the model's own")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p {self.top_p:g} is outside 0 ... 1", fix="1 keeps every token")
        if self.seed < 0:
            raise UsageError(f"seed {self.seed} is negative", fix="give a whole number from 0")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise UsageError(f"{self.max_tokens} tokens are no answer", fix="ask for at least 1")


class RepetitionPenalty:
    """Makes tokens that were read or written less likely; see the manifest's GenerateTask."""

    def __init__(self, penalty: float, read_S: Tokens, advance: Advance) -> None:
        self._penalty, self._read_S, self._advance = penalty, read_S, advance
        self._seen_NV = np.zeros((0, 0), bool)

    def first(self, logits_NV: Logits) -> Logits:
        """The logits after the prompt ``read_S``, which all sequences share."""
        self._seen_NV = np.zeros(logits_NV.shape, bool)
        self._seen_NV[:, self._read_S[self._read_S < logits_NV.shape[1]]] = True
        return self._penalised(logits_NV)

    def advance(self, tokens_M: Tokens, rows_M: Tokens) -> Logits:
        self._seen_NV = self._seen_NV[rows_M]
        self._seen_NV[np.arange(len(tokens_M)), tokens_M] = True
        return self._penalised(self._advance(tokens_M, rows_M))

    def _penalised(self, logits_NV: Logits) -> Logits:
        penalty = np.float32(self._penalty)
        less_NV = np.where(logits_NV < 0, logits_NV * penalty, logits_NV / penalty)
        penalised: Logits = np.where(self._seen_NV, less_NV, logits_NV)
        return penalised


def greedy(logits_NV: Logits, advance: Advance, stop: Stop) -> list[Tokens]:
    """The likeliest token at every step."""
    return _token_by_token(logits_NV, advance, stop, lambda logits: logits.argmax(axis=1))


def sample(logits_NV: Logits, advance: Advance, stop: Stop, sampling: Sampling) -> list[Tokens]:
    """Every token drawn by chance. The sequences of a batch share the draws, so that each is as if it were alone."""
    chance = np.random.default_rng(sampling.seed)

    def draw(logits_NV: Logits) -> Tokens:
        level = chance.random()
        return np.array([_draw(logits_V, sampling, level) for logits_V in logits_NV], np.int64)

    return _token_by_token(logits_NV, advance, stop, draw)


def _draw(logits_V: Logits, sampling: Sampling, level: float) -> int:
    scaled = logits_V.astype(np.float64)
    scaled = (scaled - scaled.max()) / sampling.temperature
    probability = np.exp(scaled) / np.exp(scaled).sum()
    order = np.argsort(-probability, kind="stable")
    reached = np.cumsum(probability[order])
    kept = reached[: int(np.searchsorted(reached, sampling.top_p)) + 1]
    return int(order[min(int(np.searchsorted(kept, level * kept[-1], side="right")), len(kept) - 1)])


def follow(logits_1V: Logits, advance: Advance, answer_T: Tokens) -> Logits:
    """Logits [T, V] by which each token of a given answer would be chosen after those before it."""
    row = np.zeros(1, np.int64)
    return np.concatenate([logits_1V, *(advance(answer_T[t : t + 1], row) for t in range(len(answer_T) - 1))])


def _token_by_token(
    logits_NV: Logits, advance: Advance, stop: Stop, choose: Callable[[Logits], Tokens]
) -> list[Tokens]:
    """Few calls of NumPy: beside a small model each of them takes a hundredth of a token."""
    rows_N, ends = np.arange(len(logits_NV)), frozenset(stop.eos_ids)
    chosen: list[Tokens] = []
    done: set[int] = set()
    while True:
        token_N = choose(logits_NV)
        if done:
            token_N[list(done)] = stop.eos_ids[0]
        chosen.append(token_N)
        for n, token in enumerate(token_N.tolist()):
            if token in ends:
                done.add(n)
        if len(done) == len(rows_N) or len(chosen) == stop.max_tokens:
            return list(np.stack(chosen, axis=1))
        logits_NV = advance(token_N, rows_N)


def beam_search(logits_NV: Logits, advance: Advance, stop: Stop, *, beams: int, length_penalty: float) -> list[Tokens]:
    """The tokens of the best beam of each sequence, by log-probability / length ** ``length_penalty``.

    A finished beam stays among the others and costs nothing more. Cut sequences count like finished ones.
    """
    count, rows = len(logits_NV), np.arange(len(logits_NV))[:, None]
    # All beams of a sequence start equal: only the first may propose, or they would stay equal.
    total_NB = np.full((count, beams), -np.inf, np.float32)
    total_NB[:, 0] = 0.0
    log_NBV = np.repeat(_log_softmax(logits_NV)[:, None], beams, axis=1)
    row_NB = np.repeat(rows, beams, axis=1)  # of the logits' batch that each beam continues
    tokens_NBT = np.zeros((count, beams, 0), np.int64)
    done_NB = np.zeros((count, beams), bool)
    length_NB = np.zeros((count, beams), np.int64)
    while True:
        candidate = total_NB[..., None] + _only_eos_after_end(log_NBV, done_NB, stop.eos_ids[0])
        flat = candidate.reshape(count, -1)
        best = np.stack([_best(row, beams) for row in flat])
        parent, token = np.divmod(best, log_NBV.shape[2])
        total_NB = flat[rows, best]
        length_NB = length_NB[rows, parent] + ~done_NB[rows, parent]
        tokens_NBT = np.concatenate([tokens_NBT[rows, parent], token[..., None]], axis=2)
        done_NB = done_NB[rows, parent] | np.isin(token, stop.eos_ids)
        if done_NB.all() or tokens_NBT.shape[2] == stop.max_tokens:
            break
        log_NV = _log_softmax(advance(token.ravel(), row_NB[rows, parent].ravel()))
        log_NBV = log_NV.reshape(count, beams, -1)
        row_NB = np.arange(count * beams).reshape(count, beams)
    ranked = np.argmax(total_NB / np.maximum(length_NB, 1) ** length_penalty, axis=1)
    return [tokens_NBT[n, b] for n, b in enumerate(ranked)]


def _log_softmax(logits_NV: Logits) -> Logits:
    shifted = logits_NV - logits_NV.max(axis=1, keepdims=True)
    log_NV: Logits = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return log_NV


def _only_eos_after_end(log_NBV: Logits, done_NB: NDArray[np.bool_], eos_id: int) -> Logits:
    """A finished beam continues with the end token alone, at no cost."""
    frozen: Logits = log_NBV.copy()
    frozen[done_NB] = -np.inf
    frozen[done_NB, eos_id] = 0.0
    return frozen


def _best(scores_M: Logits, count: int) -> Tokens:
    """Indices of the ``count`` highest, best first, of equals the first; sorts no more than it must."""
    if count < len(scores_M):
        least = np.partition(scores_M, -count)[-count]
        kept = np.flatnonzero(scores_M >= least)
    else:
        kept = np.arange(len(scores_M))
    order: Tokens = kept[np.argsort(-scores_M[kept], kind="stable")][:count]
    return order
