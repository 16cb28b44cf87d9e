"""Which tensors of a model some adapters change, and how."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from edge_rsvlm.errors import InputError
from edge_rsvlm.export.adapters.names import Names
from edge_rsvlm.export.adapters.reading import Adapter, Factors
from edge_rsvlm.export.adapters.updates import LowRank, Replace, Rows, Shift, Update, same

Updates = dict[str, tuple[Update, ...]]
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Resolution:
    """``updates`` by name in the model's state dict.

    ``untied`` lists pairs (name, source): the model has one tensor for both, the merged model needs two, since peft
    adapts only one use of it. Build the merged model with ``tie_word_embeddings`` off, and fill ``name`` with the
    source's tensor merged by its own updates. ``notes`` say what of the adapters has no effect, and why.
    """

    updates: Updates
    untied: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]


def resolve(adapters: Sequence[Adapter], model: PreTrainedModel) -> Resolution:
    """Match every tensor of ``adapters`` to ``model``, whose tensors may have no data.

    Raises InputError that names tensors without a place, of the wrong shape, or on which adapters disagree.
    """
    names = Names(model)
    found: dict[str, list[Update]] = {}
    notes: list[str] = []
    for adapter in adapters:
        for name, update in _updates(adapter, names, notes):
            found.setdefault(name, []).append(update)
    updates = {name: _agree(name, listed) for name, listed in found.items()}
    untied = _part_tied(model, updates)
    return Resolution({name: u for name, u in sorted(updates.items()) if u}, untied, tuple(notes))


def _updates(adapter: Adapter, names: Names, notes: list[str]) -> Iterable[tuple[str, Update]]:
    modules = (*adapter.factors, *adapter.rows)
    located = names.locate([f"{path}.weight" for path in modules] + [*adapter.whole], adapter.folder)
    for path, factors in adapter.factors.items():
        module = located[f"{path}.weight"].removesuffix(".weight")
        if _never_called(module, adapter, names, located):
            notes.append(f"{adapter.folder}: the LoRA on '{module}' has no effect (attention reads that weight itself)")
        else:
            yield from _factor_updates(adapter, path, factors, module, names)
    for path, values in adapter.rows.items():
        name = located[f"{path}.weight"]
        index = adapter.config.token_rows(path)
        _fits(adapter, path, (len(index), *names.tensors[name].shape[1:]), values)
        yield name, Rows(adapter.name, adapter.weight, index, values)
    for path, stored in adapter.whole.items():
        if located[path] in names.recomputed:
            continue
        if located[path] not in names.tensors:
            raise InputError(f"{adapter.folder}: '{path}' is no tensor of this model", fix="remove it from the adapter")
        _fits(adapter, path, tuple(names.tensors[located[path]].shape), stored.values)
        yield located[path], Replace(adapter.name, adapter.weight, stored.values, stored.trained)


def _never_called(module: str, adapter: Adapter, names: Names, located: dict[str, str]) -> bool:
    """peft's LoRA on the output layer of ``nn.MultiheadAttention`` works only if the attention is a target too."""
    parent = module.rpartition(".")[0]
    wrapped = {located[f"{path}.weight"] for path in adapter.factors}
    return isinstance(names.modules.get(parent), nn.MultiheadAttention) and f"{parent}.weight" not in wrapped


