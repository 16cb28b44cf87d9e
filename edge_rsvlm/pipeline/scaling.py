"""From the values of a raster to those of the model: which band feeds which channel, and how it is scaled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_rsvlm.config.inputs import InputSpec, PerChannel, SourceDtype
from edge_rsvlm.errors import BundleError, InputError
from edge_rsvlm.geo import metres_per_pixel
from edge_rsvlm.pipeline.outcome import Outcome
from edge_rsvlm.raster.flaws import TWICE_WHITE, Flaws, Optics
from edge_rsvlm.raster.radiometry import matched, sample_both
from edge_rsvlm.raster.reader import Raster
from edge_rsvlm.raster.shift import STILL, Shift
from edge_rsvlm.tiles import ABSENT, VALIDITY

COLOURS = ("blue", "green", "red", "nir")
FLOAT_MOST = 2.0
"""Reflectance exceeds 1 on snow, clouds and glint, and no 8-bit image is as dark as this."""


@dataclass(frozen=True)
class Scaling:
    """Per channel of the model: the source band (or ABSENT, VALIDITY), and value * gain + bias."""

    bands: tuple[int, ...]
    gain: tuple[float, ...]
    bias: tuple[float, ...]


def scalings(spec: InputSpec, rasters: Sequence[Raster], outcome: Outcome, shift: Shift = STILL) -> list[Scaling]:
    """How each date is scaled, for the whole scene; ``shift`` is that of the first of two, in raster pixels.

    Of two dates the earlier is brought to the radiometry of the later; a band that only one has is left out of both.
    """
    ranges = [radiometry(spec, raster, outcome) for raster in rasters]
    lookups = [role_bands(raster) for raster in rasters]
    shared: list[str] = [role for role in spec.bands if all(role in lookup for lookup in lookups)]
    latest = ranges[-1]
    linear = dict.fromkeys(shared, (1.0, 0.0))
    found = [_scaling(spec, lookups[-1], linear, latest)]
    if len(rasters) == 2:
        bands = [[lookup[role] for role in shared] for lookup in lookups]
        gain, offset = matched(sample_both(rasters[0], rasters[1], bands[0], bands[1], shift))
        linear = {role: (float(g), float(o)) for role, g, o in zip(shared, gain, offset, strict=True)}
        found.insert(0, _scaling(spec, lookups[0], linear, latest))
    return found


def find_flaws(
    spec: InputSpec, rasters: Sequence[Raster], to_raster_xy: NDArray[np.float64], outcome: Outcome
) -> Flaws:
    """What looks for flaws in two dates, whose read pixels are ``to_raster_xy`` raster pixels wide and high."""
    before, after = (_optics(spec, raster, outcome) for raster in rasters)
    metres = metres_per_pixel(rasters[-1].georeference)
    read_m = None if metres is None else (float(metres[0] * to_raster_xy[0]), float(metres[1] * to_raster_xy[1]))
    return Flaws(before, after, read_m)


def _optics(spec: InputSpec, raster: Raster, outcome: Outcome) -> Optics:
    """Values are reflectance where they are neither 8 bits nor look like it, and the spec knows what reflectance is."""
    bands = role_bands(raster)
    visible = tuple(sorted({bands[role] for role in ("blue", "green", "red") if role in bands}))
    low, high = radiometry(spec, raster, outcome)
    dark_bright = spec.ranges.get("float32")
    stretched = raster.dtype == np.uint8 or (low, high) == spec.ranges.get("uint8")
    most = float(np.iinfo(raster.dtype).max) if raster.dtype.kind == "u" else 255.0 if stretched else np.inf
    if stretched or dark_bright is None:
        return Optics(visible, None, most)
    gain = (dark_bright[1] - dark_bright[0]) / (high - low)
    offset = dark_bright[0] - low * gain
    colours = tuple(bands[role] for role in COLOURS) if all(role in bands for role in COLOURS) else None
    return Optics(visible, colours, min(most, (TWICE_WHITE - offset) / gain), gain, offset)


def _scaling(
    spec: InputSpec, lookup: dict[str, int], linear: dict[str, tuple[float, float]], values: tuple[float, float]
) -> Scaling:
    """First ``linear`` of the role, then from the range ``values`` to the model's, or to 8 bits for its steps."""
    low, high = values
    count = len(spec.bands)
    means, stds = (per_channel(spec.mean, count), per_channel(spec.std, count))
    if spec.prepare:
        means, stds = (0.0,) * count, (1 / 255,) * count
    rows = []
    for role, mean, std in zip(spec.bands, means, stds, strict=True):
        if role in linear:
            g, o = linear[role]
            gain, bias = 1 / ((high - low) * std), (-low / (high - low) - mean) / std
            rows.append((lookup[role], g * gain, o * gain + bias))
        else:
            rows.append((VALIDITY if role == "validity" else ABSENT, 1.0, 0.0))
    bands, gains, biases = zip(*rows, strict=True)
    return Scaling(bands, gains, biases)


def per_channel(value: PerChannel, count: int) -> tuple[float, ...]:
    """A mean or deviation for each of ``count`` channels."""
    values = value if isinstance(value, tuple) else (value,) * count
    if len(values) != count:
        raise BundleError(f"an input has {count} bands and {len(values)} means or deviations", fix="export it again")
    return values


def role_bands(raster: Raster) -> dict[str, int]:
    """The band of each role; a single gray band stands for red, green and blue."""
    roles = {role: i for i, role in enumerate(raster.band_roles)}
    if "red" not in roles and "gray" in roles:
        roles |= dict.fromkeys(("red", "green", "blue"), roles["gray"])
    return roles


def radiometry(spec: InputSpec, raster: Raster, outcome: Outcome) -> tuple[float, float]:
    """The values (dark, bright) of the input spec that this raster's pixels are scaled by; one choice per raster.

    8 and 16 bits unsigned have a range of their own. Signed and wider integers are taken as counts of reflectance, as
    16 bits are. Floating point is taken for what a sample of it looks like: reflectance, 8-bit values or counts. What
    was assumed, and values far outside of it, are said in the outcome's warnings.
    """
    if raster.dtype == np.uint8:
        return _range(spec, "uint8", raster)
    sample = raster.sample()
    bright = float(np.quantile(sample, 0.98)) if len(sample) else 0.0
    kind: SourceDtype = "uint16"
    if raster.dtype == np.float32 and (raster.scaled or raster.source_dtype.kind in "fc"):
        kind = "float32" if bright <= FLOAT_MOST else "uint8" if bright <= 255 else "uint16"
    low, high = _range(spec, kind, raster)
    # Clouds and snow lie beyond the range; an image that does altogether is one white sheet to the model.
    said = ""
    if len(sample) and float(np.median(sample)) > high:
        said = (
            f"most pixels exceed {high:g}, which is the brightest that the model knows in such data: "
            f"scale them (gdal_translate -ot Byte -scale 0 {bright:g} 0 255)"
        )
    elif kind != raster.dtype:
        said = f"its {raster.source_dtype} pixels are taken to run from {low:g} to {high:g}"
    if said and said not in outcome.warnings:
        outcome.warnings.append(said)
    return low, high


def _range(spec: InputSpec, kind: SourceDtype, raster: Raster) -> tuple[float, float]:
    if kind in spec.ranges:
        return spec.ranges[kind]
    raise InputError(
        f"{raster.name}: pixels are {raster.source_dtype} and the model takes {', '.join(spec.ranges)}",
        fix="convert it: gdal_translate -ot Byte -scale INPUT OUTPUT.tif",
    )
