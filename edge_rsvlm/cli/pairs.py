"""Pairs of dates from two arguments."""

from __future__ import annotations

from pathlib import Path

from edge_rsvlm.errors import UsageError
from edge_rsvlm.raster.inputs import Source, list_inputs


def list_pairs(before: str, after: str) -> list[tuple[Source, Source]]:
    """Two single images pair whatever they are called; several pair by file name, and all must."""
    earlier, later = list_inputs([before]), list_inputs([after])
    if len(earlier) == len(later) == 1:
        return [(earlier[0], later[0])]
    by_name = {Path(source.name).name: source for source in earlier}
    names = [Path(source.name).name for source in later]
    alone = sorted(set(names) ^ by_name.keys())
    if alone:
        raise UsageError(f"'{alone[0]}' is in only one of {before} and {after}", fix="give both dates the same name")
    return [(by_name[name], source) for name, source in zip(names, later, strict=True)]
