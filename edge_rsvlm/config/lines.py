"""Where in a TOML file a value stands, for errors that people can act on."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Keys = Sequence[str | int]
"""Keys of tables and places in arrays, from the document down, as pydantic names them."""


def line_of(text: str, keys: Keys) -> int:
    """The line, from 1, on which ``keys`` or the last of them that is there begins; ``text`` is valid TOML.

    The parser keeps no places. But a file that is cut after a whole statement is TOML as well, so a value begins on the
    line after the last cut that parses without it.
    """
    lines, begins = text.splitlines(keepends=True), 1
    found, deepest = 1, 0
    for count in range(1, len(lines) + 1):
        try:
            document = tomllib.loads("".join(lines[:count]))
        except tomllib.TOMLDecodeError:
            continue  # within a statement of several lines
        depth = _depth(document, keys)
        if depth > deepest:
            found, deepest = begins, depth
        if deepest == len(keys):
            break
        begins = count + 1
    return found


def _depth(document: Mapping[str, Any], keys: Keys) -> int:
    """How many of ``keys`` lead somewhere."""
    here: Any = document
    for depth, key in enumerate(keys):
        inside = key in here if isinstance(here, dict) else isinstance(here, list) and _counts(key, here)
        if not inside:
            return depth
        here = here[key]
    return len(keys)


def _counts(key: str | int, items: list[Any]) -> bool:
    return isinstance(key, int) and key < len(items)
