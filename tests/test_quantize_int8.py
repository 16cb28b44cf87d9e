"""INT8 graphs against the float32 graphs they come from: what is in 8 bits, what stays, and how far results move."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch: not installed")
pytest.importorskip("transformers", reason="needs transformers: not installed")
onnx = pytest.importorskip("onnx", reason="needs onnx: not installed")

import onnxruntime  # noqa: E402
from onnx import TensorProto, helper  # noqa: E402
from PIL import Image  # noqa: E402

import edge_rsvlm  # noqa: E402
from edge_rsvlm.bundle import load_bundle  # noqa: E402
from edge_rsvlm.export.quantize.calibration import record  # noqa: E402
from edge_rsvlm.export.quantize.choose import int8_kind  # noqa: E402
from edge_rsvlm.export.quantize.chosen import choose_nodes  # noqa: E402
from edge_rsvlm.export.quantize.dynamic import quantize_dynamic  # noqa: E402
from edge_rsvlm.export.quantize.equalise import equalise  # noqa: E402
from edge_rsvlm.export.quantize.likeness import likeness, resolution_warning  # noqa: E402
from edge_rsvlm.export.quantize.loaded import array_of, constants, load_wide, readers  # noqa: E402
from edge_rsvlm.export.quantize.ranges import each_run, find_ranges  # noqa: E402
from edge_rsvlm.export.quantize.rounding import round_convolutions  # noqa: E402
from edge_rsvlm.export.quantize.settings import CalibrationImages, Int8  # noqa: E402
from edge_rsvlm.export.quantize.smooth import smooth  # noqa: E402
from edge_rsvlm.export.quantize.static import quantize_static  # noqa: E402
from edge_rsvlm.export.quantize.typed import half_precision  # noqa: E402
from edge_rsvlm.pipeline.session import Limits, Session  # noqa: E402
from edge_rsvlm.raster.inputs import list_inputs  # noqa: E402
from tests import fakes  # noqa: E402
from tests.int8_graphs import CONVOLUTIONS, OPSET, SIDE_PX, TracedTower, conv_net, model, store  # noqa: E402

SLOW = os.environ.get("EDGE_RSVLM_SLOW") == "1"
SCENES = Path(edge_rsvlm.__file__).parent / "scenes"
PRECISIONS = ("f32", "f16")
MINMAX = Int8(ranges="minmax")
LEVEL = onnxruntime.GraphOptimizationLevel


def tiles(count: int, side_px: int = SIDE_PX, seed: int = 0):
    rng = np.random.default_rng(seed)
    return [{"tiles": rng.normal(size=(1, 3, side_px, side_px)).astype(np.float32)} for _ in range(count)]


def run(path, calls, level=LEVEL.ORT_ENABLE_ALL):
    """Outputs by name, calls stacked."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level, options.intra_op_num_threads, options.log_severity_level = level, 1, 3
    given = path if isinstance(path, bytes) else str(path)
    session = onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    found = [session.run(names, call) for call in calls]
    return {name: np.concatenate([outputs[k] for outputs in found]) for k, name in enumerate(names)}


def loss(found, wanted) -> float:
    """Greatest relative error (Frobenius norm) of an output."""
    return max(float(np.linalg.norm(found[n] - wanted[n]) / np.linalg.norm(wanted[n])) for n in wanted)


def optimized(path, folder):
    """Operators that onnxruntime runs, counted."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(folder / "optimized.onnx"), 3
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [node.op_type for node in onnx.load(options.optimized_model_filepath, load_external_data=False).graph.node]
    return {name: names.count(name) for name in names}


def int8_weights(path):
    """Arrays by name, of matrices and kernels alone."""
    stored = {tensor.name: tensor for tensor in onnx.load(path).graph.initializer}
    return {n: array_of(t) for n, t in stored.items() if t.data_type == TensorProto.INT8 and len(t.dims) > 1}


@pytest.fixture(scope="module")
def tower():
    return TracedTower(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )


@pytest.fixture(scope="module", params=PRECISIONS)
def towers(request, tower, tmp_path_factory):
    """The tower's graph."""
    return tower.store(tmp_path_factory.mktemp("tower") / "tower.onnx", request.param)


