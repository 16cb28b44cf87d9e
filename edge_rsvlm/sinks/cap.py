"""Alerts in the Common Alerting Protocol (OASIS CAP-v1.2, https://docs.oasis-open.org/emergency/cap/v1.2/)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote
from xml.etree import ElementTree

from edge_rsvlm.errors import DeliveryError
from edge_rsvlm.sinks.cot import printable
from edge_rsvlm.sinks.features import moment, polygons
from edge_rsvlm.sinks.webhook import Poster
from edge_rsvlm.types import Alert

NAMESPACE = "urn:oasis:names:tc:emergency:cap:1.2"
LIKELY = 0.5
"""CAP calls likely what is more probable than not."""


@dataclass(frozen=True)
class CapHeader:
    """What CAP asks of the sender: who it is, for whom (``scope`` Private), and whether it is meant."""

    sender: str
    addresses: str
    status: str
    category: str = "Other"


def message(alert: Alert, header: CapHeader) -> bytes:
    """The alert in XML. Holes of polygons cannot be told in CAP: the exterior stands for the whole.

    Urgency and severity are unknown to a change detector and are called so.
    """
    root = ElementTree.Element("alert", {"xmlns": NAMESPACE})
    # CAP knows whole seconds and numeric zones only, and writes UTC as -00:00.
    sent = moment(alert).strftime("%Y-%m-%dT%H:%M:%S-00:00")
    identifier = cap_identifier(alert.id)
    _children(root, ("identifier", identifier), ("sender", header.sender), ("sent", sent), ("status", header.status))
    _children(root, ("msgType", "Alert"), ("source", "edge-rsvlm"), ("scope", "Private"))
    _children(root, ("addresses", header.addresses))
    info = ElementTree.SubElement(root, "info")
    _children(info, ("language", "en-US"), ("category", header.category), ("event", alert.rule), ("urgency", "Unknown"))
    _children(info, ("severity", "Unknown"), ("certainty", "Likely" if alert.score > LIKELY else "Possible"))
    _children(info, ("onset", sent), ("headline", alert.sentence[:160]), ("description", alert.sentence))
    parameter = ElementTree.SubElement(info, "parameter")
    _children(parameter, ("valueName", "score"), ("value", f"{alert.score:.4f}"))
    if alert.geometry is not None:
        area = ElementTree.SubElement(info, "area")
        _children(area, ("areaDesc", "changed ground"))
        _children(area, *(("polygon", _pairs(polygon[0])) for polygon in polygons(alert.geometry)))
    text: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return text


def cap_identifier(id: str) -> str:
    """Without spaces, commas, < and &, which CAP forbids: they are written as in a URL."""
    return quote(id, safe="")


def _pairs(ring: Sequence[Sequence[float]]) -> str:
    """``lat,lon lat,lon ...``, the last the same as the first."""
    return " ".join(f"{lat:.7f},{lon:.7f}" for lon, lat in ring)


def _children(parent: ElementTree.Element, *named: tuple[str, str]) -> None:
    for name, text in named:
        ElementTree.SubElement(parent, name).text = printable(text)


class CapFiles:
    """One file per alert in a folder; a repeat replaces its file."""

    def __init__(self, folder: Path, header: CapHeader) -> None:
        self._folder, self._header = folder, header

    def send(self, alert: Alert) -> None:
        path = self._folder / f"{cap_identifier(alert.id)}.xml"
        partial = path.with_name(f".{path.name}.part")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as stream:
                stream.write(message(alert, self._header))
                stream.flush()
                os.fsync(stream.fileno())
            partial.replace(path)
        except OSError as exc:
            raise DeliveryError(
                f"cannot write {path}: {exc.strerror or exc}",
                fix="make room, or name a folder that may be written",
                retry=True,
            ) from exc


class CapPost:
    """Each alert as one POST (application/cap+xml)."""

    def __init__(self, url: str, header: CapHeader, *, token: str | None = None, timeout_s: float = 30) -> None:
        self._poster = Poster(url, token=token, timeout_s=timeout_s, media_type="application/cap+xml")
        self._header = header

    def send(self, alert: Alert) -> None:
        self._poster.post(alert.id, message(alert, self._header))
