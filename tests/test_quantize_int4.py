"""Weights in 4 bits: numbers and their packing, the three methods, whole graphs for both engines, and memory."""

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
from edge_rsvlm.export.quantize.awq import output_error  # noqa: E402
from edge_rsvlm.export.quantize.folding import divide_before  # noqa: E402
from edge_rsvlm.export.quantize.gptq import DAMP, gptq  # noqa: E402
from edge_rsvlm.export.quantize.layers import attribute, find_layers, groups_of  # noqa: E402
from edge_rsvlm.export.quantize.nbits import Blocks, pack, unpack  # noqa: E402
from edge_rsvlm.export.quantize.rewriting import Rewriting  # noqa: E402
from edge_rsvlm.export.quantize.rtn import SHRINKS, searched_grid  # noqa: E402
from edge_rsvlm.export.quantize.settings import Int4  # noqa: E402
from edge_rsvlm.export.quantize.stream import Stream  # noqa: E402
from edge_rsvlm.export.quantize.weight_only import quantize_int4  # noqa: E402

FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16
WIDTH = 64


def session(model):
    chosen = ort.SessionOptions()
    chosen.log_severity_level = 3
    source = model.SerializeToString() if isinstance(model, onnx.ModelProto) else str(model)
    return ort.InferenceSession(source, chosen, providers=["CPUExecutionProvider"])


def run(model, x):
    return session(model).run(None, {"x": x})[0]