@pytest.fixture(params=PRECISIONS)
def convolutions(request, tmp_path):
    return store(conv_net(), tmp_path / "net.onnx", request.param)


@pytest.fixture(params=[(net, precision) for net in ("convolutions", "tower") for precision in PRECISIONS])
def net(request, tower, tmp_path):
    kind, precision = request.param
    path = tmp_path / "net.onnx"
    return store(conv_net(), path, precision) if kind == "convolutions" else tower.store(path, precision)


def test_half_precision_storage_is_what_it_says(tmp_path):
    kinds = [store(conv_net(), tmp_path / f"{p}.onnx", p) for p in PRECISIONS]
    found = [{t.data_type for t in onnx.load(path).graph.initializer if len(t.dims) > 1} for path in kinds]
    assert found == [{TensorProto.FLOAT}, {TensorProto.FLOAT, TensorProto.FLOAT16}]
    wide = load_wide(kinds[1])
    assert "Cast" not in {node.op_type for node in wide.graph.node}
    assert loss(run(wide.SerializeToString(), tiles(2)), run(kinds[0], tiles(2))) < 1e-3


def test_convolutions_in_8_bits(convolutions, tmp_path):
    out, calls = tmp_path / "int8.onnx", tiles(8)
    metrics = quantize_static(convolutions, calls, MINMAX, out, None)
    assert metrics["quantized layers"] == len(CONVOLUTIONS) + 1 and metrics["kept layers"] == 0
    assert metrics["bytes"] == out.stat().st_size
    weights = int8_weights(out)
    assert sorted(w.shape for w in weights.values()) == sorted([*CONVOLUTIONS.values(), (5, 64)])
    assert all(w.dtype == np.int8 and 100 < np.abs(w.astype(int)).max() <= 128 for w in weights.values())
    scales = {t.name: t for t in onnx.load(out).graph.initializer if t.name.endswith(".w_f32_scale")}
    scales |= {t.name: t for t in onnx.load(out).graph.initializer if t.name.endswith(".w_scale")}
    assert sorted(t.dims[0] for t in scales.values()) == sorted([5, *(shape[0] for shape in CONVOLUTIONS.values())])
    assert not {"Conv", "Clip", "Gemm"} & set(optimized(out, tmp_path))
    assert optimized(out, tmp_path)["QLinearConv"] == len(CONVOLUTIONS)
    assert loss(run(out, tiles(8, seed=1)), run(convolutions, tiles(8, seed=1))) < 0.05


def test_nothing_is_widened_between_convolutions(tmp_path):
    out = tmp_path / "int8.onnx"
    quantize_static(store(conv_net(), tmp_path / "net.onnx", "f32"), tiles(2), MINMAX, out, None)
    found = optimized(out, tmp_path)
    assert found["QuantizeLinear"] == 2 and found["QLinearAdd"] == 1  # tiles, and the mean that the last layer reads
    assert found["DequantizeLinear"] == 2  # the map, as an output and for its mean


def test_attention_stays_and_its_layers_are_in_8_bits(towers, tmp_path):
    out, calls = tmp_path / "int8.onnx", tiles(8)
    metrics = quantize_static(towers, calls, Int8(ranges="minmax", smooth=0.5), out, None)
    assert metrics["quantized layers"] == 1 + 2 * 6 and metrics["smoothed inputs"] >= 2 * 2
    graph = onnx.load(out).graph
    assert len(int8_weights(out)) == 1 + 2 * 6
    made = {name: node for node in graph.node for name in node.output}
    of_two = [n for n in graph.node if n.op_type == "MatMul" and not made[n.input[1]].name.endswith("DequantizeLinear")]
    assert len(of_two) == 2 * 2
    assert all(made[name].op_type != "DequantizeLinear" for node in of_two for name in node.input)
    found = optimized(out, tmp_path)
    assert found["MatMulIntegerToFloat"] == 2 * 6 and found["MatMul"] + found.get("FusedMatMul", 0) == 2 * 2
    assert loss(run(out, tiles(8, seed=1)), run(towers, tiles(8, seed=1))) < 0.03


