"""A graph that was written for TensorRT, kept where nothing is known to be wrong with it.

What is known without a device: rules, the parser and the compiler of TensorRT for RTX where that is installed, and what
a processor computes of the golden probe when it takes the graph as it stands.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_rsvlm.bundle.external_data import external_data
from edge_rsvlm.config.manifest import Manifest, ShapeRange, TensorRtGraph
from edge_rsvlm.errors import BundleError, InputError, UsageError
from edge_rsvlm.export.graphs.sliced import run_sliced
from edge_rsvlm.export.proof.gates import GATES, tensor_checks
from edge_rsvlm.export.tensorrt.compiled import NEAREST, compiled_bytes, compiler
from edge_rsvlm.export.tensorrt.report import known_problems, unsupported
from edge_rsvlm.export.tensorrt.shapes import shape_ranges

COMPILED_BYTES = 1 << 30
"""Larger graphs are not compiled: an export shall not need the memory of its model."""
LEAST_COSINE = 0.95
"""Of an output to that before: fewer bits cost thousandths of it, a graph that computes something else tenths."""


@dataclass(frozen=True)
class Checked:
    """``graph`` for the manifest, or None where TensorRT would not take it. ``said`` tells what is known."""

    graph: TensorRtGraph | None
    said: str


def checked(manifest: Manifest, name: str, source: Path, file: Path, golden: Path) -> Checked:
    """Of ``file``, which was made of graph ``name`` in ``source``, and is removed where TensorRT would not take it.

    The other graphs of the manifest lie beside ``source``. ``golden`` has what the graph computed before.
    """
    try:
        shapes = shape_ranges(manifest, name, source)
        said = f"{_verdict(file, shapes)}, run on no device, {_agreement(file, golden)}"
    except (BundleError, InputError) as exc:
        for path in (file, *(file.with_name(f"{stem}.data") for stem in (f"{file.stem}.f16", file.name))):
            path.unlink(missing_ok=True)
        return Checked(None, f"left to ONNX Runtime: {str(exc).removesuffix(f'; {exc.fix}')}")
    return Checked(TensorRtGraph(file=file.name, shapes=shapes), said)


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


def _agreement(file: Path, golden: Path) -> str:
    """BundleError where a processor computes something else of it.

    Node by node: what onnxruntime fuses it for, symmetric 8 bits beside half precision, came out wrong.
    """
    with np.load(golden) as stored:
        inputs, wanted = ({k[len(p) :]: stored[k] for k in stored.files if k.startswith(p)} for p in ("in.", "out."))
    found = run_sliced(file, inputs, wanted.keys())
    checks = [check for name, value in found for check in tensor_checks(name, value, wanted[name], GATES["f16"])]
    least = min(check.value for check in checks if check.metric == "cosine")
    if least < LEAST_COSINE:
        raise BundleError(f"it computes something else: cosine {least:.4f} to the graph before", fix="report this")
    return f"cosine {least:.4f} to the graph before on a processor"


def _bytes(file: Path) -> int:
    return file.stat().st_size + sum(tensor.length or 0 for tensor in external_data(file))
