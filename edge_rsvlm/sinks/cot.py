"""Alerts as Cursor on Target events, which TAK maps show (MITRE, CoT Base-Event schema 2.0)."""

from __future__ import annotations

import fcntl
import socket
import struct
import termios
import time
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Literal
from xml.etree import ElementTree

from edge_rsvlm.errors import DeliveryError
from edge_rsvlm.sinks.features import bounds, centroid, moment
from edge_rsvlm.types import Alert

SENSOR_POINT = "b-m-p-s-p-i"
"""Bits, map, point, sensor: its point of interest."""
MACHINE = "m-g"
UNKNOWN = "9999999.0"
"""What the schema writes for a height or an error that is not known."""
METRES_PER_DEGREE = 111_320.0
MULTICAST_HOPS = 4
LOOK_S = 0.02


def event(alert: Alert, *, stale_s: float) -> bytes:
    """The event in XML. Its uid is the alert's id, so that a repeat moves the point and adds none.

    The point is the centroid in WGS 84, ``ce`` the radius in metres that holds the changed ground. DeliveryError for an
    alert that has no place on Earth.
    """
    if alert.geometry is None:
        raise DeliveryError(
            f"alert {alert.id} has no place on Earth to show", fix="give scenes a CRS, or use another sink", retry=False
        )
    seen = moment(alert)
    times = {
        "time": _iso(seen),
        "start": _iso(seen),
        "stale": _iso(datetime.now(timezone.utc) + timedelta(seconds=stale_s)),
    }
    root = ElementTree.Element(
        "event", {"version": "2.0", "uid": alert.id, "type": SENSOR_POINT, **times, "how": MACHINE}
    )
    lon, lat = centroid(alert.geometry)
    west, south, east, north = bounds(alert.geometry)
    radius_m = max(east - west, north - south) / 2 * METRES_PER_DEGREE
    place = {"lat": f"{lat:.7f}", "lon": f"{lon:.7f}", "hae": UNKNOWN, "ce": f"{radius_m:.1f}", "le": UNKNOWN}
    ElementTree.SubElement(root, "point", place)
    detail = ElementTree.SubElement(root, "detail")
    ElementTree.SubElement(detail, "contact", {"callsign": printable(alert.rule)})
    remarks = ElementTree.SubElement(detail, "remarks", {"source": "edge-rsvlm", "time": _iso(seen)})
    remarks.text = printable(f"{alert.sentence} (score {alert.score:.2f})")
    text: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return text


def printable(text: str) -> str:
    """Without characters that XML 1.0 cannot hold in any way."""
    return "".join(c if c >= " " and c not in "\ufffe\uffff" and not "\ud800" <= c <= "\udfff" else " " for c in text)


def _iso(moment: datetime) -> str:
    return moment.astimezone(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


@dataclass
class CursorOnTarget:
    """Sends each event by itself.

    TCP: a connection per event; sent when the other side's system has acknowledged every byte, which is all that this
    protocol knows. UDP: nobody acknowledges anything; sent when the network took the datagram.
    """

    host: str
    port: int
    protocol: Literal["tcp", "udp"] = "tcp"
    stale_s: float = 86_400
    timeout_s: float = 10

    def send(self, alert: Alert) -> None:
        body = event(alert, stale_s=self.stale_s)
        try:
            (self._send_tcp if self.protocol == "tcp" else self._send_udp)(body)
        except OSError as exc:
            raise DeliveryError(
                f"{self.host}:{self.port} cannot be reached ({exc})", fix="check the link, host and port", retry=True
            ) from exc

    def _send_udp(self, body: bytes) -> None:
        family, kind, protocol, _, address = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as sender:
            if family == socket.AF_INET:
                sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, MULTICAST_HOPS)
            sender.sendto(body, address)

    def _send_tcp(self, body: bytes) -> None:
        until = time.monotonic() + self.timeout_s
        with socket.create_connection((self.host, self.port), self.timeout_s) as sender:
            sender.sendall(body)
            while _unacknowledged(sender):
                if time.monotonic() > until:
                    raise TimeoutError("it did not acknowledge the event")
                time.sleep(LOOK_S)


def _unacknowledged(sender: socket.socket) -> int:
    """Bytes sent that the other side has not acknowledged (SIOCOUTQ, Linux ``tcp(7)``)."""
    if reset := sender.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
        raise ConnectionResetError(reset, "the connection was reset")
    (count,) = struct.unpack("i", fcntl.ioctl(sender, termios.TIOCOUTQ, struct.pack("i", 0)))
    return int(count)
