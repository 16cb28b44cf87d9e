"""A change in one plain sentence, from what was measured and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edge_rsvlm.config.cover import APPEARED, BURNT, GAINED, GONE, LOST, UNKNOWN

HECTARE_FROM_M2, KM2_FROM_M2 = 100_000, 10_000_000
"""Areas from here on are told in the larger unit."""
CLAUSES = {
    LOST: ("ndvi", "the vegetation index fell by {0:.2f}"),
    GAINED: ("ndvi", "the vegetation index rose by {0:.2f}"),
    APPEARED: ("ndwi", "the water index rose by {0:.2f}, as where water appears"),
    GONE: ("ndwi", "the water index fell by {0:.2f}, as where water goes"),
    BURNT: ("nbr", "the burn ratio fell by {0:.2f}, as after a fire"),
}
"""By what the spectrum says: the index that says so, and how it is told."""


def sentence(record: Mapping[str, Any]) -> str:
    """Of a change with its area, ``from``, ``to`` and, where it was measured, ``spectral``."""
    spectral = record.get("spectral")
    clause = ""
    if spectral is not None and spectral["meaning"] is not None:
        index, text = CLAUSES[spectral["meaning"]]
        clause = f"; {text.format(abs(spectral[index]['difference']))}"
    return f"{area_words(record)}{_became(record['from'], record['to'])}{clause}."


def _became(before: str, after: str) -> str:
    if UNKNOWN not in (before, after):
        return f" of {before} became {after}" if before != after else f" of {before} changed and is {after} still"
    if before != UNKNOWN:
        return f" of {before} changed"
    return f" changed and looks like {after} now" if after != UNKNOWN else " changed"


def area_words(record: Mapping[str, Any]) -> str:
    """About three digits of it."""
    area_m2 = record["area_m2"]
    if area_m2 is None:
        return f"About {_digits(record['area_px'])} pixels" if record["area_px"] != 1 else "About 1 pixel"
    if area_m2 >= KM2_FROM_M2:
        return f"About {_digits(area_m2 / 1e6)} km2"
    if area_m2 >= HECTARE_FROM_M2:
        return f"About {_digits(area_m2 / 1e4)} ha"
    return f"About {_digits(area_m2)} m2"


def _digits(value: float) -> str:
    """Three significant digits, with commas between thousands."""
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.0f}" if rounded >= 100 else f"{rounded:g}"
