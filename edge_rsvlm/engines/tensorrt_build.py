"""ONNX -> TensorRT engine, on the machine that will run it: strongly typed, so that the file's types decide."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from edge_rsvlm.config.manifest import ShapeRange
from edge_rsvlm.config.units import format_bytes
from edge_rsvlm.engines.cuda import Cuda, Gpu
from edge_rsvlm.engines.tensorrt_library import (
    CLASSIC,
    Builder,
    Complaints,
    Config,
    Network,
    Parser,
    Profile,
    RtxConfig,
    TensorRt,
    new_network,
)
from edge_rsvlm.errors import BudgetError, BundleError, UsageError

BUILD_FACTOR = 4
"""Weights as read, as laid out for the kernels tried, as serialized, and scratch: three to four times the weights."""
PROC = Path("/proc")
SMALLER = "free memory (close the desktop), build a smaller precision, or run with --device cpu"
Shapes = Mapping[str, ShapeRange]


def free_memory(cuda: Cuda, gpu: Gpu, proc: Path = PROC) -> int:
    """Bytes of the memory that the GPU uses. A Jetson's is that of Linux, which gives up its file caches for it."""
    if not gpu.integrated:
        return cuda.free_bytes()
    lines = (proc / "meminfo").read_text().splitlines()
    kib = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    return kib * 1024


def require_room(cuda: Cuda, free_bytes: int, graph: str, parameter_bytes: int, largest_bytes: int) -> None:
    """BudgetError, with the numbers, unless a build of so many bytes of weights fits, of which ``largest_bytes``
    are one tensor.

    Whether the GPU gives that in one piece is tried: what a board's driver can piece together no number tells.
    """
    needed = BUILD_FACTOR * parameter_bytes
    if free_bytes < needed:
        raise BudgetError(
            f"building {graph} takes about {format_bytes(needed)} ({BUILD_FACTOR} times its "
            f"{format_bytes(parameter_bytes)} of weights), and {format_bytes(free_bytes)} are free",
            fix=SMALLER,
        )
    try:
        cuda.free(cuda.allocate(largest_bytes))
    except BudgetError as exc:
        raise BudgetError(
            f"building {graph} takes {format_bytes(largest_bytes)} in one piece for its largest weight, and the GPU "
            f"gives no such piece of {format_bytes(free_bytes)} that are free",
            fix="restart the board, give its kernel a larger pool (cma=950M in extlinux.conf), or use --device cpu",
        ) from exc


@dataclass(frozen=True)
class Built:
    """``timing_cache`` makes the next build on this GPU faster; empty where the library has none."""

    plan: bytes
    timing_cache: bytes


@dataclass(frozen=True)
class BuildSettings:
    """``workspace_bytes`` bounds scratch memory. ``compute_capability`` (as "8.6") compiles for that GPU without having
    one, which only TensorRT for RTX can."""

    workspace_bytes: int
    timing_cache: bytes = b""
    compute_capability: str | None = None


def build(library: TensorRt, complaints: Complaints, graph: Path, shapes: Shapes, settings: BuildSettings) -> Built:
    """The engine of an ONNX file; BundleError says which node or shape TensorRT does not take."""
    builder = library.Builder(complaints.logger)
    network = new_network(library, builder)
    parser = library.OnnxParser(network, complaints.logger)
    if not parser.parse_from_file(str(graph)):
        raise BundleError(f"TensorRT cannot read {graph.name}: {_mistakes(parser)}", fix="export it for TensorRT again")
    config = builder.create_builder_config()
    config.set_memory_pool_limit(library.MemoryPoolType.WORKSPACE, settings.workspace_bytes)
    _add_profile(builder, network, config, graph, shapes)
    if settings.compute_capability is not None:
        _compile_for(library, cast(RtxConfig, config), settings.compute_capability)
    cached = library.__name__ == CLASSIC  # for RTX there are no timings
    if cached and not config.set_timing_cache(config.create_timing_cache(settings.timing_cache), False):
        config.set_timing_cache(config.create_timing_cache(b""), False)  # it was another GPU's
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise BundleError(f"TensorRT cannot build {graph.name}: {complaints.reason()}", fix=SMALLER)
    return Built(bytes(plan), bytes(config.get_timing_cache().serialize()) if cached else b"")


def _compile_for(library: TensorRt, config: RtxConfig, compute_capability: str) -> None:
    known: Any = getattr(library, "ComputeCapability", None)
    wanted = getattr(known, f"SM{compute_capability.replace('.', '')}", None)
    if wanted is None:
        raise UsageError(
            f"{library.__name__} {library.__version__} compiles for no GPU of compute capability {compute_capability}",
            fix="build on the machine that has one, or install TensorRT for RTX for desktop GPUs",
        )
    config.num_compute_capabilities = 1
    config.set_compute_capability(wanted, 0)


def _mistakes(parser: Parser) -> str:
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    return "; ".join(f"{e.node_operator()} {e.node_name()}: {e.desc()}" for e in errors) or "it does not say why"


def _add_profile(builder: Builder, network: Network, config: Config, graph: Path, shapes: Shapes) -> None:
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        span = shapes.get(tensor.name)
        if span is not None:
            _set_shape(profile, tensor.name, span)
        elif min(tensor.shape, default=0) < 0:
            raise BundleError(f"the manifest has no shapes for '{tensor.name}' of {graph.name}", fix="export it again")
    if config.add_optimization_profile(profile) < 0:
        raise BundleError(f"TensorRT refuses the shapes of {graph.name}", fix="export it again")


def _set_shape(profile: Profile, name: str, span: ShapeRange) -> None:
    try:
        profile.set_shape(name, span.least, span.usual, span.most)
    except ValueError as exc:
        raise BundleError(f"TensorRT refuses the shapes {span} of '{name}' ({exc})", fix="export it again") from exc