@pytest.mark.parametrize("way", ["static", "dynamic"])
def test_kept_layers_stay(way, tower, tmp_path):
    path, out = tower.store(tmp_path / "tower.onnx", "f32"), tmp_path / "int8.onnx"
    settings = Int8(ranges="minmax", smooth=0, keep=("encoder.layers.1", "encoder.layers.0.mlp.fc1.weight"))
    if way == "static":
        metrics = quantize_static(path, tiles(2), settings, out, None)
    else:
        metrics = quantize_dynamic(path, settings, out)
    assert metrics["kept layers"] == 7
    before, after = ({t.name: array_of(t) for t in onnx.load(p).graph.initializer} for p in (path, out))
    kept = [n for n in before if n.startswith(settings.keep) and before[n].ndim > 1]
    assert len(kept) == 7 and all(np.array_equal(before[name], after[name]) for name in kept)
    assert not any(name.startswith(settings.keep) for name in int8_weights(out))


def test_nothing_in_8_bits_where_everything_is_kept(convolutions, tmp_path):
    out, tensorrt = tmp_path / "q.onnx", tmp_path / "q.tensorrt.onnx"
    metrics = quantize_static(convolutions, tiles(2), Int8(keep=("",)), out, tensorrt)
    assert metrics["quantized layers"] == 0 and metrics["kept layers"] == len(CONVOLUTIONS) + 1
    assert not {"QuantizeLinear", "DequantizeLinear"} & set(optimized(out, tmp_path))
    assert loss(run(out, tiles(2)), run(convolutions, tiles(2))) < 1e-5
    assert loss(run(tensorrt, tiles(2)), run(convolutions, tiles(2))) < 5e-3


def test_weights_of_three_axes_and_kept_products_are_no_layers():
    products = [helper.make_node("MatMul", ["x", w], [f"{w}y"], name=w) for w in ("matrix", "stack")]
    made = model(
        products,
        {"matrix": np.ones((4, 4), np.float32), "stack": np.ones((2, 4, 4), np.float32)},
        {"x": [2, 3, 4]},
        {"matrixy": [2, 3, 4], "stacky": [2, 3, 4]},
    )
    assert [node.name for node in choose_nodes(made, ()).layers] == ["matrix"]
    assert choose_nodes(made, ("mat",)).kept == 1


def test_the_last_convolution_stays_in_floating_point(tmp_path):
    made = opened(chain(relu=True), tmp_path / "chain.onnx")
    chosen = choose_nodes(made, ())
    assert [node.name for node in chosen.layers] == ["a", "b", "c"] and chosen.kept == 0
    assert [node.name for node in choose_nodes(made, ("a",)).layers] == ["b", "c"]
    metrics = quantize_static(tmp_path / "chain.onnx", tiles(2), MINMAX, tmp_path / "q.onnx", None)
    assert metrics["quantized layers"] == 3
    assert optimized(tmp_path / "q.onnx", tmp_path)["Conv"] == 1
    net = opened(conv_net(), tmp_path / "net.onnx")
    assert "last" in [node.name for node in choose_nodes(net, ()).layers]  # scores are computed from it


def found_range(values, settings):
    """Of x, given in several calls."""
    made = model([helper.make_node("Relu", ["x"], ["y"], name="relu")], {}, {"x": ["n"]}, {"y": ["n"]})
    found = find_ranges(made, ("x", "y"), [{"x": v.astype(np.float32)} for v in values], settings)
    return {name: tuple(float(np.ravel(v)[0]) for v in data.range_value) for name, data in found.items()}


