"""When a scene was taken, from what its file says; nothing where that is not clear.

What the camera or the product's metadata says comes first, then the file's name. A time is given in full only where its
zone is known. A time without a zone is given as its day, since no more is sure.

Sources: Exif 2.32 (CIPA DC-008) for DateTimeOriginal, OffsetTimeOriginal and the GPS time, which is UTC; TIFF 6.0 for
DateTime; XMP (ISO 16684-1), whose dates are ISO 8601; GDAL's IMAGERY domain; names of products as USGS (Landsat), ESA
(Sentinel-1, Sentinel-2) and Planet define them.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from pathlib import PurePath
from typing import Any, Final

import rasterio
from rasterio.errors import NotGeoreferencedWarning

from edge_rsvlm.raster.dates_in_names import date_in_name
from edge_rsvlm.raster.embedded import Embedded, read_embedded, read_tags
from edge_rsvlm.raster.reader import Raster, foreign_errors

ITEMS: Final = (
    "ACQUISITIONDATETIME",
    "SENSING_TIME",
    "DATATAKE_SENSING_START",
    "DATATAKE_1_DATATAKE_SENSING_START",
    "PRODUCT_START_TIME",
    "ACQUISITION_START_TIME",
    "NITF_IDATIM",
    "ACQUIRED",
    "ACQUISITION_DATE",
    "ACQUISITIONDATE",
    "DATE_ACQUIRED",
)
"""Metadata items of products, in UTC by their specifications: GDAL, Sentinel-1 and -2, NITF 2.1, Planet, Landsat."""
XMP: Final = (
    "{http://www.dji.com/drone-dji/1.0/}UTCAtExposure",
    "{http://ns.adobe.com/exif/1.0/}DateTimeOriginal",
    "{http://ns.adobe.com/photoshop/1.0/}DateCreated",
    "{http://ns.adobe.com/xap/1.0/}CreateDate",
)
IN_UTC: Final = frozenset(XMP[:1])
UNSET: Final = frozenset({date(1970, 1, 1), date(1980, 1, 1)})
"""Where clocks begin that were never set."""
ZONES: Final = timedelta(hours=14)
"""No local time is farther from UTC."""

TIME: Final = re.compile(
    r"(\d{4})[-:/]?(\d\d)[-:/]?(\d\d)(?:[T ]?(\d\d):?(\d\d)(?::?(\d\d)(?:[.,]\d+)?)?\s*(Z|UTC|[-+]\d\d:?\d\d)?)?"
)


def acquired(source: str | Raster, name: str | None = None) -> str | None:
    """When a scene was taken: ISO 8601 in UTC, such as "2020-06-01T10:12:33Z", "2020-06-01" or "2020"; None: unknown.

    ``source`` is a path as GDAL opens it, or an open raster; ``name`` is what its user calls it (a member of an
    archive). Raises InputError for a path that cannot be read.
    """
    if isinstance(source, Raster):
        return _acquired(source.dataset, source.name if name is None else name)
    name = source if name is None else name
    with foreign_errors(name), rasterio.Env(GDAL_DISABLE_READDIR_ON_OPEN="TRUE"), warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(source) as dataset:
            return _acquired(dataset, name)


def _acquired(dataset: Any, name: str) -> str | None:
    embedded, items = read_embedded(dataset), _items(dataset)
    for found in (_of_product(items), _of_exif(embedded), _of_xmp(embedded)):
        if found:
            return found[0] if _agree(found) else None
    named = date_in_name(PurePath(name).name)
    said = _read(items.get("TIFFTAG_DATETIME") or embedded.exif.get("DateTime", ""))
    made = said.written() if said else None
    # DateTime is when the file was made, which may be long after the scene was taken: where the name says another
    # date, neither is sure.
    if named and made and not _agree([made, named]):
        return None
    return max(named or "", made or "", key=len) or None


def _items(dataset: Any) -> dict[str, str]:
    """Metadata items by upper-case name; those of a product's own domain win."""
    items = read_tags(dataset, None, []) | read_tags(dataset, "IMAGERY", [])
    return {name.upper(): value for name, value in items.items()}


def _of_product(items: Mapping[str, str]) -> list[str]:
    found = []
    for item in ITEMS:
        text = items.get(item, "")
        if item == "DATE_ACQUIRED" and "SCENE_CENTER_TIME" in items:  # Landsat keeps the time apart
            text = f"{text}T{items['SCENE_CENTER_TIME']}".replace('"', "")
        said = _read(text)
        if said:
            found.append(said.written(in_utc=True))
    return found


def _of_exif(embedded: Embedded) -> list[str]:
    """DateTimeOriginal with its offset; else the GPS time, where that may be of the same moment; else the day.

    A camera digitizes when it takes, so that DateTimeDigitized serves where the other is missing.
    """
    for tag in ("Original", "Digitized"):
        text, zone = embedded.exif.get(f"DateTime{tag}", ""), embedded.exif.get(f"OffsetTime{tag}", "")
        said = _read(text + zone) or _read(text)
        if said is None:
            continue
        gps = _gps_time(embedded)
        if said.offset is None and gps and abs(said.at - gps) < ZONES:
            return [_Said(gps, timed=True, offset=timedelta(0)).written()]
        return [said.written()]
    return []


def _gps_time(embedded: Embedded) -> datetime | None:
    day, clock = _read(embedded.exif.get("GPSDateStamp", "")), embedded.exif_numbers("GPSTimeStamp")
    if day is None or len(clock) != 3:
        return None
    hours, minutes, seconds = clock
    return day.at + timedelta(hours=hours, minutes=minutes, seconds=seconds)


def _of_xmp(embedded: Embedded) -> list[str]:
    said = {name: _read(embedded.xmp.get(name, "")) for name in XMP}
    return [found.written(in_utc=name in IN_UTC) for name, found in said.items() if found][:1]


@dataclass(frozen=True)
class _Said:
    """A day, or when ``timed`` a moment, of a clock that is ahead of UTC by ``offset``, where that is known."""

    at: datetime
    timed: bool
    offset: timedelta | None

    def written(self, *, in_utc: bool = False) -> str:
        """As ``acquired`` gives it; ``in_utc``: a time without a zone is UTC."""
        offset = timedelta(0) if in_utc and self.offset is None else self.offset
        if not self.timed or offset is None:
            return self.at.date().isoformat()
        return (self.at - offset).strftime("%Y-%m-%dT%H:%M:%SZ")


def _read(text: str) -> _Said | None:
    found = TIME.fullmatch(text.replace("\0", " ").strip().strip('"'))
    if not found:
        return None
    year, month, day, hour, minute, second, zone = found.groups()
    try:
        at = datetime(int(year), int(month), int(day), int(hour or 0), int(minute or 0), min(int(second or 0), 59))
    except ValueError:
        return None
    return None if at.date() in UNSET else _Said(at, hour is not None, _offset(zone))


def _offset(zone: str | None) -> timedelta | None:
    if zone is None or zone in ("Z", "UTC"):
        return timedelta(0) if zone else None
    ahead = timedelta(hours=int(zone[1:3]), minutes=int(zone[-2:]))
    return -ahead if zone[0] == "-" else ahead


def _agree(dates: Sequence[str]) -> bool:
    """Whether all may be of one scene: days of local time and of UTC differ by one at most."""
    days = [date.fromisoformat(text[:10]) for text in dates if len(text) > 4]
    years = {text[:4] for text in dates}
    if any(len(text) == 4 for text in dates):
        return len(years) == 1
    return max(days) - min(days) <= timedelta(days=1)
