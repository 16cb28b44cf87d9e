"""From the names in a checkpoint file to those of the transformers class, by transformers' own renaming tables.

transformers 4.x and 5.x, base and task models, and single classes all have names of their own; the tables that
``from_pretrained`` applies are used here, but what it reports as a warning is an error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from edge_rsvlm.errors import InputError

T = TypeVar("T", bound=Any)

COMPUTED = re.compile(
    r"(^|\.)(position_ids|token_type_ids|inv_freq|original_inv_freq|num_batches_tracked|relative_position_index)$"
)
"""Buffers that follow from the config: some versions store them, others do not."""
NAMES_SHOWN = 8


def match_names(model: nn.Module, stored: Mapping[str, T], computed: Mapping[str, T], folder: Path) -> dict[str, T]:
    """``stored`` by the names of ``model.state_dict()``; ``computed`` buffers where the files have none.

    ``model`` may be without data. InputError names the keys that do not fit.
    """
    wanted: dict[str, torch.Tensor] = model.state_dict()
    new_names = _new_names(model, list(stored), wanted)
    found: dict[str, T] = {}
    problems: dict[str, list[str]] = {"unknown": [], "given twice": [], "of another shape": [], "missing": []}
    for old, new in new_names.items():
        if new not in wanted:
            if not _ignored(model, old, new):
                problems["unknown"].append(old)
        elif new in found:
            problems["given twice"].append(f"{old} as {new}")
        elif tuple(stored[old].shape) != tuple(wanted[new].shape):
            problems["of another shape"].append(
                f"{old} {tuple(stored[old].shape)} for {new} {tuple(wanted[new].shape)}"
            )
        else:
            found[new] = stored[old]
    _tie(model, found, folder)
    found |= {name: computed[name] for name in wanted if name not in found and COMPUTED.search(name)}
    problems["missing"] = [name for name in wanted if name not in found]
    _raise_if_any(problems, model, folder)
    return {name: found[name] for name in wanted}


def _new_names(model: nn.Module, names: list[str], wanted: dict[str, torch.Tensor]) -> dict[str, str]:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    table = get_model_conversion_mapping(model)
    renamings = [entry for entry in table if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in table if isinstance(entry, WeightConverter)]
    new_names = {}
    for name in names:
        new, converter = rename_source_key(name, renamings, converters, model.base_model_prefix, wanted)
        if new not in wanted and name in wanted:
            new, converter = name, None
        if converter is not None:
            raise InputError(
                f"'{name}' would have to be merged or split ({converter})",
                fix="load the checkpoint in transformers and save it again with save_original_format=False",
            )
        new_names[name] = new
    return new_names


def _ignored(model: nn.Module, old: str, new: str) -> bool:
    """Known to be of no use, by us or by the transformers class."""
    patterns = model._keys_to_ignore_on_load_unexpected or ()
    return bool(COMPUTED.search(old)) or any(re.search(pattern, new) for pattern in patterns)


def _tie(model: nn.Module, found: dict[str, T], folder: Path) -> None:
    """Give tied parameters the one tensor that is there. Two different ones contradict the config."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    for names in groups.values():
        there = [name for name in names if name in found]
        for other in there[1:]:
            if not torch.equal(found[there[0]].read(), found[other].read()):
                raise InputError(
                    f"{folder}: the config ties '{there[0]}' to '{other}', but their tensors differ",
                    fix="set tie_word_embeddings to false in config.json if they belong apart",
                )
        if there:
            found |= dict.fromkeys(names, found[there[0]])


def _raise_if_any(problems: Mapping[str, list[str]], model: nn.Module, folder: Path) -> None:
    lines = [
        f"{len(names)} {what} ({', '.join(names[:NAMES_SHOWN])}{', ...' if len(names) > NAMES_SHOWN else ''})"
        for what, names in problems.items()
        if names
    ]
    if lines:
        raise InputError(
            f"{folder}: weights do not fit {type(model).__name__}: {'; '.join(lines)}",
            fix="check config.json against the weights; nothing may be left out or made up",
        )
