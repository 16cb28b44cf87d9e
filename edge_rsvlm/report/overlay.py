"""Results drawn onto the picture, as PNG."""

from __future__ import annotations

import textwrap
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from edge_rsvlm.report.views import Item, SceneView, TaskView

LEAST_SIDE_PX = 512
COLOURS = {"object": (255, 209, 71), "area": (255, 77, 109), "tile": (255, 255, 255)}
INK, PAPER = (18, 22, 28), (250, 250, 248)
BAND_PX, TEXT_PX = 12, 16
MOST_TAGS = 16  # more would hide the objects


def write_overlay(path: Path, scene: SceneView, view: TaskView) -> None:
    """The scene's pictures side by side with the outlines of ``view``, above its summary in words."""
    width, height = scene.size
    zoom = max(1, -(-LEAST_SIDE_PX // max(width, height)))
    size = (round(height * scene.aspect) * zoom, height * zoom)
    pictures = scene.pictures_HW3 if view.task == "change" else scene.pictures_HW3[-1:]
    panels = [_drawn(picture, view.items, size, scene.size) for picture in pictures]
    band = _words(view.summary, size[0] * len(panels) + BAND_PX * (len(panels) - 1))
    sheet = Image.new("RGB", (band.width, size[1] + band.height), PAPER)
    for i, panel in enumerate(panels):
        sheet.paste(panel, (i * (size[0] + BAND_PX), 0))
    sheet.paste(band, (0, size[1]))
    sheet.save(path)


def _drawn(
    picture_HW3: NDArray[np.uint8], items: tuple[Item, ...], size: tuple[int, int], raster_size: tuple[int, int]
) -> Image.Image:
    panel = Image.fromarray(picture_HW3).resize(size, Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(panel)
    scale = np.array(size) / raster_size
    font = ImageFont.load_default(TEXT_PX * 0.8)
    for item in items:
        colour = COLOURS[item.kind]
        for ring in item.rings:
            draw.line([tuple(p) for p in (np.array(ring) * scale).tolist()], fill=colour, width=2)
        if item.kind == "object" and len(items) <= MOST_TAGS:
            x, y = np.array(item.bounds[:2]) * scale
            _tag(draw, font, (float(x), float(y)), f"{item.label} {item.score:.2f}", colour)
    return panel


def _tag(
    draw: ImageDraw.ImageDraw,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    at: tuple[float, float],
    text: str,
    colour: tuple[int, int, int],
) -> None:
    """A label that sits on the upper edge of its box, inside the picture."""
    x0, y0, x1, y1 = draw.textbbox(at, text, font=font)
    up = min(y1 - y0 + 6, at[1])
    draw.rectangle((x0, y0 - up, x1 + 4, y1 - up + 3), fill=colour)
    draw.text((at[0] + 2, at[1] - up), text, fill=INK, font=font)


def _words(text: str, width: int) -> Image.Image:
    """A strip of wrapped text."""
    font = ImageFont.load_default(TEXT_PX)
    text = text.replace("²", "2")  # which the font lacks
    lines = textwrap.wrap(text, max(20, int(width / (TEXT_PX * 0.52)))) or [""]
    strip = Image.new("RGB", (width, BAND_PX * 2 + round(TEXT_PX * 1.35 * len(lines))), PAPER)
    ImageDraw.Draw(strip).multiline_text((BAND_PX, BAND_PX), "\n".join(lines), fill=INK, font=font, spacing=6)
    return strip
