"""Quantities as people write them: ``512MiB``, ``30s``, ``7d``, ``500 m2``."""

from __future__ import annotations

import re

from edge_rsvlm.errors import UsageError

_BYTES = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_SECONDS = {"ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_SQUARE_METRES = {"m2": 1.0, "ha": 1e4, "km2": 1e6}


def _parse(text: str, units: dict[str, float] | dict[str, int], example: str) -> float:
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*2?)\s*", text)
    if not match or match[2].lower() not in units or float(match[1]) == 0:
        raise UsageError(f"'{text}' is not a quantity", fix=f"write it like {example}")
    return float(match[1]) * units[match[2].lower()]


def parse_bytes(text: str) -> int:
    """``512MiB`` -> 536870912."""
    return int(_parse(text, _BYTES, "512MiB or 2GB"))


def parse_seconds(text: str) -> float:
    """``150ms`` -> 0.15. A unit is required: a bare number would be ambiguous."""
    return _parse(text, _SECONDS, "30s or 150ms")


def parse_area(text: str) -> float:
    """``2 ha`` -> 20000.0 square metres. A unit is required."""
    return _parse(text, _SQUARE_METRES, "500 m2 or 2 ha")


def format_bytes(count: int) -> str:
    """At three significant digits, in binary units."""
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 99.5 else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"
