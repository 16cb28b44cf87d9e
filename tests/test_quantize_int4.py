"""Weights in 4 bits: the three methods on whole graphs for both engines, and memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="needs onnx: not installed")
torch = pytest.importorskip("torch", reason="needs torch: not installed")
ort = pytest.importorskip("onnxruntime", reason="needs onnxruntime: not installed")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from edge_rsvlm.errors import InputError, UsageError  # noqa: E402
from edge_rsvlm.export.quantize import weight_only  # noqa: E402
from edge_rsvlm.export.quantize.folding import divide_before  # noqa: E402
from edge_rsvlm.export.quantize.gptq import gptq  # noqa: E402
from edge_rsvlm.export.quantize.layers import attribute, find_layers, groups_of  # noqa: E402
from edge_rsvlm.export.quantize.rewriting import Rewriting  # noqa: E402
from edge_rsvlm.export.quantize.rtn import searched_grid  # noqa: E402
from edge_rsvlm.export.quantize.settings import Int4  # noqa: E402
from edge_rsvlm.export.quantize.stream import Stream  # noqa: E402
from edge_rsvlm.export.quantize.weight_only import quantize_int4  # noqa: E402
from tests.int4_graphs import (  # noqa: E402
    FLOAT,
    HALF,
    WIDTH,
    correlated,
    hessian_of,
    layers_of,
    normal,
    perceptron,
    relative,
    run,
    samples,
    saved,
    session,
)


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
@pytest.mark.parametrize("block", [16, 32, 64, 128])
def test_a_graph_computes_nearly_the_same(tmp_path, method, block):
    source, out = perceptron(tmp_path / "g.onnx"), tmp_path / "out.onnx"
    metrics = quantize_int4(source, samples(), Int4(method=method, block=block), out, None)
    assert metrics["layers"] == 3 and metrics["bytes_after"] < 0.3 * metrics["bytes_before"]
    onnx.checker.check_model(onnx.load(source))
    nodes = [node for node in onnx.load(out).graph.node if node.op_type == "MatMulNBits"]
    assert [attribute(node, "block_size") for node in nodes] == [block] * 3
    x = correlated(60, WIDTH, seed=99)
    assert 0 < relative(run(out, x), run(source, x)) < 0.25


def test_calibrated_methods_are_better_than_rounding(tmp_path):
    source, x = perceptron(tmp_path / "g.onnx"), correlated(200, WIDTH, seed=99)
    wanted, errors = run(source, x), {}
    for method in ("rtn", "gptq"):
        quantize_int4(source, samples(12), Int4(method=method), tmp_path / f"{method}.onnx", None)
        errors[method] = relative(run(tmp_path / f"{method}.onnx", x), wanted)
    assert errors["gptq"] < 0.7 * errors["rtn"]


def salient(path: Path) -> tuple[Path, list[dict]]:
    """A layer four of whose inputs are thirty times as large as the others."""
    given = samples()
    for sample in given:
        sample["x"] = np.random.default_rng(len(sample["x"])).normal(size=(64, WIDTH)).astype(np.float32)
        sample["x"][:, [3, 17, 34, 60]] *= 30
    return saved(path, [helper.make_node("MatMul", ["x", "w"], ["y"], name="m")], {"w": normal(WIDTH, 96)}), given


def test_awq_protects_inputs_that_carry_much(tmp_path):
    source, given = salient(tmp_path / "g.onnx")
    errors = {}
    for method in ("rtn", "awq"):
        quantize_int4(source, given, Int4(method=method, block=64), tmp_path / f"{method}.onnx", None)
        errors[method] = relative(run(tmp_path / f"{method}.onnx", given[0]["x"]), run(source, given[0]["x"]))
    assert errors["awq"] < 0.6 * errors["rtn"]


MAKERS = {
    "LayerNormalization": (helper.make_node("LayerNormalization", ["x", "gamma", "beta"], ["h"], name="n"), 0),
    "Mul": (helper.make_node("Mul", ["x", "gamma"], ["h"], name="n"), 0),
    "Tanh": (helper.make_node("Tanh", ["x"], ["h"], name="n"), 1),
}


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("maker", MAKERS)
def test_scaled_inputs_leave_the_function_as_it_was(tmp_path, maker, shared):
    node, muls = MAKERS[maker]
    nodes = [
        node,
        helper.make_node("MatMul", ["h", "w"], ["y"], name="m"),
        helper.make_node("MatMul", ["h", "v"], ["z"], name="m2"),
    ]
    arrays = {"gamma": np.linspace(0.5, 2, WIDTH, dtype=np.float32), "beta": np.ones(WIDTH, np.float32)}
    arrays |= {"w": normal(WIDTH, 64), "v": normal(WIDTH, 48, seed=1)}
    outputs = ("y", "z", "h") if shared else ("y", "z")
    source = saved(tmp_path / "g.onnx", nodes, arrays, outputs=outputs)
    (tmp_path / "work").mkdir()
    work = Rewriting(source, tmp_path / "work")
    (group,) = groups_of(work.originals, find_layers(work.model.graph, work.constants, work.tensors, ()))
    given = samples(2)
    stream = Stream(work.model, work.constants, given, tmp_path / "work")
    stream.begin(work.needed_from(0), work.tensors)
    stream.run(work.nodes(0, group.at), work.tensors, work.needed_from(group.at))
    before = [rows.numpy() for rows in stream.rows("h")]
    scales_K = np.geomspace(0.1, 10, WIDTH, dtype=np.float32)
    reading = divide_before(work, group, scales_K, stream)
    for layer in group.layers:
        scaled = work.add_tensor(f"{layer.output}_scaled", (layer.weight_NK(work.constants, work.tensors) * scales_K).T)
        work.replace(layer.node, [helper.make_node("MatMul", [reading, scaled], [layer.output], name=layer.output)])
    work.write(tmp_path / "out.onnx")
    found = onnx.load(tmp_path / "out.onnx")
    assert sum(n.op_type == "Mul" for n in found.graph.node) == (muls or shared) + (maker == "Mul")
    x = correlated(30, WIDTH, seed=9)
    for one, other in zip(
        session(found).run(None, {"x": x}), session(onnx.load(source)).run(None, {"x": x}), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-5)
    if reading == "h":
        for rows, was in zip(stream.rows("h"), before, strict=True):
            np.testing.assert_allclose(rows * torch.from_numpy(scales_K), was, rtol=1e-5)


def test_a_layer_is_fitted_to_what_the_layers_before_it_give_now(tmp_path):
    """Numbers of the third layer, from the inputs that onnxruntime's kernels of the first two give."""
    source, out, given = perceptron(tmp_path / "g.onnx"), tmp_path / "out.onnx", samples(3)
    quantize_int4(source, given, Int4(), out, None)
    model = onnx.load(out)
    model.graph.output.append(helper.make_tensor_value_info("c", FLOAT, None))
    each = [hessian_of(session(model).run(["c"], sample)[0]) for sample in given]
    hessian_KK = torch.stack(each).mean(0)
    weight_NK = torch.from_numpy(normal(96, 48, seed=3).T.copy())
    grid = searched_grid(weight_NK, hessian_KK.diagonal(), 32, 4, symmetric=False)
    found = layers_of(out)["y"].numbers_NK
    assert (found == gptq(weight_NK, hessian_KK, grid).numpy()).mean() > 0.99

    first = run(source, given[0]["x"])
    assert first.shape == (40, 48)


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
@pytest.mark.parametrize("external", [False, True])
def test_half_precision_behind_casts_and_weights_in_files(tmp_path, method, external):
    plain = perceptron(tmp_path / "plain.onnx", np.float16)
    source = perceptron(tmp_path / "g.onnx", np.float16, external=external)
    assert (tmp_path / "g.onnx.data").exists() == external
    for graph in (plain, source):
        quantize_int4(graph, samples(), Int4(method=method), tmp_path / f"{graph.stem}4.onnx", None)
    x = correlated(60, WIDTH, seed=99)
    np.testing.assert_array_equal(run(tmp_path / "g4.onnx", x), run(tmp_path / "plain4.onnx", x))
    assert relative(run(tmp_path / "g4.onnx", x), run(source, x)) < 0.25
    names = {tensor.name for tensor in onnx.load(tmp_path / "g4.onnx").graph.initializer}
    assert not names & {"up", "gate", "down"} and not list(tmp_path.glob(".int4-*"))


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
def test_graphs_that_compute_in_half_precision_stay_so(tmp_path, method):
    nodes = [
        helper.make_node("Mul", ["x", "gamma"], ["h"], name="n"),
        helper.make_node("MatMul", ["h", "w"], ["y"], name="m"),
    ]
    arrays = {"gamma": np.linspace(0.5, 2, WIDTH).astype(np.float16), "w": normal(WIDTH, 64).astype(np.float16)}
    source = saved(tmp_path / "g.onnx", nodes, arrays, type_=HALF)
    given = [{"x": correlated(40, WIDTH, seed).astype(np.float16)} for seed in range(3)]
    quantize_int4(source, given, Int4(method=method), tmp_path / "out.onnx", None)
    x = correlated(30, WIDTH, seed=9).astype(np.float16)
    found = run(tmp_path / "out.onnx", x)
    assert found.dtype == np.float16 and relative(found, run(source, x).astype(np.float32)) < 0.2


