"""Where the tensors of an adapter belong in a model, whatever version of transformers named them.

Names are tried as they are, then through the tables by which transformers renames old checkpoints, then as names
of one part of the model (an adapter trained on the text model alone).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from edge_rsvlm.errors import InputError

ORIGINAL_LLAVA = {
    "mm_projector.0.": "multi_modal_projector.linear_1.",
    "mm_projector.2.": "multi_modal_projector.linear_2.",
}
"""Modules named otherwise in the code that LLaVA and GeoChat were published with."""
LISTED = 8


class Names:
    """Names of a model of transformers; its tensors may have no data."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.tensors = dict(model.state_dict(keep_vars=True))
        self.recomputed = {name for name, _ in model.named_buffers()} - self.tensors.keys()
        """Buffers that no checkpoint needs to hold."""
        self._known = {f"{name}.weight" for name in self.modules} | self.tensors.keys() | self.recomputed
        self._renamings = [t for t in get_model_conversion_mapping(model) if isinstance(t, WeightRenaming)]
        self._parts = [n for n, m in self.modules.items() if isinstance(m, PreTrainedModel) and n]

    def locate(self, paths: Iterable[str], origin: Path) -> dict[str, str]:
        """Maps names of tensors (``MODULE.weight`` stands for the module) to the names they have in the model.

        Raises InputError that lists those without a place, or with several.
        """
        found = {path: self._direct(path) for path in sorted(set(paths))}
        lost = [path for path, name in found.items() if name is None]
        located = {path: name for path, name in found.items() if name is not None}
        if lost:
            located |= self._within_part(lost, origin)
        claimed: dict[str, str] = {}
        for path, name in located.items():
            if name in claimed:
                raise InputError(
                    f"{origin}: '{claimed[name]}' and '{path}' are both '{name}' in this model",
                    fix="remove one of them from the adapter",
                )
            claimed[name] = path
        return located

    def _direct(self, path: str) -> str | None:
        for old, new in ORIGINAL_LLAVA.items():
            path = path.replace(old, new)
        renamed = path
        for renaming in self._renamings:
            renamed, _ = renaming.rename_source_key(renamed)
        return next((name for name in (path, renamed) if name in self._known), None)

    def _within_part(self, paths: list[str], origin: Path) -> dict[str, str]:
        """All ``paths`` as names of the same part of the model."""
        places: dict[tuple[str, ...], str] = {}
        for part in self._parts:
            for drop in ("", "model."):
                names = [self._direct(f"{part}.{path.removeprefix(drop)}") for path in paths]
                if all(names):
                    places.setdefault(tuple(name for name in names if name), part)
        if len(places) == 1:
            return dict(zip(paths, next(iter(places)), strict=True))
        listed = ", ".join(f"'{path}'" for path in paths[:LISTED])
        more = f" and {len(paths) - LISTED} more" if len(paths) > LISTED else ""
        if places:
            raise InputError(
                f"{origin}: {listed}{more} could belong to {' or '.join(sorted(places.values()))}",
                fix="save the adapter from a PeftModel of the whole model, whose names say which",
            )
        raise InputError(
            f"{origin}: this model has no place for {listed}{more} (nearest: {self._nearest(paths[:LISTED])})",
            fix="use the checkpoint that the adapter was trained on, or correct those names",
        )

    def _nearest(self, paths: list[str]) -> str:
        near = [match for path in paths for match in difflib.get_close_matches(path, self._known, 1, 0.0)]
        return ", ".join(f"'{name}'" for name in dict.fromkeys(near))
