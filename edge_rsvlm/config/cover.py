"""The words in which changes are told: what covers the ground, and what an index of the spectrum says became of it."""

from __future__ import annotations

UNKNOWN = "unknown"
COVER = {
    "trees": ("trees",),
    "grass": ("grass",),
    "bare soil": ("bare soil",),
    "sealed ground": ("buildings", "pavement"),
    "water": ("water",),
    "sand": ("sand",),
}
"""What ground is told apart by, and the words that a model is asked with. A flat roof and a car park look alike from
above; more words (a field, a court, a pool) were right too seldom to help."""
VEGETATION = frozenset({"trees", "grass"})

LOST, GAINED = "vegetation lost", "vegetation gained"
APPEARED, GONE = "water appeared", "water gone"
BURNT = "burnt"
MEANINGS = (LOST, GAINED, APPEARED, GONE, BURNT)