@pytest.mark.parametrize("stored", [np.float32, np.float16])
@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
def test_tensorrt_gets_the_same_numbers(tmp_path, method, stored):
    source, out, tensorrt = perceptron(tmp_path / "g.onnx", stored), tmp_path / "out.onnx", tmp_path / "trt.onnx"
    quantize_int4(source, samples(), Int4(method=method, block=32), out, tensorrt)
    model = onnx.load(tensorrt)
    onnx.checker.check_model(model, full_check=True)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 21)]
    arrays = {tensor.name: tensor for tensor in model.graph.initializer}
    found = [node for node in model.graph.node if node.op_type == "DequantizeLinear"]
    layers = layers_of(out)
    assert len(found) == len(layers) == 3
    for node, blocks in zip(
        found, (layers[f"{node.output[0].removesuffix('_weight_half')}"] for node in found), strict=True
    ):
        numbers, scales = (arrays[name] for name in node.input)
        assert (numbers.data_type, attribute(node, "block_size"), attribute(node, "axis")) == (TensorProto.INT4, 32, 0)
        assert blocks.zeros_NG is None and scales.data_type == HALF
        np.testing.assert_array_equal(
            numpy_helper.to_array(numbers).astype(np.int32).T, blocks.numbers_NK.astype(np.int32) - 8
        )
        np.testing.assert_array_equal(numpy_helper.to_array(scales).T, blocks.scales_NG)
    x = correlated(60, WIDTH, seed=99)
    assert relative(run(tensorrt, x), run(out, x)) < 0.02  # half precision on one side, 8-bit activations on the other


