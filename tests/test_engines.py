"""Engines: what they do to the machine that runs them."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest


def test_onnxruntime_neither_reports_nor_leaves_a_device_id(needs, tmp_path):
    needs("onnxruntime")
    code = "from edge_rsvlm.engines.onnxruntime import OnnxRuntimeEngine; OnnxRuntimeEngine()"
    places = {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ORT_")} | places
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.parametrize(
    ("flags", "exact"),
    [("avx2 avx512f", False), ("avx2 avx_vnni", True), ("avx512f avx512_vnni", True), ("avx512_vnnix", False)],
)
def test_processors_that_sum_in_32_bits(needs, flags, exact, tmp_path):
    needs("onnxruntime")
    from edge_rsvlm.engines.onnxruntime import sums_in_32_bits

    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: fpu {flags} sse\n")
    assert sums_in_32_bits(tmp_path / "cpuinfo") == exact
    assert not sums_in_32_bits(tmp_path / "absent")


@pytest.mark.parametrize("vnni", [None, False])
def test_the_largest_products_of_8_bits_are_summed_exactly(needs, vnni, tmp_path, monkeypatch):
    """As this processor does, and as one does without VNNI."""
    needs("onnxruntime")
    onnx = pytest.importorskip("onnx", reason="needs onnx: not installed")
    from edge_rsvlm.engines import onnxruntime as engine

    if vnni is not None:
        monkeypatch.setattr(engine, "sums_in_32_bits", lambda: vnni)
    helper, floats = onnx.helper, onnx.TensorProto.FLOAT
    length, one = 64, helper.make_tensor("one", floats, [], [1.0])
    weights = helper.make_tensor("w", onnx.TensorProto.INT8, [length, 16], [127] * length * 16)
    zeros = [helper.make_tensor(f"zero_{kind}", getattr(onnx.TensorProto, kind), [], [0]) for kind in ("UINT8", "INT8")]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "one", "zero_UINT8"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "one", "zero_UINT8"], ["a"]),
        helper.make_node("DequantizeLinear", ["w", "one", "zero_INT8"], ["b"]),
        helper.make_node("MatMul", ["a", "b"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(name, floats, [1, size]) for name, size in (("x", length), ("y", 16))]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], [one, weights, *zeros])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "g.onnx")
    (found,) = engine.OnnxRuntimeEngine().open(tmp_path / "g.onnx").run({"x": np.full((1, length), 255, "f4")}, ["y"])
    np.testing.assert_array_equal(found, length * 255 * 127)