def test_ranges_of_known_numbers():
    narrow, wide = np.linspace(-1, 1, 20001), np.linspace(-2, 2, 20001)
    assert found_range([narrow, wide, narrow], MINMAX) == {"x": (-2, 2), "y": (0, 2)}
    # 5 % lie beyond on either side: half of the numbers are within [-1, 1], the others even over [-2, 2].
    low, high = found_range([narrow, wide], Int8(percentile=90))["x"]
    assert (low, high) == pytest.approx((-1.6, 1.6), abs=0.01)
    assert found_range([narrow], Int8(percentile=100))["x"] == pytest.approx((-1, 1), abs=1e-3)
    # One number far from the rest: of 2048 bins from -400 to 400 at least 128 are kept, and not many more than those.
    outlier = np.append(np.random.default_rng(0).normal(size=100_000), 400)
    low, high = found_range([outlier], Int8(ranges="entropy"))["x"]
    assert 25 <= high < 60 and low == pytest.approx(outlier.min())
    assert found_range([outlier], MINMAX)["x"][1] == 400


def chain(relu: bool, seed: int = 0):
    """Three convolutions, the middle one depthwise, whose channels differ a hundredfold; and a last one."""
    rng = np.random.default_rng(seed)
    sizes = {"a": (16, 3, 3, 3), "b": (16, 1, 3, 3), "c": (8, 16, 1, 1), "d": (1, 8, 1, 1)}
    tensors = {f"{n}.w": rng.normal(scale=0.3, size=size).astype(np.float32) for n, size in sizes.items()}
    tensors |= {f"{n}.b": rng.normal(size=size[0]).astype(np.float32) for n, size in sizes.items()}
    tensors["a.w"] *= np.logspace(-1, 1, 16, dtype=np.float32)[:, None, None, None]
    tensors |= {"zero": np.float32(0), "six": np.float32(6)}
    nodes = [helper.make_node("Conv", ["tiles", "a.w", "a.b"], ["ay"], name="a")]
    for name, given, group in (("b", "ay", 16), ("c", "by", 1)):
        bounds = [] if relu else ["zero", "six"]
        nodes.append(helper.make_node("Relu" if relu else "Clip", [given, *bounds], [f"{name}x"], name=f"{name}x"))
        nodes.append(
            helper.make_node("Conv", [f"{name}x", f"{name}.w", f"{name}.b"], [f"{name}y"], name=name, group=group)
        )
    nodes.append(helper.make_node("Conv", ["cy", "d.w", "d.b"], ["dy"], name="d"))
    return model(nodes, tensors, {"tiles": [1, 3, "h", "w"]}, {"dy": [1, 1, "h1", "w1"]})


def opened(made, path):
    onnx.save(made, path)
    return load_wide(path)


def test_equalisation_changes_ranges_and_no_result(tmp_path):
    made, calls = opened(chain(relu=True), tmp_path / "chain.onnx"), tiles(4)

    def channels(name):
        return np.max([np.abs(values[name]).max(axis=(0, 2, 3)) for values in each_run(made, [name], calls)], axis=0)

    before, most = run(made.SerializeToString(), calls), channels("bx")
    assert equalise(made, choose_nodes(made, ()).layers, calls) == 2
    assert loss(run(made.SerializeToString(), calls), before) < 1e-5
    assert most.max() > 20 * most[most > 0].min()
    live = channels("bx")[most > 0]
    assert len(live) > 10 and live.max() == pytest.approx(live.min(), rel=1e-3)
    bounded = opened(chain(relu=False), tmp_path / "bounded.onnx")
    assert equalise(bounded, choose_nodes(bounded, ()).layers, calls) == 0


