"""Ranges of activations from recorded calls, by onnxruntime's calibrators."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx
from onnxruntime.quantization import CalibrationDataReader
from onnxruntime.quantization.calibrate import (
    EntropyCalibrater,
    MinMaxCalibrater,
    PercentileCalibrater,
    TensorData,
)

from edge_rsvlm.engines.onnxruntime import ort
from edge_rsvlm.export.quantize.calibration import Arrays
from edge_rsvlm.export.quantize.loaded import Model
from edge_rsvlm.export.quantize.settings import Int8
from edge_rsvlm.export.quantize.stored import copied

NAME = "graph.onnx"
Ranges = dict[str, TensorData]


class _OneCall(CalibrationDataReader):
    def __init__(self, call: Arrays) -> None:
        self._calls = iter([call])

    def get_next(self) -> Arrays:
        return next(self._calls, {})


def find_ranges(model: Model, tensors: Collection[str], calls: Sequence[Arrays], settings: Int8) -> Ranges:
    """The range of each of ``tensors`` over all calls.

    The calibrators hold what one run computes, so they are given one call at a time, and merge their histograms.
    """
    if not tensors:
        return {}
    with tempfile.TemporaryDirectory(prefix="ranges-") as folder, contextlib.redirect_stdout(io.StringIO()):
        path = Path(folder) / NAME
        save(model, path)
        calibrator = _calibrator(path, settings)
        known = {value.name: value for value in (*model.graph.value_info, *model.graph.output, *model.graph.input)}
        calibrator.select_tensors_to_calibrate = lambda _: (set(tensors) & known.keys(), known)
        calibrator.augment_graph()
        calibrator.create_inference_session()
        for call in calls:
            calibrator.collect_data(_OneCall(call))
        found = calibrator.compute_data()
    return {name: found[name] for name in found.keys()}  # noqa: SIM118 - it has no iterator


def _calibrator(path: Path, settings: Int8) -> Any:
    given: dict[str, Any] = {
        "augmented_model_path": str(path.with_name("augmented.onnx")), "use_external_data_format": True,
    }  # fmt: skip
    if settings.ranges == "minmax":
        return MinMaxCalibrater(path, **given)
    if settings.ranges == "entropy":
        return EntropyCalibrater(path, num_bins=2048, num_quantized_bins=128, **given)
    return PercentileCalibrater(path, percentile=settings.percentile, **given)


def save(model: Model, path: Path) -> None:
    """Weights beside the graph, which stays below the two gigabytes of a protocol buffer."""
    onnx.save(copied(model), path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=1024)


def each_run(model: Model, values: Collection[str], calls: Sequence[Arrays]) -> Iterator[Arrays]:
    """What the graph makes of each call: ``values`` by name, of inside the graph or its outputs."""
    names, watched = list(values), copied(model)
    known = {output.name for output in model.graph.output}
    watched.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in known)
    with tempfile.TemporaryDirectory(prefix="run-") as folder:
        path = Path(folder) / NAME
        save(watched, path)
        del watched
        session = plain_session(path)
        for call in calls:
            yield dict(zip(names, session.run(names, call), strict=True)) if names else {}


def plain_session(path: Path) -> Any:
    """A session that computes node by node what is written."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
