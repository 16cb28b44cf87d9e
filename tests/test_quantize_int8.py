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

from onnx import TensorProto, helper  # noqa: E402

import edge_rsvlm  # noqa: E402
from edge_rsvlm.engines.onnxruntime import ort  # noqa: E402
from edge_rsvlm.export.quantize.calibration import record  # noqa: E402
from edge_rsvlm.export.quantize.choose import int8_kind  # noqa: E402
from edge_rsvlm.export.quantize.chosen import choose_nodes  # noqa: E402
from edge_rsvlm.export.quantize.dynamic import quantize_dynamic  # noqa: E402
from edge_rsvlm.export.quantize.loaded import array_of, load_wide  # noqa: E402
from edge_rsvlm.export.quantize.norms import fold_norms  # noqa: E402
from edge_rsvlm.export.quantize.padding import fold_padding  # noqa: E402
from edge_rsvlm.export.quantize.settings import CalibrationImages, Int8  # noqa: E402
from edge_rsvlm.export.quantize.static import quantize_static  # noqa: E402
from edge_rsvlm.export.quantize.typed import half_precision  # noqa: E402
from tests.int8_graphs import (  # noqa: E402  # noqa: E402
    CONVOLUTIONS,
    LEVEL,
    OPSET,
    TracedTower,
    chain,
    conv_net,
    int8_weights,
    loss,
    model,
    opened,
    optimized,
    run,
    store,
    tiles,
)

SLOW = os.environ.get("EDGE_RSVLM_SLOW") == "1"
SCENES = Path(edge_rsvlm.__file__).parent / "scenes"
PRECISIONS = ("f32", "f16")
MINMAX = Int8(ranges="minmax")


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


def test_patches_make_no_convolutional_graph(tmp_path):
    tensors = {"patch": np.ones((8, 3, 16, 16), np.float32), "w": np.ones((8, 8), np.float32)}
    nodes = [
        helper.make_node("Conv", ["tiles", "patch"], ["a"], name="patches", strides=[16, 16]),
        helper.make_node("Flatten", ["a"], ["b"], name="flat"),
        helper.make_node("MatMul", ["b", "w"], ["y"], name="product"),
    ]
    onnx.save(model(nodes, tensors, {"tiles": ["n", 3, 16, 16]}, {"y": ["n", 8]}), tmp_path / "patches.onnx")
    assert int8_kind(tmp_path / "patches.onnx") == "int8-dynamic"


@pytest.mark.parametrize(
    ("pads", "more", "folded"),
    [
        ([0, 0, 0, 0, 0, 0, 1, 1], {}, True),
        ([0, 0, 2, 1, 0, 0, 0, 3], {}, True),
        ([0, 0, 0, 0, 0, 1, 1, 1], {}, False),
        ([0, 0, -1, 0, 0, 0, 0, 0], {}, False),
        ([0, 0, 1, 1, 0, 0, 1, 1], {"mode": "reflect"}, False),
        ([0, 0, 0, 0, 0, 0, 1, 1], {"value": 1.0}, False),
        ([0, 0, 0, 0, 0, 0, 1, 1], {"value": 0.0}, True),
    ],
)
def test_convolutions_pad_with_zeros_themselves(pads, more, folded):
    channels = 3 + pads[1] + pads[5]
    weights = np.random.default_rng(0).normal(size=(4, channels, 3, 3)).astype(np.float32)
    tensors = {"w": weights, "pads": np.array(pads), "value": np.float32(more.get("value", 0))}
    given = ["tiles", "pads", *(["value"] if "value" in more else [])]
    nodes = [
        helper.make_node("Pad", given, ["wide"], name="pad", mode=more.get("mode", "constant")),
        helper.make_node("Conv", ["wide", "w"], ["y"], name="conv", strides=[2, 2], pads=[0, 1, 0, 0]),
    ]
    before = model(nodes, tensors, {"tiles": [1, 3, 12, 10]}, {"y": [1, 4, None, None]})
    after = onnx.ModelProto()
    after.CopyFrom(before)
    assert fold_padding(after) == folded == ("Pad" not in {node.op_type for node in after.graph.node})
    feed = {"tiles": np.random.default_rng(1).normal(size=(1, 3, 12, 10)).astype(np.float32)}
    (wanted,), (found,) = (ort.InferenceSession(m.SerializeToString()).run(None, feed) for m in (before, after))
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(
    ("biased", "extra", "folded"),
    [
        (False, [], 1),
        (True, [], 1),
        (True, [("Relu", ["raw"], "z")], 0),
        (False, [("Conv", ["tiles", "w"], "z")], 0),
    ],
)
def test_convolutions_norm_their_results_themselves(biased, extra, folded):
    """Unless something else reads the result, or another convolution the weight."""
    rng = np.random.default_rng(0)
    tensors = {name: rng.uniform(0.5, 2, 4).astype(np.float32) for name in ("gain", "shift", "mean", "variance", "b")}
    tensors["w"] = rng.normal(size=(4, 3, 3, 3)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["tiles", "w", *(["b"] if biased else [])], ["raw"], name="conv"),
        helper.make_node("BatchNormalization", ["raw", "gain", "shift", "mean", "variance"], ["y"], epsilon=1e-2),
        *(helper.make_node(kind, given, [made]) for kind, given, made in extra),
    ]
    outputs = {name: [1, 4, None, None] for name in ("y", *(made for *_, made in extra))}
    before = model(nodes, tensors, {"tiles": [1, 3, 12, 10]}, outputs)
    after = onnx.ModelProto()
    after.CopyFrom(before)
    assert fold_norms(after) == folded == ("BatchNormalization" not in {node.op_type for node in after.graph.node})
    feed = {"tiles": rng.normal(size=(1, 3, 12, 10)).astype(np.float32)}
    results = [ort.InferenceSession(m.SerializeToString()).run(None, feed) for m in (before, after)]
    for wanted, found in zip(*results, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_weights_that_steps_share_are_read(tmp_path):
    """By hard links, which onnx's own loader takes for an attack."""
    weights = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    nodes = [helper.make_node("MatMul", ["tiles", "w"], ["y"], name="product")]
    made = model(nodes, {"w": weights}, {"tiles": ["n", 64]}, {"y": ["n", 64]})
    file = tmp_path / "g.onnx"
    onnx.save(made, file, save_as_external_data=True, location="g.onnx.data", size_threshold=0)
    os.link(tmp_path / "g.onnx.data", tmp_path / "elsewhere.data")
    (stored,) = load_wide(file).graph.initializer
    np.testing.assert_array_equal(array_of(stored), weights)


@pytest.mark.skipif(not SLOW, reason="EDGE_RSVLM_SLOW=1 quantizes the packaged encoder")
def test_packaged_encoder(trained, tmp_path):
    bundle = trained
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