def outlying(seed: int = 0):
    """A norm whose channel 3 is 50 times the rest, before two products; and one such product behind a GELU."""
    rng = np.random.default_rng(seed)
    tensors = {n: rng.normal(scale=0.2, size=(32, 32)).astype(np.float32) for n in ("q", "k", "up")}
    tensors |= {"scale": np.where(np.arange(32) == 3, 50, 1).astype(np.float32), "shift": np.zeros(32, np.float32)}
    tensors["up"] = tensors["up"].T.copy()
    tensors["q"][3] /= 50
    tensors["k"][:, 5] *= 50
    nodes = [
        helper.make_node("LayerNormalization", ["x", "scale", "shift"], ["h"], name="norm"),
        helper.make_node("MatMul", ["h", "q"], ["qy"], name="q"),
        helper.make_node("MatMul", ["h", "k"], ["ky"], name="k"),
        helper.make_node("Gelu", ["ky"], ["g"], name="gelu"),
        helper.make_node("Gemm", ["g", "up"], ["upy"], name="up", transB=1),
    ]
    return model(nodes, tensors, {"x": ["n", 32]}, {"qy": ["n", 32], "upy": ["n", 32]})


def rows(count, seed=0):
    return [{"x": np.random.default_rng(seed + k).normal(size=(64, 32)).astype(np.float32)} for k in range(count)]


def test_smoothing_changes_no_result_and_less_is_lost(tmp_path):
    made = opened(outlying(), tmp_path / "g.onnx")
    before = run(made.SerializeToString(), rows(2))
    assert smooth(made, choose_nodes(made, ()).layers, rows(4), 0.5) == 2
    assert loss(run(made.SerializeToString(), rows(2)), before) < 1e-5
    assert [node.op_type for node in made.graph.node].count("Mul") == 1  # GELU has no scale to fold into
    lost = []
    for share in (0.0, 0.5):
        quantize_static(tmp_path / "g.onnx", rows(8), Int8(ranges="minmax", smooth=share), tmp_path / "q.onnx", None)
        lost.append(loss(run(tmp_path / "q.onnx", rows(4, seed=50)), run(tmp_path / "g.onnx", rows(4, seed=50))))
    assert lost[1] < 0.5 * lost[0] and lost[1] < 0.05


