"""Adapters that stay apart in a bundle: what each adds to a linear layer, y + (x A) B, for graphs that take A and B.

Only that can stay apart. A whole tensor, rows of an embedding or DoRA's magnitudes change what the base computes, and
must be merged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from edge_rsvlm.errors import InputError
from edge_rsvlm.export.adapters.reading import Adapter
from edge_rsvlm.export.adapters.resolve import Updates, resolve
from edge_rsvlm.export.adapters.updates import LowRank, Replace, Rows, Update

LISTED = 4


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


def keep_apart(name: str, adapter: Adapter, model: PreTrainedModel) -> KeptAdapter:
    """``adapter`` for ``model``, whose tensors may have no data.

    Raises InputError that names what cannot stay apart, as well as for everything that ``resolve`` refuses.
    """
    found = resolve([adapter], model)
    wrong = {path: reason for path, updates in found.updates.items() if (reason := _reason(path, updates, model))}
    if wrong:
        listed = ", ".join(f"'{path}' ({reason})" for path, reason in list(wrong.items())[:LISTED])
        more = f" and {len(wrong) - LISTED} more" if len(wrong) > LISTED else ""
        raise InputError(
            f"{adapter.folder}: only plain LoRA on linear layers can stay apart, not {listed}{more}",
            fix="merge this adapter (keep = false), or train it on linear layers only",
        )
    factors = {path: _factors(update) for path, (update,) in found.updates.items() if isinstance(update, LowRank)}
    return KeptAdapter(name, found.updates, factors, found.notes)


def _reason(path: str, updates: tuple[Update, ...], model: PreTrainedModel) -> str:
    """Why the updates of one tensor cannot stay apart; empty where they can."""
    for update in updates:
        if isinstance(update, Replace):
            return "the whole tensor was trained" if update.trained else "an embedding"
        if isinstance(update, Rows):
            return "rows of an embedding were trained"
        if not isinstance(update, LowRank):
            return "a bias was trained"
        if update.magnitude is not None:
            return "DoRA"
    layer = model.get_submodule(path.rpartition(".")[0])
    return "" if isinstance(layer, (nn.Linear, Conv1D)) else f"a {type(layer).__name__}"


def _factors(update: LowRank) -> Factors:
    scale = update.scale * update.weight
    up, down = update.up.float(), update.down.float()
    if update.columns_out:  # the weight is stored [in, out]
        return Factors(up.contiguous(), down * scale)
    return Factors(down.T.contiguous(), up.T * scale)
