"""Which band of a file shows what: by its names, its colour interpretation, or the usual orders."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from rasterio.enums import ColorInterp
from rasterio.windows import Window

SENTINEL_2_ROLES = {"B02": "blue", "B03": "green", "B04": "red", "B08": "nir", "B8A": "nir", "B12": "swir2"}
NIR_NAMES = ("nir", "near infrared", "near-infrared")
USUAL_ORDERS = {1: ("gray",), 2: ("gray", "unknown"), 3: ("red", "green", "blue"), 4: ("red", "green", "blue", "nir")}
ROLES = {
    ColorInterp.red: "red",
    ColorInterp.green: "green",
    ColorInterp.blue: "blue",
    ColorInterp.gray: "gray",
    ColorInterp.alpha: "alpha",
}
SAMPLE_PX = 64


def band_roles(dataset: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What each band shows, and notes for the user.

    Sentinel-2 names in the descriptions come first, then colour interpretation, then the usual orders. A role is given
    once, to the first band that may have it; other bands are "unknown".
    """
    described = [(d or "").strip() for d in dataset.descriptions]
    named = [SENTINEL_2_ROLES.get(d.upper()[:3], "unknown") for d in described]
    roles = _first_of_each(named if "red" in named else _usual_roles(dataset, described))
    if roles == ("red", "green", "blue", "alpha") and not _looks_like_a_mask(dataset, 4):
        return (*roles[:3], "nir"), ("its fourth band is marked as alpha but shows an image: read as near infrared",)
    return roles, ()


def roles_said(dataset: Any) -> bool:
    """Whether the file itself says which band is red; else roles are those of the usual order."""
    described = [SENTINEL_2_ROLES.get((d or "").strip().upper()[:3]) for d in dataset.descriptions]
    return "red" in described or ColorInterp.red in dataset.colorinterp


def _looks_like_a_mask(dataset: Any, band: int) -> bool:
    """Whether most of a sample is fully opaque or transparent. Aerial programmes ship near infrared marked as alpha."""
    opaque = 1.0 if dataset.dtypes[band - 1].startswith("float") else np.iinfo(dataset.dtypes[band - 1]).max
    extremes = pixels = 0
    for share in (0.2, 0.5, 0.8):
        col, row = int(share * max(dataset.width - SAMPLE_PX, 0)), int(share * max(dataset.height - SAMPLE_PX, 0))
        window = Window(col, row, min(SAMPLE_PX, dataset.width), min(SAMPLE_PX, dataset.height))
        values = dataset.read(band, window=window)
        extremes += int(((values == 0) | (values == opaque)).sum())
        pixels += values.size
    return extremes >= pixels / 2


def _usual_roles(dataset: Any, described: list[str]) -> list[str]:
    roles = [ROLES.get(c, "unknown") for c in dataset.colorinterp]
    roles = ["nir" if d.lower() in NIR_NAMES else role for role, d in zip(roles, described, strict=True)]
    optical = [i for i, role in enumerate(roles) if role != "alpha"]
    if "red" not in roles and len(optical) in USUAL_ORDERS:
        for i, role in zip(optical, USUAL_ORDERS[len(optical)], strict=True):
            roles[i] = role
    elif "red" not in roles:
        # Which of many unnamed bands is visible light is not for us to guess.
        roles = ["unknown" if role == "gray" else role for role in roles]
    elif len(optical) == 4 and roles.count("unknown") == 1 and "nir" not in roles:
        roles[roles.index("unknown")] = "nir"
    return roles


def _first_of_each(roles: list[str]) -> tuple[str, ...]:
    return tuple("unknown" if role in roles[:i] else role for i, role in enumerate(roles))


def palette(dataset: Any) -> NDArray[np.uint8] | None:
    """Colours [256, 3] of an indexed image."""
    if dataset.colorinterp[0] != ColorInterp.palette or dataset.dtypes[0] != "uint8":
        return None
    colours = np.zeros((256, 3), np.uint8)
    for index, colour in dataset.colormap(1).items():
        if index < 256:
            colours[index] = colour[:3]
    return colours
