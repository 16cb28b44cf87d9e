"""Frames as a drone writes them: JPEG with Exif and XMP, made with Pillow alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

EXIF_IFD, GPS_IFD = 0x8769, 0x8825
ORIENTATION, FOCAL_MM, FOCAL_35_MM, ZOOM = 0x0112, 0x920A, 0xA405, 0xA404
PIXEL_X, PIXEL_Y, FOCAL_PLANE_X, FOCAL_PLANE_UNIT = 0xA002, 0xA003, 0xA20E, 0xA210
DJI = "http://www.dji.com/drone-dji/1.0/"
CAMERA = {FOCAL_35_MM: 24}
GPS = {1: "N", 2: (47.0, 30.0, 12.0), 3: "E", 4: (15.0, 0.0, 36.0)}
"""47.50333 north, 15.01 east."""
FLIGHT = {"RelativeAltitude": "+100.00", "GimbalPitchDegree": "-90.00", "GimbalYawDegree": "+0.00",
          "GimbalRollDegree": "+0.00", "FlightYawDegree": "+12.00"}  # fmt: skip
SIZE = (600, 400)


def packet(flight: Mapping[str, str]) -> str:
    attributes = " ".join(f'drone-dji:{name}="{value}"' for name, value in flight.items())
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
        '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        f'<rdf:Description xmlns:drone-dji="{DJI}" {attributes}/></rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
    )


def write_frame(
    path: Path,
    image_HW3: np.ndarray | None = None,
    *,
    base: Mapping[int, Any] | None = None,
    camera: Mapping[int, Any] = CAMERA,
    gps: Mapping[int, Any] = GPS,
    flight: Mapping[str, str] = FLIGHT,
    xmp: str | None = None,
) -> str:
    """A frame of SIZE, 100 m above the ground and looking straight down, unless said otherwise."""
    exif = Image.Exif()
    exif.update(base or {})
    exif[EXIF_IFD], exif[GPS_IFD] = dict(camera), dict(gps)
    image = np.full((SIZE[1], SIZE[0], 3), 50, np.uint8) if image_HW3 is None else image_HW3
    text = packet(flight) if xmp is None else xmp
    Image.fromarray(image).save(path, quality=95, exif=exif, **({"xmp": text.encode()} if text else {}))
    return str(path)
