"""Names of changes and alerts that are the same wherever and whenever the same scenes are compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

CHANGE_DIGITS, ALERT_DIGITS = 16, 32
Identity = Sequence[str | int | float]
"""What a scene is known by: nothing of the machine that it lies on."""


def change_id(before: Identity, after: Identity, polygon: Mapping[str, Any]) -> str:
    """Of a polygon in pixels of the later scene, whose corners are whole numbers and so have no rounding."""
    return _digest([list(before), list(after), polygon["type"], polygon["coordinates"]])[:CHANGE_DIGITS]


def alert_id(rule: str, change: str) -> str:
    """Of the change with this id by a rule."""
    return _digest([rule, change])[:ALERT_DIGITS]


def _digest(value: Any) -> str:
    """SHA-256 of JSON, which writes every number one way."""
    return hashlib.sha256(json.dumps(value, separators=(",", ":"), ensure_ascii=True).encode()).hexdigest()
