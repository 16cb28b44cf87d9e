"""A date in the name of a file, where there is exactly one that it can mean."""

from __future__ import annotations

import re
from datetime import datetime, timezone
from typing import Final

PRODUCTS: Final = (
    # Landsat Collection 1 and 2: LC08_L1TP_029030_20151209_20160131_01_T1; the second date is that of processing.
    (r"L[COTEM]\d\d_L\d[A-Z]{2}_\d{6}_(\d{8})_\d{8}_\d\d_[A-Z]\d?", "%Y%m%d"),
    # Landsat before collections: LC80290302015343LGN00, whose date is year and day of the year.
    (r"L[COTEM]\d\d{3}\d{3}(\d{7})[A-Z]{3}\d\d", "%Y%j"),
    # Sentinel-2: S2A_MSIL1C_20160803T105032_N0204_..., and granules T31UFS_20160803T105032_B04.
    (r"S2[A-D]_MSIL\d[AC]_(\d{8}T\d{6})_N\d{4}_R\d{3}", "%Y%m%dT%H%M%S"),
    (r"T\d\d[A-Z]{3}_(\d{8}T\d{6})(?:_|$)", "%Y%m%dT%H%M%S"),
    # Sentinel-1: S1A_IW_GRDH_1SDV_20160803T053412_20160803T053437_..., begin and end of a minute.
    (r"S1[A-D][_-](?:IW|EW|WV|S[1-6])[_-][A-Z\d_-]+?[_-](\d{8}T\d{6})[_-]\d{8}T\d{6}", "%Y%m%dT%H%M%S"),
    # Planet: 20160909_124350_0e0d_3B_..., 20200415_103045_75_1057, 20190101_101112_ssc1d1.
    (
        r"(\d{8}_\d{6})_(?:\d\d_[\dA-F]{4}|(?=\d*[A-F])[\dA-F]{4}|[\dA-F]{4}_(?:1B|3A|3B)|SSC\d+(?:D\d)?)(?:_|$)",
        "%Y%m%d_%H%M%S",
    ),
)
"""(beginning of a name, format of its date in UTC), of capitals."""
DAY = re.compile(
    r"(?<!\d)((?:19|20)\d\d)(-?)(0[1-9]|1[0-2])\2(0[1-9]|[12]\d|3[01])"
    r"(?:([T_ -])?([01]\d|2[0-3])[-_:]?([0-5]\d)[-_:]?([0-5]\d)(Z)?)?(?!\d)"
)
YEAR = re.compile(r"(?<![0-9A-Z])(?:19[3-9]\d|20\d\d)(?![0-9A-Z])")
"""A number that stands alone; pictures of the ground from the air in series begin in the 1930s."""
CAMERA_NAME = re.compile(r"[A-Z\d_]{4}\d{4}")
"""Eight characters that end in a number of the picture (DCF: CIPA DC-009)."""
COUNTED = re.compile(r"(?:FRAME|TILE|PATCH|CHIP|CROP|IMG|IMAGE|PHOTO|DSC|DJI)S?[-_ ]?\d+")
"""Pictures that were numbered: 2016 may be one of many."""
LEAST_NOW: Final = 2026
"""A device's clock may have lost its date."""


def date_in_name(name: str) -> str | None:
    """ISO 8601 of the date in a file's name, in UTC; None where there is none or more than one.

    A time counts where the name is a product's, or has the form of ISO 8601 (20160803T105032), as products have it;
    of other times the zone is not known and the day alone is given.
    """
    stem = name.rpartition(".")[0] or name
    text = stem.upper()
    for pattern, form in PRODUCTS:
        found = re.match(pattern, text)
        if found:
            return _product(found[1], form)
    days = {day for match in DAY.finditer(text) if (day := _day(match))}
    if days:
        return days.pop() if len(days) == 1 else None
    if CAMERA_NAME.fullmatch(stem) or COUNTED.match(text):
        return None
    years = set(YEAR.findall(text))
    year = years.pop() if len(years) == 1 else None
    return year if year and int(year) <= max(datetime.now(timezone.utc).year, LEAST_NOW) else None


def _product(text: str, form: str) -> str | None:
    try:
        taken = datetime.strptime(text, form)
    except ValueError:
        return None
    return taken.strftime("%Y-%m-%dT%H:%M:%SZ" if "%H" in form else "%Y-%m-%d")


def _day(match: re.Match[str]) -> str | None:
    year, _, month, day, between, hour, minute, second, zulu = match.groups()
    try:
        taken = datetime(int(year), int(month), int(day), int(hour or 0), int(minute or 0), int(second or 0))
    except ValueError:
        return None
    return taken.strftime("%Y-%m-%dT%H:%M:%SZ" if hour and (between == "T" or zulu) else "%Y-%m-%d")
