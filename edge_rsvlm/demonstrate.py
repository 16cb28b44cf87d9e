"""The packaged scenes, and the report of what the tasks found in them."""

from __future__ import annotations

import json
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edge_rsvlm.config.manifest import Manifest
from edge_rsvlm.config.model import Model
from edge_rsvlm.config.units import format_bytes
from edge_rsvlm.geo import PixelMapper, metres_per_pixel
from edge_rsvlm.raster.reader import Raster, open_raster
from edge_rsvlm.report.overlay import write_overlay
from edge_rsvlm.report.page import PageFacts, render
from edge_rsvlm.report.views import Item, Ring, SceneView, TaskView
from edge_rsvlm.types import Window

SCENES = Path(__file__).parent / "scenes"
SHOWN_PERCENTILES = (0.5, 99.5)
SHOWN_GAMMA = 0.8


class Scene(Model):
    """One packaged scene. ``before`` is the earlier date of a pair; ``dates`` are those of the pair."""

    name: str
    title: str
    place: str
    image: str
    before: str | None = None
    dates: tuple[str, ...] = ()
    tasks: tuple[Literal["caption", "detect", "change"], ...]
    credit: str

    @property
    def path(self) -> str:
        return str(SCENES / self.image)

    @property
    def before_path(self) -> str:
        assert self.before is not None
        return str(SCENES / self.before)


@dataclass(frozen=True)
class TaskResult:
    """The ``--json`` record of a task over a scene, and the files written: the GeoJSON first."""

    record: dict[str, Any]
    files: tuple[Path, ...]


def packaged_scenes() -> list[Scene]:
    return [Scene.model_validate(entry) for entry in json.loads((SCENES / "scenes.json").read_text("utf-8"))]


def write_report(
    folder: Path,
    manifest: Manifest,
    results: Sequence[tuple[Scene, Mapping[str, TaskResult]]],
    threads: int,
    seconds: float,
) -> list[Path]:
    """Overlays beside each GeoJSON, and ``index.html`` in ``folder``; returns what was written."""
    written: list[Path] = []
    views = []
    for scene, found in results:
        view = _scene_view(scene, found, folder)
        tasks = []
        for task in view.tasks:
            overlay = folder / task.task / f"{scene.name}.png"
            write_overlay(overlay, view, task)
            written.append(overlay)
            tasks.append(replace(task, files=(*task.files, overlay.relative_to(folder).as_posix())))
        views.append(replace(view, tasks=tuple(tasks)))
    page = folder / "index.html"
    page.write_text(render(views, _page_facts(manifest, threads, seconds)), encoding="utf-8")
    return [*written, page]


def _scene_view(scene: Scene, found: Mapping[str, TaskResult], folder: Path) -> SceneView:
    pictures = []
    for path in [*([scene.before_path] if scene.before else []), scene.path]:
        with open_raster(path) as raster:
            pictures.append(_shown(raster))
            facts = _scene_facts(scene, raster)
            metres = metres_per_pixel(raster.georeference) or (1.0, 1.0)
    height, width = pictures[-1].shape[:2]
    tasks = tuple(_task_view(task, result, folder) for task, result in found.items())
    aspect = width * metres[0] / (height * metres[1])
    return SceneView(scene.name, scene.title, scene.credit, scene.dates, facts, tuple(pictures), aspect, tasks)


def _shown(raster: Raster) -> NDArray[np.uint8]:
    """Red, green and blue [H, W, 3] for the eye: 8-bit values as they are, others stretched per band."""
    whole = Window(0, 0, raster.georeference.width, raster.georeference.height)
    data_CHW = raster.read(whole).data_CHW
    roles = list(raster.band_roles)
    rgb_3HW = data_CHW[[roles.index(role) for role in ("red", "green", "blue")]]
    if rgb_3HW.dtype == np.uint8:
        return np.ascontiguousarray(rgb_3HW.transpose(1, 2, 0))
    low, high = np.percentile(rgb_3HW.astype(np.float32), SHOWN_PERCENTILES, axis=(1, 2))[:, :, None, None]
    share_3HW = np.clip((rgb_3HW - low) / np.maximum(high - low, 1), 0, 1) ** SHOWN_GAMMA
    return np.ascontiguousarray(np.rint(share_3HW * 255).astype(np.uint8).transpose(1, 2, 0))


def _scene_facts(scene: Scene, raster: Raster) -> tuple[tuple[str, str], ...]:
    georeference = raster.georeference
    facts = [("place", scene.place)]
    mapper = PixelMapper(georeference)
    if mapper.located:
        ((lon, lat),) = mapper.to_lonlat(np.array([[georeference.width / 2, georeference.height / 2]]))
        facts.append(("centre", _degrees(lon, lat)))
    pixel = metres_per_pixel(georeference)
    size = f"{georeference.width} × {georeference.height} px"
    facts.append(("size", size if pixel is None else f"{size} of {pixel[0]:.3g} × {pixel[1]:.3g} m"))
    facts.append(("bands", f"{', '.join(raster.band_roles)} ({raster.dtype})"))
    return tuple(facts)


