"""Which device answers: the GPU where its engines were built, or the CPU; and what that takes of memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from pydantic import BaseModel

from edge_rsvlm.bundle import Bundle
from edge_rsvlm.config.task_specs import ReferTask, Tasks
from edge_rsvlm.errors import UsageError
from edge_rsvlm.pipeline.runtime import EngineFactory, cpu_engine

DeviceName = Literal["auto", "gpu", "cpu"]


@dataclass(frozen=True)
class Placement:
    """Where a bundle runs. ``bundle`` counts the GPU's memory in what its tasks need. ``note`` is for people; empty
    where there is nothing to say."""

    bundle: Bundle
    engine: EngineFactory
    device: Literal["gpu", "cpu"]
    note: str = ""


def place(bundle: Bundle, device: DeviceName, adapter: str | None = None) -> Placement:
    """``auto`` is the GPU where engines were built for this bundle and fit what is here, else the CPU.

    UsageError for ``gpu`` where it cannot be had, with the reason: an ``adapter``, say, which engines know nothing of.
    """
    if device == "cpu" or (device == "auto" and not _was_built(bundle)):
        return _on_cpu(bundle)
    try:
        if adapter is not None:
            raise UsageError(f"engines know nothing of the adapter '{adapter}'", fix="run with --device cpu")
        return _on_gpu(bundle)
    except UsageError as exc:
        if device == "gpu":
            raise
        return _on_cpu(bundle, f"runs on the CPU: {exc}")


def _on_cpu(bundle: Bundle, note: str = "") -> Placement:
    return Placement(bundle, cpu_engine, "cpu", note)


def _was_built(bundle: Bundle) -> bool:
    """Asked first: nothing of TensorRT is loaded for a bundle without engines."""
    if all(graph.tensorrt is None for graph in bundle.manifest.graphs.values()):
        return False
    from edge_rsvlm.pipeline.built import engines_folder

    return any(engines_folder(bundle).glob("*.plan"))


def _on_gpu(bundle: Bundle) -> Placement:
    from edge_rsvlm.engines.tensorrt_device import open_device
    from edge_rsvlm.pipeline.built import find, sources
    from edge_rsvlm.pipeline.engines import GpuEngine

    wanted = sources(bundle)
    device = open_device()
    found = {source.cpu: find(bundle, device, source) for source in wanted}
    engines = {path: engine for path, engine in found.items() if engine is not None}
    if missing := [source.name for source in wanted if source.cpu not in engines]:
        raise UsageError(
            f"no engines of this GPU and TensorRT for {', '.join(missing)}", fix="run `edge-rsvlm engine build`"
        )
    resident = {engine.name: engine.resident_bytes for engine in engines.values()}
    others = [name for name in bundle.manifest.graphs if name not in resident]
    note = f"runs on {device.gpu.name}" + (f"; on the CPU: {', '.join(others)}" if others else "")
    return Placement(with_gpu_memory(bundle, resident), partial(GpuEngine, device, engines), "gpu", note)


def with_gpu_memory(bundle: Bundle, resident: Mapping[str, int]) -> Bundle:
    """The bundle with tasks that count their engines: ``resident`` bytes by graph. What was measured for ONNX Runtime
    stays where a graph of the task still runs there."""
    changed = {}
    for verb, task in bundle.manifest.tasks:
        if task is None:
            continue
        parts = [task, bundle.manifest.tasks.detect] if isinstance(task, ReferTask) else [task]
        graphs = {name for part in parts for name in _graphs(part)} & bundle.manifest.graphs.keys()
        engines = sum(resident.get(name, 0) for name in graphs)
        cpu = task.memory.session_bytes if graphs - resident.keys() or not graphs else 0
        memory = task.memory.model_copy(update={"session_bytes": cpu + engines})
        changed[verb] = task.model_copy(update={"memory": memory})
    tasks: Tasks = bundle.manifest.tasks.model_copy(update=changed)
    return replace(bundle, manifest=bundle.manifest.model_copy(update={"tasks": tasks}))


def _graphs(value: Any) -> Iterator[str]:
    """Every name below a task that may be a graph's."""
    for field, below in value:
        if isinstance(below, BaseModel):
            yield from _graphs(below)
        elif isinstance(below, str) and field in ("graph", "encoder", "head", "project", "embed"):
            yield below
