"""Adapters that stay apart in a bundle: what each adds to a linear layer, y + (x A) B, for graphs that take A and B.

Only that can stay apart. A whole tensor, rows of an embedding or DoRA's magnitudes change what the base computes, and
must be merged. Copies of the base's own tensors, which peft saves beside a LoRA on an output layer, change nothing.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from edge_rsvlm.errors import InputError, UsageError
from edge_rsvlm.export.adapters.reading import Adapter
from edge_rsvlm.export.adapters.resolve import Updates, resolve
from edge_rsvlm.export.adapters.updates import LowRank, Replace, Rows, Shift, Update
from edge_rsvlm.export.checkpoint.reading import LazyTensor

LISTED = 4
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"


@dataclass(frozen=True)
class Factors:
    """``a`` [in, rank] and ``b`` [rank, out], float32; scale and weight of the adapter are in ``b``."""

    a: Tensor = field(repr=False)
    b: Tensor = field(repr=False)


@dataclass(frozen=True)
class KeptAdapter:
    """One adapter by its name in the bundle.

    ``factors`` are by the name of the layer's weight in the model's state dict, ``updates`` the same as ``Unmerged``
    takes them. ``notes`` say what of it has no effect.
    """

    name: str
    updates: Updates
    factors: Mapping[str, Factors]
    notes: tuple[str, ...]


def check_names(names: Sequence[str]) -> None:
    """UsageError for names that no file can have everywhere, and for one that two adapters share."""
    for name in names:
        if not re.fullmatch(NAME, name):
            raise UsageError(f"an adapter cannot be named '{name}'", fix='give it a name = "..." of A-Z a-z 0-9 . _ -')
    twice = sorted(name for name, count in Counter(name.casefold() for name in names).items() if count > 1)
    if twice:
        raise UsageError(f"two adapters are named {', '.join(twice)}", fix='give one of them another name = "..."')


def keep_apart(name: str, adapter: Adapter, model: PreTrainedModel, tensors: Mapping[str, LazyTensor]) -> KeptAdapter:
    """``adapter`` for ``model``, whose tensors may have no data: those are in ``tensors``, by the same names.

    Raises InputError that names what cannot stay apart, as well as for everything that ``resolve`` refuses.
    """
    found = resolve([adapter], model)
    reasons = {path: _reason(path, updates, model, tensors) for path, updates in found.updates.items()}
    wrong = [f"'{path}' ({reason})" for path, reason in reasons.items() if reason]
    if wrong:
        listed = ", ".join(wrong[:LISTED])
        more = f" and {len(wrong) - LISTED} more" if len(wrong) > LISTED else ""
        raise InputError(
            f"{adapter.folder}: only plain LoRA on linear layers can stay apart, not {listed}{more}",
            fix="merge this adapter (keep = false), or train it on linear layers only",
        )
    factors = {
        path: _factors(update)
        for path, updates in found.updates.items()
        for update in updates
        if isinstance(update, LowRank)
    }
    return KeptAdapter(name, found.updates, factors, found.notes)


def _reason(path: str, updates: tuple[Update, ...], model: PreTrainedModel, tensors: Mapping[str, LazyTensor]) -> str:
    """Why the updates of one tensor cannot stay apart; empty where they can."""
    for update in updates:
        if isinstance(update, Replace) and not torch.equal(update.values.float(), tensors[path].read().float()):
            return "the whole tensor was trained"
        if isinstance(update, Rows):
            return "rows of an embedding were trained"
        if isinstance(update, Shift):
            return "a bias was trained"
        if isinstance(update, LowRank) and update.magnitude is not None:
            return "DoRA"
    layer = model.get_submodule(path.rpartition(".")[0])
    linear = isinstance(layer, (nn.Linear, Conv1D)) or not any(isinstance(update, LowRank) for update in updates)
    return "" if linear else type(layer).__name__


def _factors(update: LowRank) -> Factors:
    scale = update.scale * update.weight
    up, down = update.up.float(), update.down.float()
    if update.columns_out:  # the weight is stored [in, out]
        return Factors(up.contiguous(), down * scale)
    return Factors(down.T.contiguous(), up.T * scale)
