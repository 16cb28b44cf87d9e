"""What an adapter does to one tensor, and the merge.

A merged tensor is W + sum_i w_i * change_i(W), over adapters i with the weights w_i that the user gives, each change
computed from the unchanged W:

    LoRA   s B A           s = alpha / rank (Hu et al. 2021); rsLoRA: alpha / sqrt(rank) (Kalajdzievski 2023)
    DoRA   m V / |V| - W   V = W + s B A, |V| and m per output channel (Liu et al. 2024)

This is not peft's ``add_weighted_adapter(..., "linear")``, which sums A and B apart and so adds cross terms. Whole
tensors (``modules_to_save``, biases) and rows of an embedding (``trainable_token_indices``) stand in for W.
All is float32, a block of rows at a time, so that a merge needs little more than its result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from edge_rsvlm.errors import InputError

BLOCK_BYTES = 32 << 20


@dataclass(frozen=True)
class LowRank:
    """``scale * up @ down`` [rows, columns], laid out as the tensor flattened after its first dimension.

    ``magnitude`` (DoRA) has one value per output channel: per row, or per column where ``columns_out`` (embeddings and
    transposed linear layers).
    """

    adapter: str
    weight: float
    scale: float
    up: Tensor = field(repr=False)
    down: Tensor = field(repr=False)
    columns_out: bool
    magnitude: Tensor | None = field(default=None, repr=False)

    def delta(self, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of scale * up @ down, without the adapter's weight."""
        return (self.up[start:stop].float() @ self.down.float()).mul_(self.scale)

    def factor(self, base: Tensor) -> Tensor | None:
        """DoRA's m / |V| for the flattened ``base``: [rows, 1] or [1, columns]; None for plain LoRA."""
        if self.magnitude is None:
            return None
        squares = torch.zeros(base.shape[1] if self.columns_out else base.shape[0])
        for start, stop in _blocks(base):
            squared = (base[start:stop].float() + self.delta(start, stop)).square_()
            if self.columns_out:
                squares += squared.sum(0)
            else:
                squares[start:stop] = squared.sum(1)
        factor = self.magnitude.float().reshape(-1) / squares.sqrt()
        return factor[None] if self.columns_out else factor[:, None]

    def change(self, block: Tensor, start: int, factor: Tensor | None) -> Tensor:
        delta = self.delta(start, start + len(block))
        if factor is None:
            return delta.mul_(self.weight)
        share = factor if self.columns_out else factor[start : start + len(block)]
        return ((block + delta) * share - block).mul_(self.weight)


@dataclass(frozen=True)
class Shift:
    """``scale * values`` added to a bias (LoRA with a bias on B)."""

    adapter: str
    weight: float
    scale: float
    values: Tensor = field(repr=False)

    def factor(self, base: Tensor) -> None:
        return None

    def change(self, block: Tensor, start: int, factor: Tensor | None) -> Tensor:
        return self.values[start : start + len(block), None].float() * (self.scale * self.weight)


@dataclass(frozen=True)
class Replace:
    """The whole tensor; ``trained`` is False for the base's own, which peft saves beside a LoRA on embeddings."""

    adapter: str
    weight: float
    values: Tensor = field(repr=False)
    trained: bool


@dataclass(frozen=True)
class Rows:
    """``values`` [n, columns] instead of the rows ``index``."""

    adapter: str
    weight: float
    index: tuple[int, ...]
    values: Tensor = field(repr=False)


Update = LowRank | Shift | Replace | Rows


def merge(tensor: Tensor, updates: Sequence[Update], dtype: torch.dtype | None = None) -> Tensor:
    """The merged tensor in ``dtype``, or in its own.

    Raises InputError when the result is not finite (a broken adapter, or values too large for ``dtype``).
    """
    source = next((u.values for u in updates if isinstance(u, Replace)), tensor)
    wanted = dtype or tensor.dtype
    if not tensor.is_floating_point() or all(isinstance(u, Replace) for u in updates):
        return source.to(wanted if tensor.is_floating_point() else tensor.dtype)
    base = source.reshape(len(source), -1)
    rows = [u for u in updates if isinstance(u, Rows)]
    changes = [(u, u.factor(base)) for u in updates if isinstance(u, (LowRank, Shift))]
    merged = torch.empty(tensor.shape, dtype=wanted)
    flat = merged.view(len(source), -1)
    for start, stop in _blocks(base):
        block = base[start:stop].to(torch.float32, copy=True)
        for replaced in rows:
            _write_rows(block, start, replaced)
        flat[start:stop] = sum((u.change(block, start, factor) for u, factor in changes), start=block)
        if not torch.isfinite(flat[start:stop]).all():
            raise InputError(
                f"merged with {', '.join(sorted({u.adapter for u in updates}))}, values are not finite in {wanted}",
                fix="check the adapter for NaN, lower its weight, or export in float32",
            )
    return merged


def _write_rows(block: Tensor, start: int, rows: Rows) -> None:
    for row, values in zip(rows.index, rows.values, strict=True):
        if start <= row < start + len(block):
            block[row - start] = values.float()


def _blocks(flat: Tensor) -> list[tuple[int, int]]:
    """Ranges of rows of about BLOCK_BYTES in float32."""
    step = max(1, BLOCK_BYTES // max(1, 4 * flat.shape[1]))
    return [(start, min(start + step, len(flat))) for start in range(0, len(flat), step)]


def same(one: Sequence[Update], other: Sequence[Update]) -> bool:
    """Whether two tensors of equal values stay equal."""
    return len(one) == len(other) and all(_equal(a, b) for a, b in zip(one, other, strict=True))


def _equal(a: Update, b: Update) -> bool:
    if isinstance(a, LowRank) and isinstance(b, LowRank):
        plain = a.magnitude is None and b.magnitude is None
        return plain and a.scale == b.scale and torch.equal(a.up, b.up) and torch.equal(a.down, b.down)
    if isinstance(a, Replace) and isinstance(b, Replace):
        return torch.equal(a.values, b.values)
    return isinstance(a, Rows) and isinstance(b, Rows) and a.index == b.index and torch.equal(a.values, b.values)
