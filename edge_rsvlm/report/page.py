"""The page: one HTML file with its pictures inside, which opens from disk and asks nothing of a network."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from string import Template

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edge_rsvlm.report.views import Item, SceneView, TaskView

WEBP_QUALITY = 86
TITLES = {"caption": "Caption", "detect": "Objects", "change": "Changes"}
STAGES = {"read": "read", "tiles": "cut tiles", "engine": "model", "merge": "merge"}


@dataclass(frozen=True)
class PageFacts:
    """What the page says of the model and the run: rows of (name, value), and accuracy rows as they stand."""

    bundle: str
    machine: str
    seconds: float
    about: tuple[tuple[str, str], ...]
    accuracy: tuple[tuple[str, str, str, str], ...]


def render(scenes: Sequence[SceneView], facts: PageFacts) -> str:
    """The whole page."""
    files = resources.files("edge_rsvlm.report")
    parts = {name.partition(".")[0]: (files / name).read_text("utf-8") for name in ("style.css", "script.js")}
    template = Template((files / "page.html").read_text("utf-8"))
    return template.substitute(
        parts,
        bundle=escape(facts.bundle),
        count=len(scenes),
        seconds=f"{facts.seconds:.1f}",
        machine=escape(facts.machine),
        contents="".join(f'<a href="#{escape(s.name)}">{escape(s.title)}</a>' for s in scenes),
        scenes="\n".join(map(_scene, scenes)),
        about=_facts(facts.about),
        accuracy=_accuracy(facts.accuracy),
    )


def data_uri(picture_HW3: NDArray[np.uint8]) -> str:
    """A picture as WebP inside a URI."""
    buffer = io.BytesIO()
    Image.fromarray(picture_HW3).save(buffer, "WEBP", quality=WEBP_QUALITY, method=6)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _scene(scene: SceneView) -> str:
    sections = "".join(_task(scene, view) for view in scene.tasks)
    return (
        f'<section class="scene" id="{escape(scene.name)}"><header><h2>{escape(scene.title)}</h2></header>'
        f'<div class="columns"><div class="look no-labels no-tiles">{_figure(scene)}{_controls(scene)}</div>'
        f'<div class="facts">{sections}<div class="where">{_facts(scene.facts)}</div></div></div>'
        f'<p class="credit">{escape(scene.credit)}</p></section>'
    )


def _figure(scene: SceneView) -> str:
    """Pictures, and over them the outlines of every result, which scale with the page."""
    pair = len(scene.pictures_HW3) == 2
    pictures = f'<img alt="{escape(scene.title)}" src="{data_uri(scene.pictures_HW3[-1])}">'
    knob = '<i class="cut"></i>' if pair else ""
    if pair:
        pictures += f'<img class="before" alt="before" src="{data_uri(scene.pictures_HW3[0])}">'
    # Large outlines first, so that small ones stay reachable above them.
    views = sorted(scene.tasks, key=lambda view: ("caption", "change", "detect").index(view.task))
    layers = "".join(_layer(scene, view) for view in views)
    return (
        f'<figure class="stage{" pair" if pair else ""}" style="--aspect:{scene.aspect:.4f}">{pictures}'
        f"{layers}{knob}</figure>"
    )


def _layer(scene: SceneView, view: TaskView) -> str:
    """Outlines and tags of one task; those of one date lie over that date alone."""
    width, height = scene.size
    outlines = "".join(_outline(scene, view, i, item) for i, item in enumerate(view.items))
    tags = "".join(_tag(scene, view, i, item) for i, item in enumerate(view.items))
    return (
        f'<div class="layer {"both" if view.task == "change" else "later"}" aria-hidden="true">'
        f'<svg viewBox="0 0 {width} {height}" preserveAspectRatio="none">{outlines}</svg>{tags}</div>'
    )


def _key(scene: SceneView, view: TaskView, i: int) -> str:
    return escape(f"{scene.name}-{view.task}-{i}")


def _tip(item: Item) -> str:
    score = "" if item.score is None else f" · {item.score:.2f}"
    area = f" · {item.area}" if item.area else ""
    return escape(f"{item.label}{score}{area}\n{item.where}")


def _outline(scene: SceneView, view: TaskView, i: int, item: Item) -> str:
    path = "".join("M" + "L".join(f"{x:g},{y:g}" for x, y in ring[:-1]) + "Z" for ring in item.rings)
    return f'<path class="{item.kind}" data-key="{_key(scene, view, i)}" data-tip="{_tip(item)}" d="{path}"/>'


def _tag(scene: SceneView, view: TaskView, i: int, item: Item) -> str:
    (width, height), (x0, y0, _, _) = scene.size, item.bounds
    text = str(i + 1) if item.kind != "object" else f"{item.label} {item.score:.2f}"
    place = f"left:{x0 / width:.2%};top:{y0 / height:.2%}"
    return f'<b class="{item.kind}" data-key="{_key(scene, view, i)}" style="{place}">{escape(text)}</b>'


def _controls(scene: SceneView) -> str:
    """Switches for what lies over the picture, and the slider between two dates."""
    kinds = {item.kind for view in scene.tasks for item in view.items}
    switches: list[tuple[str, str, bool, set[str]]] = [
        ("objects", "Boxes", True, {"object"}),
        ("areas", "Changes", True, {"area"}),
        ("labels", "Labels", False, {"object", "area"}),
        ("tiles", "Tiles", False, {"tile"}),
    ]
    buttons = "".join(
        f'<button type="button" data-switch="{name}" aria-pressed="{str(on).lower()}">{text}</button>'
        for name, text, on, shown in switches
        if kinds & shown
    )
    slider = ""
    if len(scene.pictures_HW3) == 2:
        before, after = map(escape, scene.dates)
        slider = (
            f'<label class="dates"><time>{before}</time>'
            f'<input type="range" min="0" max="100" value="50" step="0.5" aria-label="from {before} to {after}">'
            f"<time>{after}</time></label>"
        )
    return f'{slider}<div class="switches">{buttons}</div>'


def _task(scene: SceneView, view: TaskView) -> str:
    items = "".join(_row(scene, view, i, item) for i, item in enumerate(view.items))
    shown = items if view.task != "caption" or len(view.items) > 1 else ""
    rows = f'<ol class="rows">{shown}</ol>' if shown else ""
    return (
        f'<article class="{view.task}"><h3>{TITLES[view.task]}</h3><p class="summary">{escape(view.summary)}</p>{rows}'
        f"{_timing(view)}</article>"
    )


def _row(scene: SceneView, view: TaskView, i: int, item: Item) -> str:
    score = "" if item.score is None else f'<span class="score" style="--s:{item.score:.3f}">{item.score:.2f}</span>'
    area = f'<span class="area">{escape(item.area)}</span>' if item.area else ""
    return (
        f'<li tabindex="0" data-key="{_key(scene, view, i)}"><span class="label">{escape(item.label)}</span>'
        f'<span class="place">{escape(item.where)}</span>{area}{score}</li>'
    )


def _timing(view: TaskView) -> str:
    """One bar of the stages, its parts as long as they took, and what was covered."""
    total = sum(view.timing_ms.values())
    bars = "".join(
        f'<i class="{stage}" style="flex-grow:{ms / total:.4f}"></i>' for stage, ms in view.timing_ms.items() if total
    )
    parts = " · ".join(f"{STAGES.get(stage, stage)} {ms:.0f} ms" for stage, ms in view.timing_ms.items())
    links = " · ".join(f'<a href="{escape(f)}">{escape(f.rpartition(".")[2].upper())}</a>' for f in view.files)
    return (
        f'<div class="bar" aria-hidden="true">{bars}</div><p class="small">{escape(parts)} · '
        f"{view.coverage:.0%} of the valid area · {links}</p>"
    )


def _facts(rows: Iterable[tuple[str, str]]) -> str:
    body = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in rows)
    return f"<dl>{body}</dl>"


def _accuracy(rows: Sequence[tuple[str, str, str, str]]) -> str:
    if not rows:
        return ""
    head = "".join(f"<th>{name}</th>" for name in ("task", "score", "95 % interval", "measured on"))
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<h3>Measured accuracy</h3><div class="scroll"><table><tr>{head}</tr>{body}</table></div>'