def test_what_tensorrt_does_not_take_has_the_same_values_in_half_precision(tmp_path):
    source = saved(
        tmp_path / "g.onnx", [helper.make_node("MatMul", ["x", "w"], ["y"], name="m")], {"w": normal(77, 40)}, width=77
    )  # fmt: skip
    quantize_int4(source, (), Int4(method="rtn"), tmp_path / "out.onnx", tmp_path / "trt.onnx")
    model = onnx.load(tmp_path / "trt.onnx")
    assert all(node.op_type != "DequantizeLinear" for node in model.graph.node)
    assert [entry.version for entry in model.opset_import] == [20]
    (blocks,) = layers_of(tmp_path / "out.onnx").values()
    halves = [t for t in model.graph.initializer if t.data_type == HALF]
    np.testing.assert_array_equal(numpy_helper.to_array(halves[0]).T, blocks.values_NK().astype(np.float16))


def test_small_layers_products_of_activations_and_those_kept_stay(tmp_path):
    nodes = [
        helper.make_node("MatMul", ["x", "narrow"], ["a"], name="to_few"),
        helper.make_node("MatMul", ["a", "few"], ["b"], name="from_few"),
        helper.make_node("Transpose", ["b"], ["t"], name="t", perm=[1, 0]),
        helper.make_node("MatMul", ["b", "t"], ["scores"], name="scores"),
        helper.make_node("MatMul", ["scores", "b"], ["c"], name="mixed"),
        helper.make_node("MatMul", ["c", "head.weight"], ["d"], name="head"),
        helper.make_node("MatMul", ["d", "w"], ["y"], name="last"),
    ]
    arrays = {
        "narrow": normal(WIDTH, 16),
        "few": normal(16, WIDTH),
        "head.weight": normal(WIDTH, 64),
        "w": normal(64, 48),
    }
    source = saved(tmp_path / "g.onnx", nodes, arrays)
    metrics = quantize_int4(source, samples(1), Int4(keep=("head",)), tmp_path / "out.onnx", None)
    kinds = {node.output[0]: node.op_type for node in onnx.load(tmp_path / "out.onnx").graph.node}
    assert metrics["layers"] == 1 and kinds["y"] == "MatMulNBits"
    assert all(kinds[name] == "MatMul" for name in ("a", "b", "scores", "c", "d"))


def test_a_table_shared_with_an_embedding_stays_for_it(tmp_path):
    nodes = [
        helper.make_node("Cast", ["x"], ["ids"], name="ids", to=TensorProto.INT64),
        helper.make_node("Gather", ["table", "ids"], ["rows"], name="embed"),
        helper.make_node("Transpose", ["table"], ["turned"], name="turned", perm=[1, 0]),
        helper.make_node("MatMul", ["rows", "turned"], ["y"], name="head"),
    ]
    source = saved(tmp_path / "g.onnx", nodes, {"table": normal(100, 32)}, width=5, rank=3)
    given = [{"x": np.arange(20, dtype=np.float32).reshape(4, 5)}]
    quantize_int4(source, given, Int4(), tmp_path / "out.onnx", tmp_path / "trt.onnx")
    wanted = run(source, given[0]["x"])
    for name in ("out.onnx", "trt.onnx"):
        assert relative(run(tmp_path / name, given[0]["x"]), wanted) < 0.2
        assert "table" in " ".join(tensor.name for tensor in onnx.load(tmp_path / name).graph.initializer)