def smooth_tiles(count: int, seed: int = 0):
    """Bright, and neighbours alike, as in an image."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(0.5, 2, size=(count, 3, 8, 8)).astype(np.float32)
    fine = rng.normal(scale=0.05, size=(count, 3, SIDE_PX, SIDE_PX)).astype(np.float32)
    return [{"tiles": tile[None]} for tile in np.kron(coarse, np.ones((4, 4), np.float32)) + fine]


def test_rounding_keeps_means_and_is_nearer_than_the_nearest(tmp_path):
    made, calls = opened(chain(relu=True), tmp_path / "chain.onnx"), smooth_tiles(8)
    nearest, rounded = (opened(chain(relu=True), tmp_path / "chain.onnx") for _ in range(2))
    scales = round_convolutions(rounded, choose_nodes(rounded, ()).layers, calls)
    for name, scales_O in scales.items():
        numbers = array_of(constants(rounded)[name]) / scales_O[:, None, None, None]
        assert np.abs(numbers - numbers.round()).max() < 1e-3 and np.abs(numbers).max() < 128.5
        weight = constants(nearest)[name]
        steps = (array_of(weight) / scales_O[:, None, None, None]).round()
        weight.CopyFrom(onnx.numpy_helper.from_array(steps * scales_O[:, None, None, None], name))
    new = smooth_tiles(4, seed=9)
    wanted, by_nearest, by_us = (run(m.SerializeToString(), new) for m in (made, nearest, rounded))
    assert loss(by_us, wanted) < 0.7 * loss(by_nearest, wanted)
    shift = np.abs((by_us["dy"] - wanted["dy"]).mean(axis=(0, 2, 3))).max()
    assert shift < 0.3 * np.abs((by_nearest["dy"] - wanted["dy"]).mean(axis=(0, 2, 3))).max()


def test_shared_weights_and_biases_are_not_shifted_twice(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {
        "w": rng.normal(size=(3, 3, 3, 3)).astype(np.float32),
        "v": rng.normal(size=(3, 3, 3, 3)).astype(np.float32),
    }
    tensors |= {"v2": tensors["v"], "bias": np.zeros(3, np.float32)}
    nodes = [
        helper.make_node("Conv", [given, weight, "bias"], [out], name=out, pads=[pad] * 4)
        for given, weight, out, pad in (
            ("tiles", "w", "a", 1),
            ("a", "w", "b", 1),
            ("b", "v", "c", 1),
            ("c", "v2", "d", 1),
        )
    ]
    made = opened(model(nodes, tensors, {"tiles": [1, 3, "h", "w"]}, {"d": [1, 3, "h", "w"]}), tmp_path / "g.onnx")
    scales = round_convolutions(made, choose_nodes(made, ()).layers, tiles(2))
    assert list(scales) == ["v", "v2"]
    assert np.array_equal(array_of(constants(made)["w"]), tensors["w"])
    assert [len(readers(made)[name]) for name in ("bias", "c_shifted_bias")] == [2, 1]


def test_dynamic_takes_products_with_constants_alone(towers, tmp_path):
    out = tmp_path / "int8.onnx"
    metrics = quantize_dynamic(towers, Int8(), out)
    graph = onnx.load(out).graph
    kinds = [node.op_type for node in graph.node]
    assert metrics["quantized layers"] == 12 == kinds.count("MatMulInteger") == len(int8_weights(out))
    assert kinds.count("Conv") == 1 and "ConvInteger" not in kinds and kinds.count("MatMul") == 4
    assert loss(run(out, tiles(4)), run(towers, tiles(4))) < 0.03


def test_dynamic_leaves_a_graph_without_products(tmp_path):
    path, out = tmp_path / "chain.onnx", tmp_path / "int8.onnx"
    onnx.save(chain(relu=True), path)
    assert quantize_dynamic(path, Int8(), out)["quantized layers"] == 0
    assert loss(run(out, tiles(2)), run(path, tiles(2))) == 0


def both(graph, calls, folder, settings=MINMAX):
    out, tensorrt = folder / "net.onnx", folder / "net.tensorrt.onnx"
    quantize_static(graph, calls, settings, out, tensorrt)
    return out, tensorrt


def places(path):
    """Where int8 weights lie: (file, offset, length) by name."""
    tensors = onnx.load(path, load_external_data=False).graph.initializer
    found = {t.name: t for t in tensors if t.data_type == TensorProto.INT8 and len(t.dims) > 1}
    return {n: tuple(entry.value for entry in t.external_data) for n, t in found.items() if t.external_data}


def test_two_flavours_share_their_weights(net, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    out, tensorrt = both(net, tiles(8), folder)
    assert {path.name for path in folder.iterdir()} == {"net.onnx", "net.tensorrt.onnx", "net.int8.data"}
    assert places(out) == places(tensorrt) and places(out)
    assert {place[0] for place in places(out).values()} == {"net.int8.data"}
    ours, theirs = int8_weights(out), int8_weights(tensorrt)
    assert ours.keys() == theirs.keys() and all(np.array_equal(ours[n], theirs[n]) for n in ours)
    for path in (out, tensorrt):
        onnx.checker.check_model(str(path), full_check=True)
    new = tiles(8, seed=1)
    wanted = run(net, new)
    by_cpu, by_gpu = run(out, new), run(tensorrt, new, LEVEL.ORT_DISABLE_ALL)
    assert loss(by_gpu, wanted) < 0.06 and loss(by_gpu, by_cpu) < 0.06


def test_tensorrt_flavour_is_symmetric_and_strongly_typed(convolutions, tmp_path):
    _, tensorrt = both(convolutions, tiles(2), tmp_path)
    graph = onnx.load(tensorrt)
    assert next(o.version for o in graph.opset_import if o.domain in ("", "ai.onnx")) <= OPSET
    assert {o.domain for o in graph.opset_import if o.domain not in ("", "ai.onnx")} <= {"ai.onnx.ml", "com.microsoft"}
    assert {node.domain for node in graph.graph.node} == {""}
    stored = {t.name: array_of(t) for t in graph.graph.initializer}
    made = {name: node for node in graph.graph.node for name in node.output}
    for node in graph.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            zero = stored[node.input[2]]
            assert zero.dtype == np.int8 and not zero.any()
        if node.op_type in ("Conv", "Gemm"):
            read = [made[name].op_type if name in made else "initializer" for name in node.input]
            assert read[:2] == ["DequantizeLinear"] * 2 and "DequantizeLinear" not in read[2:]
    assert not {t.data_type for t in graph.graph.initializer} & {TensorProto.UINT8, TensorProto.INT32}
    known = onnx.shape_inference.infer_shapes(graph, strict_mode=True)
    kinds = {v.name: v.type.tensor_type.elem_type for v in known.graph.value_info}
    convs = [node.output[0] for node in graph.graph.node if node.op_type == "Conv"]
    assert {kinds.get(name, TensorProto.FLOAT) for name in convs} <= {TensorProto.FLOAT16, TensorProto.FLOAT}
    assert [kinds[name] for name in convs if name in kinds].count(TensorProto.FLOAT16) >= len(convs) - 1


def test_half_precision_keeps_norms_and_outputs_wide(towers, tmp_path):
    out = tmp_path / "half.onnx"
    half_precision(towers, out)
    onnx.checker.check_model(str(out), full_check=True)
    graph = onnx.shape_inference.infer_shapes(onnx.load(out), strict_mode=True).graph
    kinds = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.input, *graph.output)}
    by_kind = {op: {kinds[n.output[0]] for n in graph.node if n.op_type == op} for op in ("MatMul", "Softmax")}
    assert by_kind == {"MatMul": {TensorProto.FLOAT16}, "Softmax": {TensorProto.FLOAT}}
    assert {kinds[n.output[0]] for n in graph.node if n.op_type == "LayerNormalization"} == {TensorProto.FLOAT}
    found = run(out, tiles(2))
    assert found["features"].dtype == np.float32
    assert loss(found, run(towers, tiles(2))) < 5e-3


def test_the_same_bytes_twice(towers, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        both(towers, tiles(4), tmp_path / name, Int8())
        quantize_dynamic(towers, Int8(), tmp_path / name / "dynamic.onnx")
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("a", "b")]
    assert files[0] == files[1] and len(files[0]) == 4


def test_kind_of_a_graph(convolutions, towers, tmp_path):
    assert int8_kind(convolutions) == "int8"
    assert int8_kind(towers) == "int8-dynamic"
    table = model(
        [helper.make_node("Gather", ["table", "x"], ["y"])],
        {"table": np.ones((9, 4), np.float32)},
        {"x": ["n"]},
        {"y": ["n", 4]},
    )
    onnx.save(table, tmp_path / "table.onnx")
    assert int8_kind(tmp_path / "table.onnx") == "f16"


@pytest.fixture
def images(tmp_path):
    """Six of four tiles each, too dark for the fake detector to find anything."""
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for index in range(6):
        Image.fromarray(rng.integers(0, 100, (160, 160, 3), np.uint8)).save(tmp_path / "images" / f"{index}.png")
    return CalibrationImages(images=tmp_path / "images", count=6)


def test_patches_make_no_convolutional_graph(tmp_path):
    tensors = {"patch": np.ones((8, 3, 16, 16), np.float32), "w": np.ones((8, 8), np.float32)}
    nodes = [
        helper.make_node("Conv", ["tiles", "patch"], ["a"], name="patches", strides=[16, 16]),
        helper.make_node("Flatten", ["a"], ["b"], name="flat"),
        helper.make_node("MatMul", ["b", "w"], ["y"], name="product"),
    ]
    onnx.save(model(nodes, tensors, {"tiles": ["n", 3, 16, 16]}, {"y": ["n", 8]}), tmp_path / "patches.onnx")
    assert int8_kind(tmp_path / "patches.onnx") == "int8-dynamic"


def recorded(folder, name, images, **how):
    bundle = load_bundle(fakes.write_bundle(folder / "bundle"), allow_unsigned=True)
    samples, calibration = record(bundle, images, folder / name, lambda *_: None, fakes.FakeEngine(), **how)
    return (
        samples,
        calibration,
        {str(p.relative_to(folder / name)): p.read_bytes() for p in sorted((folder / name).rglob("*.npz"))},
    )


def test_calibration_is_what_graphs_were_fed_and_the_same_twice(images, tmp_path):
    samples, calibration, first = recorded(tmp_path, "a", images)
    _, again, second = recorded(tmp_path, "b", images)
    assert first == second and calibration == again
    assert [Path(name).name for name in calibration.images] == [f"{index}.png" for index in range(6)]
    assert set(samples.of("encoder")[0]) == {"pixels"} and set(samples.of("change")[0]) == {"earlier", "later"}
    encoder = samples.of("encoder")
    assert all(call["pixels"].dtype == np.float32 and call["pixels"].shape == (1, 5, 128, 128) for call in encoder)
    heads = [call["first"] for call in samples.of("detect")]
    assert any(np.array_equal(heads[0], call["pixels"]) for call in encoder)  # the fake encoder gives the tile itself


def test_calibration_keeps_to_its_disk(images, tmp_path):
    samples, _, everything = recorded(tmp_path, "all", images)
    size = sum(len(data) for name, data in everything.items() if name.startswith("encoder"))
    bound = size // 3
    few, _, kept = recorded(tmp_path, "few", images, most_bytes=bound)
    assert 0 < sum(len(data) for name, data in kept.items() if name.startswith("encoder")) <= bound
    assert 0 < len(few.of("encoder")) < len(samples.of("encoder"))
    assert kept.items() <= everything.items()


def test_likeness_of_images():
    session = Session(load_bundle(), Limits(1 << 32))
    sources = sorted(list_inputs([str(SCENES)]), key=lambda source: source.name)
    photos, flights = ([s for s in sources if s.name.endswith(end)] for end in ("webp", "tif"))
    assert likeness(session, photos, photos) == 0
    assert likeness(session, photos, flights) > 0.1
    assert resolution_warning(session, photos) is None


@pytest.mark.skipif(not SLOW, reason="EDGE_RSVLM_SLOW=1 quantizes the packaged encoder")
def test_packaged_encoder(tmp_path):
    bundle = load_bundle()
    images = CalibrationImages(images=SCENES, count=9)
    samples, _ = record(bundle, images, tmp_path / "samples", lambda *_: None)
    source, out = bundle.path(bundle.manifest.graphs["encoder"].file), tmp_path / "encoder.onnx"
    calls = samples.of("encoder")
    metrics = quantize_static(source, calls, Int8(), out, None)
    assert metrics["quantized layers"] == 51
    assert out.stat().st_size < 0.6 * source.stat().st_size
    assert "Conv" not in optimized(out, tmp_path)
    alike = [call for call in calls if call["tiles"].shape == calls[0]["tiles"].shape][:4]
    before, after = run(source, alike), run(out, alike)
    assert loss(after, before) < 0.15, json.dumps({n: loss({n: after[n]}, {n: before[n]}) for n in before})
