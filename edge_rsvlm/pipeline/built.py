"""TensorRT engines that this machine built for a bundle: kept in the user's cache, with a stamp of what they are for.

An engine serves one graph on one GPU with one TensorRT; its stamp says which, and where anything differs it is built
again. Engines and stamps appear whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from edge_rsvlm.bundle import Bundle
from edge_rsvlm.bundle.contents import sha256
from edge_rsvlm.bundle.external_data import external_data
from edge_rsvlm.bundle.home import cache_folder, locked, make_private, replacing
from edge_rsvlm.config.manifest import ShapeRange
from edge_rsvlm.engines.tensorrt import TensorRtSession
from edge_rsvlm.engines.tensorrt_build import BuildSettings, build, free_memory, require_room
from edge_rsvlm.engines.tensorrt_device import Device
from edge_rsvlm.errors import BundleError, UsageError

RELEASE = Path("/etc/nv_tegra_release")
Progress = Callable[[str], None]
"""The graph whose engine is built next."""


@dataclass(frozen=True)
class Source:
    """A graph of a bundle as TensorRT takes it. ``cpu`` is its file for ONNX Runtime, by which the runtime asks."""

    name: str
    cpu: Path
    file: Path
    sha256: str
    """Over the file and its external data."""
    parameter_bytes: int
    largest_bytes: int
    """At least the bytes of its largest tensor."""
    shapes: dict[str, ShapeRange]


@dataclass(frozen=True)
class Engine:
    """One engine on disk. ``resident_bytes`` is what opening it took of the memory that the GPU uses, measured here."""

    name: str
    plan: Path
    bytes: int
    resident_bytes: int
    seconds: float
    built: bool
    """Now, and not before."""


def sources(bundle: Bundle) -> list[Source]:
    """The graphs that a bundle has for TensorRT; UsageError where there are none."""
    found = list(_sources(bundle))
    if not found:
        raise UsageError(
            f"bundle '{bundle.manifest.name}' has no graphs for TensorRT",
            fix='run with --device cpu, or export it with engines = ["onnxruntime", "tensorrt"] in the recipe',
        )
    return found


def _sources(bundle: Bundle) -> Iterator[Source]:
    for name, graph in bundle.manifest.graphs.items():
        if graph.tensorrt is None:
            continue
        file, files = graph.tensorrt.file, bundle.manifest.files
        tensors = list(external_data(bundle.path(file)))
        beside = sorted({str(PurePosixPath(file).parent / t.location.removeprefix("./")) for t in tensors})
        digest = hashlib.sha256(json.dumps([files[part].sha256 for part in (file, *beside)]).encode()).hexdigest()
        sizes = [tensor.length or 0 for tensor in tensors]
        own = files[file].bytes
        yield Source(
            name, bundle.path(graph.file), bundle.path(file), digest, own + sum(sizes), max([own, *sizes]),
            graph.tensorrt.shapes,
        )  # fmt: skip


def engines_folder(bundle: Bundle) -> Path:
    """Where engines of this bundle are; it may not exist."""
    return cache_folder() / "engines" / bundle.manifest_sha256


def system() -> str:
    """L4T of a Jetson, as "36.4.3", which goes with JetPack; empty elsewhere."""
    try:
        text = RELEASE.read_text()
    except OSError:
        return ""
    found = re.search(r"R(\d+) .*REVISION: ([\d.]+)", text)
    return f"{found[1]}.{found[2]}" if found else text.partition("\n")[0]


def stamp(device: Device, source: Source) -> dict[str, Any]:
    """What an engine is for."""
    return {
        "gpu": device.gpu.name,
        "compute_capability": device.gpu.compute_capability,
        "tensorrt": f"{device.library.__name__} {device.library.__version__}",
        "l4t": system(),
        "graph_sha256": source.sha256,
        "shapes": {name: span.model_dump(mode="json") for name, span in source.shapes.items()},
    }


def find(bundle: Bundle, device: Device, source: Source) -> Engine | None:
    """The engine of a graph, where one was built for exactly this."""
    plan = _plan(bundle, source)
    try:
        facts = json.loads(plan.with_suffix(".json").read_text())
        if facts["for"] != stamp(device, source) or sha256(plan) != facts["sha256"]:
            return None
        return Engine(source.name, plan, facts["bytes"], facts["resident_bytes"], facts["seconds"], built=False)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def build_engines(bundle: Bundle, device: Device, limit_bytes: int | None, progress: Progress) -> list[Engine]:
    """Engines for every graph that the bundle has for TensorRT; those that fit are kept.

    ``limit_bytes`` bounds the memory of a build beside what is free. UsageError for a bundle without such graphs,
    BudgetError where there is no room, BundleError where TensorRT does not take a graph.
    """
    wanted = sources(bundle)
    folder = make_private(engines_folder(bundle))
    with locked(folder / ".lock"):
        return [
            find(bundle, device, source) or _build(bundle, device, source, limit_bytes, progress) for source in wanted
        ]


def _build(bundle: Bundle, device: Device, source: Source, limit_bytes: int | None, progress: Progress) -> Engine:
    free_bytes = free_memory(device.cuda, device.gpu)
    if limit_bytes is not None:
        free_bytes = min(free_bytes, limit_bytes)
    require_room(device.cuda, free_bytes, source.name, source.parameter_bytes, source.largest_bytes)
    progress(source.name)
    started = time.monotonic()
    timings = _timings(device)
    settings = BuildSettings(free_bytes // 2, timings.read_bytes() if timings.exists() else b"")
    made = build(device.library, device.complaints, source.file, source.shapes, settings)
    seconds = round(time.monotonic() - started, 2)
    if made.timing_cache:
        with replacing(timings) as file:
            file.write(made.timing_cache)
    return _keep(bundle, device, source, made.plan, seconds)


def _keep(bundle: Bundle, device: Device, source: Source, data: bytes, seconds: float) -> Engine:
    """Write the engine once it was opened; its stamp comes last, and counts."""
    before = free_memory(device.cuda, device.gpu)
    session = TensorRtSession(device, data, source.name)
    after = free_memory(device.cuda, device.gpu)
    resident = max(before - after, len(data) + session.device_bytes)
    session.close()
    plan = _plan(bundle, source)
    plan.with_suffix(".json").unlink(missing_ok=True)
    with replacing(plan) as file:
        file.write(data)
    facts = {
        "for": stamp(device, source), "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data),
        "resident_bytes": resident, "seconds": seconds,
    }  # fmt: skip
    with replacing(plan.with_suffix(".json")) as file:
        file.write(json.dumps(facts, indent=1).encode())
    return Engine(source.name, plan, len(data), resident, seconds, built=True)


def _plan(bundle: Bundle, source: Source) -> Path:
    return engines_folder(bundle) / f"{source.sha256[:32]}.plan"


def _timings(device: Device) -> Path:
    key = f"{device.gpu.name} {device.library.__version__}"
    return cache_folder() / "engines" / f"timings-{hashlib.sha256(key.encode()).hexdigest()[:16]}.cache"


def read_plan(engine: Engine) -> bytes:
    try:
        return engine.plan.read_bytes()
    except OSError as exc:
        raise BundleError(f"cannot read {engine.plan}: {exc.strerror}", fix="run `edge-rsvlm engine build`") from exc


def record(engine: Engine) -> dict[str, Any]:
    """For JSON."""
    return {**asdict(engine), "plan": str(engine.plan)}