def test_what_cannot_be_done_is_told(tmp_path):
    source = perceptron(tmp_path / "g.onnx")
    for method in ("gptq", "awq"):
        with pytest.raises(UsageError, match="calibration"):
            quantize_int4(source, (), Int4(method=method), tmp_path / "out.onnx", None)
    small = saved(
        tmp_path / "s.onnx", [helper.make_node("MatMul", ["x", "w"], ["y"], name="m")], {"w": normal(WIDTH, 8)}
    )
    with pytest.raises(UsageError, match="no layer"):
        quantize_int4(small, samples(1), Int4(), tmp_path / "out.onnx", None)
    broken = samples(1)
    broken[0]["x"][0, 0] = np.inf
    with pytest.raises(InputError, match="not finite"):
        quantize_int4(source, broken, Int4(), tmp_path / "out.onnx", None)
    assert not (tmp_path / "out.onnx").exists() and not list(tmp_path.glob(".int4-*"))


def test_values_between_layers_go_to_files_beyond_a_bound(tmp_path, monkeypatch):
    source, x = perceptron(tmp_path / "g.onnx"), correlated(60, WIDTH, seed=99)
    quantize_int4(source, samples(), Int4(), tmp_path / "held.onnx", None)
    kept = []
    true = weight_only.Stream

    def spilling(*arguments):
        stream = true(*arguments, memory_bytes=0)
        kept.append(stream._files)
        return stream

    monkeypatch.setattr(weight_only, "Stream", spilling)
    quantize_int4(source, samples(), Int4(), tmp_path / "mapped.onnx", None)
    assert kept[0]._count >= 12
    np.testing.assert_array_equal(run(tmp_path / "mapped.onnx", x), run(tmp_path / "held.onnx", x))


MEMORY = """
import json, sys, threading, time
from pathlib import Path
import numpy as np
from edge_rsvlm.export.quantize import graph_files
from edge_rsvlm.export.quantize.settings import Int4
from edge_rsvlm.export.quantize.weight_only import quantize_int4

graph_files.EMBEDDED_BYTES = 1 << 20  # arrays apart, as those of a large model

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))

def watch():
    while not done.is_set():
        peaks.append(resident())
        time.sleep(0.002)

folder, method = Path(sys.argv[1]), sys.argv[2]
samples = [{"x": np.load(path)} for path in sorted(folder.glob("*.npy"))]
quantize_int4(folder / "small.onnx", samples, Int4(method=method), folder / "s.onnx", folder / "t.onnx")
done, peaks = threading.Event(), []
before = resident()
watcher = threading.Thread(target=watch, daemon=True)
watcher.start()
quantize_int4(folder / "deep.onnx", samples, Int4(method=method), folder / "o.onnx", folder / "p.onnx")
done.set()
watcher.join()
print(json.dumps({"growth": max(peaks) - before}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc: memory is read there")
@pytest.mark.skipif(not os.environ.get("EDGE_RSVLM_SLOW"), reason="needs EDGE_RSVLM_SLOW=1: two minutes")
@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
def test_memory_does_not_grow_with_depth(tmp_path, method):
    """48 layers of 4 MiB each in a file: what is held is a few times one layer's size, not their 192 MiB."""
    width, depth = 1024, 48
    for seed in range(4):
        np.save(tmp_path / f"{seed}.npy", correlated(32, width, seed))
    for name, count in (("small", 2), ("deep", depth)):
        nodes, arrays = [], {}
        for index in range(count):
            arrays[f"w{index}"] = normal(width, width, seed=index)
            given, gives = f"h{index}" if index else "x", "y" if index == count - 1 else f"h{index + 1}"
            nodes.append(helper.make_node("MatMul", [given, f"w{index}"], [gives], name=gives))
        saved(tmp_path / f"{name}.onnx", nodes, arrays, width=width, external=True)
    command = [sys.executable, "-c", MEMORY, str(tmp_path), method]
    # glibc then gives back what is freed at once: what is held is measured, not what the allocator keeps for later.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    said = subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout
    assert json.loads(said.splitlines()[-1])["growth"] < 20 * width * width * 4