def _factor_updates(
    adapter: Adapter, path: str, factors: Factors, module: str, names: Names
) -> Iterable[tuple[str, Update]]:
    layer = names.modules[module]
    if not _supported(layer, factors):
        raise InputError(
            f"{adapter.folder}: the LoRA on '{path}' is on a {type(layer).__name__}, which cannot be merged",
            fix="leave that module out of target_modules",
        )
    a, b = factors.pair
    columns_out = isinstance(layer, (nn.Embedding, Conv1D))
    up, down = (a.T, b.T) if columns_out else (b.flatten(1), a.flatten(1))
    name = f"{module}.in_proj_weight" if isinstance(layer, nn.MultiheadAttention) else f"{module}.weight"
    shape = names.tensors[name].shape
    _fits(adapter, path, (shape[0], shape[1:].numel()), torch.empty(len(up), down.shape[1], device="meta"))
    magnitude = factors.parts.get("lora_magnitude_vector")
    if magnitude is not None:
        _fits(adapter, path, (shape[1] if columns_out else shape[0],), magnitude.flatten())
    inside_attention = isinstance(names.modules[module.rpartition(".")[0]], nn.MultiheadAttention)
    # peft adds a LoRA on the output layer of an attention twice, in its forward (so in training) as in its merge.
    scale = adapter.config.scale(path) * (2 if inside_attention else 1)
    yield name, LowRank(adapter.name, adapter.weight, scale, up, down, columns_out, magnitude)
    bias = factors.parts.get("lora_B.bias")
    if bias is not None:
        if f"{module}.bias" not in names.tensors:
            raise InputError(
                f"{adapter.folder}: the LoRA on '{path}' adds a bias, which this layer does not have",
                fix="train with lora_bias=False",
            )
        yield f"{module}.bias", Shift(adapter.name, adapter.weight, scale, bias)


def _supported(layer: nn.Module, factors: Factors) -> bool:
    if isinstance(layer, CONVOLUTIONS):
        return layer.groups == 1 and set(layer.dilation) == {1}
    return (
        isinstance(layer, nn.Embedding)
        if factors.embedding
        else isinstance(layer, (nn.Linear, Conv1D, nn.MultiheadAttention))
    )


def _fits(adapter: Adapter, path: str, wanted: tuple[int, ...], values: Tensor) -> None:
    if tuple(values.shape) != wanted:
        raise InputError(
            f"{adapter.folder}: '{path}' has shape {list(values.shape)}, the model {list(wanted)}",
            fix="use the checkpoint that it was trained on (where words were added: resize the embeddings and save it)",
        )


def _agree(name: str, listed: list[Update]) -> tuple[Update, ...]:
    """The updates of one tensor in order, without repeated copies; InputError where adapters disagree."""
    whole = [u for u in listed if isinstance(u, Replace)]
    trained = {u.adapter for u in whole if u.trained}
    rows = [u for u in listed if isinstance(u, Rows)]
    others = [u for u in listed if not isinstance(u, Replace)]
    taken = [row for u in rows for row in u.index]
    if (
        any(not torch.equal(u.values, whole[0].values) for u in whole)
        or (trained and any({u.adapter} != trained for u in others))
        or len(set(taken)) < len(taken)
        or (rows and len(others) > len(rows))
    ):
        adapters = ", ".join(sorted({u.adapter for u in listed}))
        raise InputError(f"the adapters {adapters} set '{name}' differently", fix="merge one of them only")
    replacing: list[Replace | Rows] = [*rows, *(u for u in whole if u.trained)]
    for update in replacing:
        if update.weight != 1:
            raise InputError(
                f"{update.adapter} replaces values of '{name}', which cannot be done by a weight of {update.weight:g}",
                fix="give that adapter the weight 1",
            )
    return (*whole[:1], *others)


def _part_tied(model: PreTrainedModel, updates: dict[str, tuple[Update, ...]]) -> tuple[tuple[str, str], ...]:
    """Pairs of tied tensors that adapters pull apart; what concerns both is written to both in ``updates``."""
    pairs = tuple(model.all_tied_weights_keys.items())
    for name, source in pairs:
        one, other = updates.get(name, ()), updates.get(source, ())
        shared = tuple(u for u in (*one, *other) if isinstance(u, Replace) and not u.trained)[:1]
        if not any(isinstance(u, Replace) for u in one):
            one = (*shared, *one)
        if not any(isinstance(u, Replace) for u in other):
            other = (*shared, *other)
        if not any(isinstance(u, Rows) for u in one) and model.config.to_dict().get("tie_word_embeddings"):
            one = (*one, *(u for u in other if isinstance(u, Rows)))
        updates[name], updates[source] = one, other
    return tuple((n, s) for n, s in pairs if not same(updates[n], updates[s]))
