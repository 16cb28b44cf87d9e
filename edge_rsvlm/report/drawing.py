"""A drawing of few primitives, written as SVG or painted as PNG: the same in both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from edge_rsvlm.report.page import data_uri

PNG_SCALE = 2
"""Pixels of a PNG per unit of a drawing: text stays sharp on any screen."""
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"
Anchor = Literal["start", "middle", "end"]
PIL_ANCHORS: dict[Anchor, str] = {"start": "ls", "middle": "ms", "end": "rs"}
Point = tuple[float, float]


@dataclass(frozen=True)
class Bitmap:
    """A picture [H, W, 3] in the box (x, y, width, height)."""

    box: tuple[float, float, float, float]
    picture_HW3: NDArray[np.uint8]


@dataclass(frozen=True)
class Rect:
    box: tuple[float, float, float, float]
    fill: str


@dataclass(frozen=True)
class Line:
    """Through its points; ``closed`` joins the last to the first, ``fill`` is for closed ones."""

    points: Sequence[Point]
    stroke: str
    width: float = 1.5
    closed: bool = False
    fill: str | None = None


@dataclass(frozen=True)
class Text:
    """``at`` is on its base line."""

    at: Point
    text: str
    size: float
    fill: str
    anchor: Anchor = "start"


Item = Bitmap | Rect | Line | Text


@dataclass(frozen=True)
class Drawing:
    """Items in the order in which they are painted; colours are "#rrggbb"."""

    width: float
    height: float
    paper: str
    items: tuple[Item, ...]


def to_svg(drawing: Drawing) -> str:
    """An SVG document that needs nothing else."""
    body = "\n".join(map(_svg, drawing.items))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {drawing.width:g} {drawing.height:g}" '
        f'width="{drawing.width:g}" height="{drawing.height:g}" font-family="{FONT}" role="img">\n'
        f'<rect width="100%" height="100%" fill="{drawing.paper}"/>\n{body}\n</svg>\n'
    )


def to_image(drawing: Drawing) -> Image.Image:
    size = round(drawing.width * PNG_SCALE), round(drawing.height * PNG_SCALE)
    image = Image.new("RGB", size, drawing.paper)
    draw = ImageDraw.Draw(image)
    for item in drawing.items:
        _paint(image, draw, item)
    return image


def _svg(item: Item) -> str:
    if isinstance(item, Text):
        x, y = item.at
        return (
            f'<text x="{x:.1f}" y="{y:.1f}" font-size="{item.size:g}" fill="{item.fill}" '
            f'text-anchor="{item.anchor}">{escape(item.text)}</text>'
        )
    if isinstance(item, Line):
        path = "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in item.points) + ("Z" if item.closed else "")
        return (
            f'<path d="{path}" fill="{item.fill or "none"}" stroke="{item.stroke}" stroke-width="{item.width:g}" '
            'stroke-linejoin="round"/>'
        )
    x, y, width, height = item.box
    box = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
    if isinstance(item, Rect):
        return f'<rect {box} fill="{item.fill}"/>'
    return f'<image {box} preserveAspectRatio="none" href="{data_uri(item.picture_HW3)}"/>'


def _paint(image: Image.Image, draw: ImageDraw.ImageDraw, item: Item) -> None:
    if isinstance(item, Text):
        text = item.text.replace("²", "2")  # which the font lacks
        font = ImageFont.load_default(item.size * PNG_SCALE)
        draw.text(_scaled(item.at), text, fill=item.fill, font=font, anchor=PIL_ANCHORS[item.anchor])
    elif isinstance(item, Line):
        points = [_scaled(point) for point in item.points]
        if item.fill:
            draw.polygon(points, fill=item.fill)
        if item.closed:
            points += points[:2]  # so that the last corner is joined as the others are
        draw.line(points, fill=item.stroke, width=max(round(item.width * PNG_SCALE), 1), joint="curve")
    else:
        x, y, width, height = (value * PNG_SCALE for value in item.box)
        if isinstance(item, Rect):
            draw.rectangle((x, y, x + width, y + height), fill=item.fill)
            return
        size = max(round(width), 1), max(round(height), 1)
        image.paste(Image.fromarray(item.picture_HW3).resize(size, Image.Resampling.BICUBIC), (round(x), round(y)))


def _scaled(point: Point) -> Point:
    return point[0] * PNG_SCALE, point[1] * PNG_SCALE