def _task_view(task: str, result: TaskResult, folder: Path) -> TaskView:
    record = result.record
    features = json.loads(result.files[0].read_text("utf-8"))["features"]
    make = {"caption": _tile_item, "detect": _object_item, "change": _area_item}[task]
    key = {"caption": "tiles", "detect": "detections", "change": "changes"}[task]
    pairs = sorted(zip(record[key], features, strict=True), key=lambda pair: _rank(pair[0]))
    items = tuple(make(entry, _where(feature)) for entry, feature in pairs)
    files = tuple(path.relative_to(folder).as_posix() for path in result.files)
    return TaskView(task, summary(task, record), items, record["coverage"], record["timing_ms"], files)


def _rank(entry: Mapping[str, Any]) -> tuple[float, float]:
    """The largest changes and the surest objects first; tiles stay in their order."""
    return -entry.get("area_px", 0), -entry.get("score", 0)


def summary(task: str, record: Mapping[str, Any]) -> str:
    """What a task found, in one line."""
    if task == "caption":
        return record["caption"] or "no valid pixel"
    if task == "detect":
        counts = Counter(found["label"] for found in record["detections"])
        return ", ".join(f"{count} {label}" for label, count in counts.most_common()) or "nothing found"
    changes = record["changes"]
    share = f"{record['changed_fraction']:.1%} of the valid area"
    areas = [found["area_m2"] for found in changes]
    count = f"{len(changes)} change{'' if len(changes) == 1 else 's'}"
    if not changes or None in areas:
        return f"{count}, {share}"
    return f"{count} over {_square_metres(sum(areas))}, {share}"


def _tile_item(entry: Mapping[str, Any], where: str) -> Item:
    return Item("tile", (_box_ring(entry["box"]),), entry["caption"], None, where)


def _object_item(entry: Mapping[str, Any], where: str) -> Item:
    return Item("object", (_box_ring(entry["box"]),), entry["label"], entry["score"], where)


def _area_item(entry: Mapping[str, Any], where: str) -> Item:
    geometry = entry["polygon"]
    parts = geometry["coordinates"] if geometry["type"] == "MultiPolygon" else [geometry["coordinates"]]
    rings = tuple(tuple((float(x), float(y)) for x, y in ring) for part in parts for ring in part)
    area = f"{entry['area_px']:,} px" if entry["area_m2"] is None else _square_metres(entry["area_m2"])
    return Item("area", rings, "change", entry["score"], where, area)


def _box_ring(box: Sequence[float]) -> Ring:
    x, y, w, h = box
    return ((x, y), (x + w, y), (x + w, y + h), (x, y + h), (x, y))


def _where(feature: Mapping[str, Any]) -> str:
    """The middle of a result: in degrees where its feature is on the map, else in pixels."""
    geometry = feature["geometry"]
    if geometry is None:
        return "not on the map"
    first = geometry["coordinates"][0]
    ring = np.array(first[0] if geometry["type"] == "MultiPolygon" else first, np.float64)
    x, y = (ring.min(axis=0) + ring.max(axis=0)) / 2
    return f"x {x:.0f}, y {y:.0f} px" if "crs" in feature["properties"] else _degrees(x, y)


def _degrees(lon: float, lat: float) -> str:
    return f"{abs(lat):.5f}° {'N' if lat >= 0 else 'S'}, {abs(lon):.5f}° {'E' if lon >= 0 else 'W'}"


def _square_metres(area: float) -> str:
    return f"{area:,.0f} m²"


def _page_facts(manifest: Manifest, threads: int, seconds: float) -> PageFacts:
    size = sum(entry.bytes for entry in manifest.files.values())
    about = (
        ("bundle", f"{manifest.name}, version {manifest.version}"),
        ("what it is", manifest.description),
        ("licence", manifest.licence),
        ("size", f"{format_bytes(size)}, {manifest.precision}"),
        ("trained on", ", ".join(manifest.training_data) or "not stated"),
    )
    accuracy = tuple(
        (a.task, f"{a.metric} {a.value:.3f}", f"{a.interval[0]:.3f} to {a.interval[1]:.3f}", f"{a.data}, {a.samples}")
        for a in manifest.accuracy
    )
    machine = f"{threads} CPU thread{'s' if threads > 1 else ''} ({platform.machine()})"
    return PageFacts(f"{manifest.name} version {manifest.version}", machine, seconds, about, accuracy)