def correlated(rows: int, width: int, seed: int = 0):
    """Inputs along a few directions, the same for every seed, as activations are, and a little of all others."""
    rng, directions = np.random.default_rng(seed), np.random.default_rng(7).normal(size=(width // 8, width))
    few = rng.normal(size=(rows, width // 8)) @ directions
    return (few + 0.3 * rng.normal(size=(rows, width))).astype(np.float32)


def hessian_of(x):
    rows = torch.from_numpy(x)
    return rows.T @ rows / len(rows)


def normal(*shape: int, seed: int = 0):
    return (np.random.default_rng(seed).normal(size=shape) / shape[-1] ** 0.5).astype(np.float32)


def saved(path: Path, nodes, arrays, width=WIDTH, outputs=("y",), type_=FLOAT, rank=2, external=False):
    held = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", type_, ["n", width])],
        [helper.make_tensor_value_info(name, type_, [None] * rank) for name in outputs], held,
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, path, save_as_external_data=external, location=f"{path.name}.data", size_threshold=1024)
    return path


def perceptron(path: Path, stored=np.float32, **options) -> Path:
    """Norm -> two layers that share it, one with a bias -> their product -> a third layer."""
    arrays = {
        "gamma": np.linspace(0.5, 2, WIDTH, dtype=np.float32),
        "beta": np.linspace(-1, 1, WIDTH, dtype=np.float32),
        "up": normal(WIDTH, 96, seed=1).astype(stored), "gate": normal(96, WIDTH, seed=2).astype(stored),
        "bias": np.linspace(-1, 1, 96, dtype=np.float32), "down": normal(96, 48, seed=3).astype(stored),
    }  # fmt: skip
    wide = {name: name for name in ("up", "gate", "down")}
    casts = []
    if stored != np.float32:
        wide = {name: f"{name}_f32" for name in wide}
        casts = [helper.make_node("Cast", [name], [to], name=to, to=FLOAT) for name, to in wide.items()]
    nodes = [
        *casts,
        helper.make_node("LayerNormalization", ["x", "gamma", "beta"], ["normed"], name="norm"),
        helper.make_node("MatMul", ["normed", wide["up"]], ["a"], name="up_product"),
        helper.make_node("Gemm", ["normed", wide["gate"], "bias"], ["b"], name="gate_product", transB=1),
        helper.make_node("Mul", ["a", "b"], ["c"], name="mul"),
        helper.make_node("MatMul", ["c", wide["down"]], ["y"], name="down_product"),
    ]
    return saved(path, nodes, arrays, **options)


def samples(count: int = 6, rows: int = 40):
    return [{"x": correlated(rows, WIDTH, seed)} for seed in range(count)]


def relative(found, wanted) -> float:
    return float(np.linalg.norm(found.astype(np.float32) - wanted) / np.linalg.norm(wanted))


def layers_of(path: Path) -> dict[str, Blocks]:
    """The MatMulNBits layers of a written graph, by output."""
    graph = onnx.load(path).graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Cast" and node.input[0] in arrays:
            arrays[node.output[0]] = arrays[node.input[0]]
    found = {}
    for node in graph.node:
        if node.op_type == "MatMulNBits":
            numbers, scales, zeros = [*(arrays[name] for name in node.input[1:]), None][:3]
            found[node.output[0]] = unpack(
                numbers, scales.reshape(attribute(node, "N"), -1), zeros, attribute(node, "K"), attribute(node, "bits")
            )
    return found


def blocks_of(outputs: int, inputs: int, block: int, *, symmetric: bool, seed: int = 0) -> Blocks:
    rng, count = np.random.default_rng(seed), -(-inputs // block)
    return Blocks(
        rng.integers(0, 16, (outputs, inputs), dtype=np.uint8),
        rng.uniform(0.01, 1, (outputs, count)).astype(np.float16),
        None if symmetric else rng.integers(0, 16, (outputs, count), dtype=np.uint8),
        block, 4,
    )  # fmt: skip


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block", [16, 32, 64, 128])
@pytest.mark.parametrize("inputs", [32, 77, 128, 301])
def test_onnxruntime_reads_the_values_that_are_packed(block, inputs, symmetric):
    blocks = blocks_of(7, inputs, block, symmetric=symmetric)
    numbers, zeros = pack(blocks)
    again = unpack(numbers, blocks.scales_NG, zeros, inputs, 4)
    np.testing.assert_array_equal(again.numbers_NK, blocks.numbers_NK)
    np.testing.assert_array_equal(again.values_NK(), blocks.values_NK())
    assert again.block == block

    arrays = {"numbers": numbers, "scales": blocks.scales_NG.astype(np.float32)} | (
        {} if symmetric else {"zeros": zeros}
    )
    node = helper.make_node(
        "MatMulNBits", ["x", *arrays], ["y"], domain="com.microsoft", K=inputs, N=7, bits=4, block_size=block
    )
    graph = helper.make_graph(
        [node], "g", [helper.make_tensor_value_info("x", FLOAT, ["n", inputs])],
        [helper.make_tensor_value_info("y", FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    found = run(helper.make_model(graph, opset_imports=opsets, ir_version=10), np.eye(inputs, dtype=np.float32))
    np.testing.assert_allclose(found.T, blocks.values_NK(), rtol=1e-6, atol=1e-7)


def test_weights_on_the_grid_stay_as_they_are():
    weight_NK = 0.5 * (torch.arange(32.0).reshape(2, 16) % 16 - 8)
    grid = searched_grid(weight_NK, torch.ones(16), 16, 4)
    assert grid.scales_NG.flatten().tolist() == [0.5, 0.5]
    assert grid.round(weight_NK)[0].tolist() == list(range(16))
    np.testing.assert_array_equal(grid.blocks(grid.round(weight_NK)).values_NK(), weight_NK)


@pytest.mark.parametrize(("sign", "zero"), [(1, 0), (-1, 15)])
def test_zeros_lie_where_the_block_ends(sign, zero):
    weight_NK = sign * 0.25 * torch.arange(16.0)[None]
    grid = searched_grid(weight_NK, torch.ones(16), 16, 4, symmetric=False)
    assert (grid.scales_NG.item(), grid.zeros_NG.item()) == (0.25, zero)
    np.testing.assert_array_equal(grid.values(grid.round(weight_NK)), weight_NK)


def test_rounding_takes_the_nearest_number():
    weight_NK = torch.tensor([[0.24, 0.26, -0.74, -0.76, 1.49, -4.0, 3.5] + [0.0] * 9])
    grid = searched_grid(weight_NK, torch.ones(16), 16, 4)
    assert grid.scales_NG.item() == 0.5
    assert grid.round(weight_NK)[0, :7].tolist() == [8, 9, 7, 6, 11, 0, 15]


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_searched_range_is_no_worse_than_the_whole(monkeypatch, symmetric):
    weight_NK, importance_K = torch.from_numpy(normal(40, 96)), torch.rand(96) + 0.1
    weight_NK[3] = 0
    errors = []
    for shrinks in (SHRINKS[:1], SHRINKS):
        monkeypatch.setattr("edge_rsvlm.export.quantize.rtn.SHRINKS", shrinks)
        grid = searched_grid(weight_NK, importance_K, 32, 4, symmetric=symmetric)
        values_NK = grid.values(grid.round(weight_NK))
        assert not values_NK[3].any() and (grid.scales_NG > 0).all()
        errors.append(((values_NK - weight_NK).square() * importance_K).sum(1))
    assert (errors[1] <= errors[0] * 1.0001).all() and errors[1].sum() < 0.97 * errors[0].sum()


def dense_gptq(weight_NK, hessian_KK, grid):
    """One input after another, the inverse of what is left computed anew for each: no Cholesky, no lazy blocks."""
    weight, damped = weight_NK.numpy().astype(np.float64), hessian_KK.numpy().astype(np.float64)
    damped = damped + DAMP * np.diag(damped).mean() * np.eye(len(damped))
    left = list(np.argsort(-np.diag(hessian_KK.numpy()), kind="stable"))
    values = np.zeros_like(weight)
    while left:
        k = left[0]
        scales, zeros = (part.numpy()[:, 0] for part in grid.of_inputs(torch.tensor([k])))
        values[:, k] = (np.clip(np.round(weight[:, k] / scales + zeros), 0, 15) - zeros) * scales
        inverse = np.linalg.inv(damped[np.ix_(left, left)])
        weight[:, left] -= np.outer(weight[:, k] - values[:, k], inverse[0] / inverse[0, 0])
        left = left[1:]
    return values


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("inputs", [48, 150])
def test_gptq_is_what_the_paper_says(inputs, symmetric):
    weight_NK, hessian_KK = torch.from_numpy(normal(12, inputs)), hessian_of(correlated(400, inputs))
    grid = searched_grid(weight_NK, hessian_KK.diagonal(), 32, 4, symmetric=symmetric)
    found = grid.values(gptq(weight_NK, hessian_KK, grid)).numpy()
    wanted = dense_gptq(weight_NK, hessian_KK, grid)
    # A tie that float32 breaks the other way moves what comes after in its row.
    same = np.isclose(found, wanted, atol=1e-6).all(1)
    assert same.mean() >= 0.9


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("block", [16, 128])
def test_gptq_is_never_worse_than_rounding(block, seed):
    weight_NK, hessian_KK = torch.from_numpy(normal(24, 144, seed=seed)), hessian_of(correlated(300, 144, seed))
    grid = searched_grid(weight_NK, hessian_KK.diagonal(), block, 4)
    nearest, fitted = grid.round(weight_NK), gptq(weight_NK, hessian_KK, grid)
    errors = [output_error(grid.values(numbers) - weight_NK, hessian_KK) for numbers in (nearest, fitted)]
    assert errors[1] < 0.5 * errors[0]


def test_inputs_that_are_zero_or_equal_do_no_harm():
    x = correlated(50, 64)
    x[:, 5] = 0
    x[:, 7] = x[:, 6]
    weight_NK, hessian_KK = torch.from_numpy(normal(8, 64)), hessian_of(x)
    grid = searched_grid(weight_NK, hessian_KK.diagonal(), 32, 4)
    numbers = gptq(weight_NK, hessian_KK, grid)
    assert numbers.isfinite().all()
    np.testing.assert_array_equal(numbers[:, 5], grid.round(weight_NK)[:, 5])
    silent = gptq(weight_NK, torch.zeros(64, 64), grid)
    np.testing.assert_array_equal(silent, grid.round(weight_NK))


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
