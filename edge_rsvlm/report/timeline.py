"""A series at a glance: its dates in a row with what changed on each, a map of its stories, and their areas over time.

Written as PNG, SVG or one HTML file that needs no network.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from edge_rsvlm.report.drawing import Bitmap, Drawing, Item, Line, Point, Rect, Text, to_image, to_svg

SUFFIXES: Final = (".png", ".svg", ".html")
COLOURS: Final = ("#ff4d6d", "#ffd147", "#38bdf8", "#a3e635", "#e879f9", "#fb923c")
"""Of the stories that are told one by one; others are OTHERS."""
OTHERS, INK, SOFT, RULE, PAPER = "#f4f4ee", "#15191e", "#5c6670", "#dcdcd5", "#fafaf8"
CHART_COLOURS: Final = ("#d6336c", "#b7791f", "#0b7fb5", "#5a8a0b", "#a21caf", "#c2410c")
"""The same, dark enough for lines on paper."""
MARGIN, GAP, ROW_PER = 28.0, 12.0, 8
THUMB_WIDTH, MAP_WIDTH, LEAST_WIDTH, MAP_SHARE = 230.0, 500.0, 1120.0, 0.42
TITLE_PX, TEXT_PX, SMALL_PX = 26.0, 14.0, 12.0
CHART_HEIGHT, TICKS = 250.0, 4
LETTER = 0.52
"""Mean width of a letter, of its size."""
Rings = tuple[NDArray[np.float64], ...]


@dataclass(frozen=True)
class StoryView:
    """``rings`` outline the story, and ``rings_by_date`` what changed to each date, in raster pixels.

    ``areas`` by date, None where not known.
    """

    sentence: str
    rings: Rings
    rings_by_date: tuple[Rings, ...]
    areas: tuple[float | None, ...]


@dataclass(frozen=True)
class TimelineView:
    """``stories`` are told one by one, ``others`` are outlined. ``at`` are the dates' places between 0 and 1.

    ``size`` of the raster in pixels, ``aspect`` its ground width over its height. ``total`` is the area by date that
    differs from the first; ``unit`` is "m²" or "px".
    """

    title: str
    summary: str
    dates: tuple[str, ...]
    at: tuple[float, ...]
    pictures_HW3: tuple[NDArray[np.uint8], ...]
    size: tuple[int, int]
    aspect: float
    stories: tuple[StoryView, ...]
    others: tuple[StoryView, ...]
    total: tuple[float, ...]
    unit: str


def write_timeline(path: Path, view: TimelineView, suffix: str) -> None:
    """In the format of ``suffix``, one of SUFFIXES."""
    drawing = timeline(view)
    if suffix == ".png":
        to_image(drawing).save(path, "PNG")
    elif suffix == ".svg":
        path.write_text(to_svg(drawing), encoding="utf-8")
    else:
        path.write_text(_page(view, drawing), encoding="utf-8")


def timeline(view: TimelineView) -> Drawing:
    columns = min(len(view.dates), ROW_PER)
    width = max(LEAST_WIDTH, 2 * MARGIN + columns * THUMB_WIDTH + (columns - 1) * GAP)
    thumb = (width - 2 * MARGIN - (columns - 1) * GAP) / columns
    items: list[Item] = [
        Text((MARGIN, MARGIN + TITLE_PX), view.title, TITLE_PX, INK),
        Text((MARGIN, MARGIN + TITLE_PX + 24), view.summary, TEXT_PX, SOFT),
    ]
    top = MARGIN + TITLE_PX + 44
    row_height = thumb / view.aspect + 2 * GAP + SMALL_PX
    for k in range(len(view.dates)):
        x, y = MARGIN + (k % columns) * (thumb + GAP), top + (k // columns) * row_height
        items += _date(view, k, (x, y, thumb, thumb / view.aspect))
    top += -(-len(view.dates) // columns) * row_height + GAP
    map_width = max(MAP_WIDTH, MAP_SHARE * width)
    items += _map(view, (MARGIN, top, map_width, map_width / view.aspect))
    left = MARGIN + map_width + 2 * MARGIN
    chart_box = (left + 60, top, width - MARGIN - left - 60, CHART_HEIGHT)
    items += _chart(view, chart_box)
    legend, bottom = _legend(view, (left, top + CHART_HEIGHT + 52), width - MARGIN - left)
    height = max(bottom, top + map_width / view.aspect + 24) + MARGIN
    return Drawing(width, height, PAPER, (*items, *legend))


def _date(view: TimelineView, k: int, box: tuple[float, float, float, float]) -> Iterator[Item]:
    """The picture of a date, outlined what changed since the one before."""
    x, y, _, height = box
    yield Bitmap(box, view.pictures_HW3[k])
    for story in view.others:
        yield from _outlines(view, story.rings_by_date[k], box, OTHERS, 0.8)
    for story, colour in zip(view.stories, COLOURS, strict=False):
        yield from _outlines(view, story.rings_by_date[k], box, colour, 1.5)
    yield Text((x, y + height + SMALL_PX + 4), view.dates[k], SMALL_PX, INK)


def _map(view: TimelineView, box: tuple[float, float, float, float]) -> Iterator[Item]:
    """The last date with every story, those that are told by number."""
    x, y, width, height = box
    yield Bitmap(box, view.pictures_HW3[-1])
    for story in view.others:
        yield from _outlines(view, story.rings, box, OTHERS, 0.8)
    for story, colour in zip(view.stories, COLOURS, strict=False):
        yield from _outlines(view, story.rings, box, colour, 2.0)
    for number, (story, colour) in enumerate(zip(view.stories, COLOURS, strict=False), start=1):
        col, row = np.concatenate(story.rings).mean(axis=0) * (width, height) / view.size
        yield Rect((x + col - 9, y + row - 10, 18, 18), colour)
        yield Text((x + col, y + row + 4), str(number), SMALL_PX, INK, "middle")
    yield Text((x, y + height + SMALL_PX + 6), f"All that changed, on the picture of {view.dates[-1]}", SMALL_PX, SOFT)


def _outlines(
    view: TimelineView, rings: Rings, box: tuple[float, float, float, float], colour: str, width: float
) -> Iterator[Item]:
    x, y, box_width, box_height = box
    scale = np.array([box_width, box_height]) / view.size
    for ring in rings:
        points = (ring[:-1] * scale + (x, y)).round(1)
        moved = np.append(True, (np.diff(points, axis=0) != 0).any(axis=1))
        if moved.sum() > 1:
            yield Line([(float(px), float(py)) for px, py in points[moved]], colour, width, closed=True)


def _chart(view: TimelineView, box: tuple[float, float, float, float]) -> Iterator[Item]:
    """Area over time: of all stories as a ground, of those that are told as lines."""
    x, y, width, height = box
    power, label = _unit(max(view.total), view.unit)
    step = _step(max(view.total) / power / TICKS)
    most = TICKS * step * power

    def place(k: int, area: float) -> Point:
        return x + view.at[k] * width, y + height * (1 - area / most)

    yield Text((x - 60, y - 10), f"Area that differs from {view.dates[0]}, {label}", SMALL_PX, SOFT)
    for tick in range(TICKS + 1):
        level = y + height * (1 - tick / TICKS)
        yield Line([(x, level), (x + width, level)], RULE, 1)
        yield Text((x - 8, level + 4), f"{tick * step:,g}", SMALL_PX, SOFT, "end")
    ground = [place(k, area) for k, area in enumerate(view.total)]
    base = [(x + view.at[-1] * width, y + height), (x + view.at[0] * width, y + height)]
    yield Line([*ground, *base], "#e4e9ec", 1, closed=True, fill="#e4e9ec")
    yield Line(ground, SOFT, 2)
    for story, colour in zip(view.stories, CHART_COLOURS, strict=False):
        yield Line([place(k, area) for k, area in enumerate(story.areas) if area is not None], colour, 2)
    taken = -1e9
    for k, name in enumerate(view.dates):
        at = place(k, 0.0)
        yield Line([at, (at[0], at[1] + 5)], SOFT, 1)
        if at[0] - taken > len(name) * SMALL_PX * LETTER + 8:
            yield Text((at[0], at[1] + 20), name, SMALL_PX, SOFT, "middle")
            taken = at[0]


def _legend(view: TimelineView, at: Point, width: float) -> tuple[list[Item], float]:
    """What happened in each story that is told, and where the text ends."""
    x, y = at
    items: list[Item] = []
    for number, (story, colour) in enumerate(zip(view.stories, COLOURS, strict=False), start=1):
        items += [Rect((x, y - 13, 18, 18), colour), Text((x + 9, y + 1), str(number), SMALL_PX, INK, "middle")]
        for line in textwrap.wrap(story.sentence, max(int((width - 30) / (TEXT_PX * LETTER)), 20)):
            items.append(Text((x + 28, y + 1), line, TEXT_PX, INK))
            y += TEXT_PX * 1.35
        y += 8
    return items, y


def _step(least: float) -> float:
    """1, 2, 2.5 or 5 times a power of ten, at least ``least``."""
    if least <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= least * (1 - 1e-9))


def _unit(most: float, unit: str) -> tuple[float, str]:
    """What areas are divided by, and the unit they are then in."""
    if unit == "m²":
        return (1e6, "km²") if most >= 2e6 else (1e4, "ha") if most >= 2e4 else (1.0, "m²")
    return 1.0, unit


def _page(view: TimelineView, drawing: Drawing) -> str:
    """The drawing, and every story in a table."""
    style = (resources.files("edge_rsvlm.report") / "style.css").read_text("utf-8")
    told: Sequence[StoryView] = (*view.stories, *view.others)
    rows = "".join(
        f"<tr><td>{number}</td><td>{escape(story.sentence)}</td></tr>" for number, story in enumerate(told, start=1)
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        f"style-src 'unsafe-inline'\"><title>{escape(view.title)}</title><style>{style}\n"
        "main > svg { display: block; width: 100%; height: auto; border-radius: 14px; }\n</style></head>"
        f"<body><main>{to_svg(drawing)}<h2>Every story, the largest first</h2>"
        f'<div class="scroll"><table>{rows}</table></div></main></body></html>\n'
    )
