"""A graph that was written for TensorRT, kept where nothing is known to keep it from building.

What is known without a device: rules, and the parser and the compiler of TensorRT for RTX where that is installed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edge_rsvlm.bundle.external_data import external_data
from edge_rsvlm.config.manifest import Manifest, ShapeRange, TensorRtGraph
from edge_rsvlm.errors import BundleError, InputError, UsageError
from edge_rsvlm.export.tensorrt.compiled import NEAREST, compiled_bytes, compiler
from edge_rsvlm.export.tensorrt.report import known_problems, unsupported
from edge_rsvlm.export.tensorrt.shapes import shape_ranges

COMPILED_BYTES = 1 << 30
"""Larger graphs are not compiled: an export shall not need the memory of its model."""
NO_DEVICE = "no device ran it"


@dataclass(frozen=True)
class Checked:
    """``graph`` for the manifest, or None where TensorRT would not take it. ``said`` tells what is known."""

    graph: TensorRtGraph | None
    said: str


def checked(manifest: Manifest, name: str, source: Path, file: Path) -> Checked:
    """Of ``file``, which was made of graph ``name`` in ``source``, and is removed where TensorRT would not take it.

    The other graphs of the manifest lie beside ``source``.
    """
    try:
        shapes = shape_ranges(manifest, name, source)
        said = _verdict(file, shapes)
    except (BundleError, InputError) as exc:
        for path in (file, *(file.with_name(f"{stem}.data") for stem in (f"{file.stem}.f16", file.name))):
            path.unlink(missing_ok=True)
        return Checked(None, f"left to ONNX Runtime: {str(exc).removesuffix(f'; {exc.fix}')}")
    return Checked(TensorRtGraph(file=file.name, shapes=shapes), f"{said}; {NO_DEVICE}")


def _verdict(file: Path, shapes: dict[str, ShapeRange]) -> str:
    """BundleError with everything that would not build."""
    small = _bytes(file) <= COMPILED_BYTES
    if problems := unsupported(file) if small else known_problems(file):
        raise BundleError("; ".join(map(str, problems)), fix="leave it out")
    if not small:
        return "checked by rules: too large to be compiled here"
    try:
        library = compiler()
    except UsageError:
        return "checked by rules: TensorRT for RTX is not installed here"
    compiled_bytes(file, shapes)
    return f"compiled for SM{NEAREST.replace('.', '')} by {library.__name__} {library.__version__}"


def _bytes(file: Path) -> int:
    return file.stat().st_size + sum(tensor.length or 0 for tensor in external_data(file))
