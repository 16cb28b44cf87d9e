"""What a camera wrote into its file: Exif and XMP, as GDAL reads them from JPEG and TIFF, inside archives too.

Exif: CIPA DC-008 (Exif 2.32). XMP: ISO 16684-1. What is malformed is left out, and ``complaints`` say so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

PREFIX = "EXIF_"
PACKET_MOST_BYTES = 1 << 20
DESCRIPTION = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}Description"
NUMBER = re.compile(r"[-+]?\d+(?:\.\d*)?(?:[eE][-+]?\d+)?")


@dataclass(frozen=True)
class Embedded:
    """``exif`` by the tag's name in the standard; ``xmp`` by "{namespace}name"; both as text."""

    exif: Mapping[str, str]
    xmp: Mapping[str, str]
    complaints: tuple[str, ...] = ()

    def exif_numbers(self, name: str) -> tuple[float, ...]:
        """The numbers of a tag, such as degrees, minutes and seconds; none where the tag has none."""
        return tuple(float(text) for text in NUMBER.findall(self.exif.get(name, "")))

    def exif_number(self, name: str) -> float | None:
        """The number of a tag that has exactly one."""
        numbers = self.exif_numbers(name)
        return numbers[0] if len(numbers) == 1 else None

    def xmp_number(self, name: str) -> float | None:
        text = self.xmp.get(name, "").strip()
        return float(text) if NUMBER.fullmatch(text) else None


def read_embedded(dataset: Any) -> Embedded:
    """Exif and XMP of an open dataset of rasterio."""
    complaints: list[str] = []
    # GDAL puts the Exif of TIFF apart.
    tags = read_tags(dataset, None, complaints) | read_tags(dataset, "EXIF", complaints)
    exif = {name[len(PREFIX) :]: value.strip() for name, value in tags.items() if name.startswith(PREFIX)}
    packet = "".join(read_tags(dataset, "xml:XMP", complaints).values())
    try:
        xmp = parse_xmp(packet) if packet else {}
    except ValueError as exc:
        xmp = {}
        complaints.append(f"its XMP is left out ({exc})")
    return Embedded(exif, xmp, tuple(complaints))


def read_tags(dataset: Any, namespace: str | None, complaints: list[str]) -> dict[str, str]:
    """Metadata items of a domain of GDAL; what GDAL cannot read is left out, which is added to ``complaints``."""
    try:
        return dict(dataset.tags(ns=namespace))
    except Exception as exc:
        if "CPLE" not in type(exc).__name__ and not isinstance(exc, ValueError):
            raise
        complaints.append(f"its metadata are left out ({exc})")
        return {}


def parse_xmp(packet: str) -> dict[str, str]:
    """Simple properties of an XMP packet; ValueError for what is not well-formed or not safe to parse.

    Entities grow without bound, and XMP has no use for a document type, so one is refused.
    """
    if len(packet) > PACKET_MOST_BYTES:
        raise ValueError("it is too long")
    if "<!DOCTYPE" in packet or "<!ENTITY" in packet:
        raise ValueError("it declares a document type")
    try:
        root = ElementTree.fromstring(packet.strip("\ufeff\0 \n\r\t"))
    except ElementTree.ParseError as exc:
        raise ValueError(f"it is not well-formed: {exc}") from exc
    found: dict[str, str] = {}
    for description in root.iter(DESCRIPTION):
        for name, value in description.attrib.items():
            found.setdefault(name, value)
        for child in description:
            if not len(child) and child.text:
                found.setdefault(child.tag, child.text)
    return found
