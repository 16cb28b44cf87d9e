"""Graphs for TensorRT: what it would not take, sizes, and that its own parser and compiler take what is exported."""

from __future__ import annotations

import numpy as np
import pytest

from edge_rsvlm.bundle import load_bundle
from edge_rsvlm.config.inputs import InputSpec
from edge_rsvlm.config.manifest import ShapeRange
from edge_rsvlm.errors import BundleError, InputError
from tests.fakes import INPUT

onnx = pytest.importorskip("onnx")
from edge_rsvlm.export.tensorrt import report  # noqa: E402
from edge_rsvlm.export.tensorrt.dims import size_of  # noqa: E402
from edge_rsvlm.export.tensorrt.report import unsupported  # noqa: E402
from edge_rsvlm.export.tensorrt.shapes import prepared_shapes, shape_ranges  # noqa: E402

helper, FLOAT = onnx.helper, onnx.TensorProto.FLOAT
BATCH = 8


@pytest.fixture(scope="module")
def bundle():
    return load_bundle()


@pytest.fixture(scope="module")
def half(trained, tmp_path_factory):
    """Graphs of the packaged model in half precision, by name."""
    from edge_rsvlm.export.quantize.typed import half_precision

    folder = tmp_path_factory.mktemp("half")
    files = {name: folder / f"{name}.onnx" for name in trained.manifest.graphs}
    for name, graph in trained.manifest.graphs.items():
        half_precision(trained.path(graph.file), files[name])
    return files


@pytest.fixture
def compiled(needs):
    needs("tensorrt_rtx")
    from edge_rsvlm.export.tensorrt.compiled import compiled_bytes

    return compiled_bytes


@pytest.fixture
def without_tensorrt(monkeypatch):
    """Only the rules speak."""
    monkeypatch.setattr(report, "_parsed", lambda graph: [])


def save(path, nodes, initializers=(), opset=20, domains=()):
    ends = [helper.make_tensor_value_info(name, FLOAT, [None, 4]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], list(initializers))
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


def quantized(path, zero_point, dtype):
    values = [helper.make_tensor("s", FLOAT, [], [0.1]), helper.make_tensor("z", dtype, [], [zero_point])]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], "down"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], "up"),
    ]
    return save(path, nodes, values)


@pytest.mark.parametrize(
    ("zero_point", "dtype", "reason"),
    [(0, "INT8", None), (3, "INT8", "zero point is not zero"), (128, "UINT8", "unsigned"), (0, "UINT8", "unsigned")],
)
def test_zero_points(zero_point, dtype, reason, tmp_path, without_tensorrt):
    found = unsupported(quantized(tmp_path / "g.onnx", zero_point, getattr(onnx.TensorProto, dtype)))
    assert [problem.node for problem in found] == ([] if reason is None else ["down", "up"])
    assert all(reason in problem.reason for problem in found)


def test_zero_points_in_constants(tmp_path, without_tensorrt):
    zero = helper.make_node("Constant", [], ["z"], value=helper.make_tensor("z", onnx.TensorProto.INT8, [], [5]))
    node = helper.make_node("QuantizeLinear", ["x", "s", "z"], ["y"], "down")
    path = save(tmp_path / "g.onnx", [zero, node], [helper.make_tensor("s", FLOAT, [], [0.1])])
    assert [problem.node for problem in unsupported(path)] == ["down"]


def test_operators_that_are_onnxruntimes_own(tmp_path, without_tensorrt):
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"], "dynamic"),
        helper.make_node("MatMulNBits", ["x", "b", "c"], ["y"], "bits", domain="com.microsoft", K=4, N=4),
        helper.make_node("FastGelu", ["x"], ["w"], "gelu", domain="com.microsoft"),
    ]
    found = {
        problem.node: problem for problem in unsupported(save(tmp_path / "g.onnx", nodes, domains=["com.microsoft"]))
    }
    assert found.keys() == {"dynamic", "bits", "gelu"}
    assert "INT4 DequantizeLinear" in str(found["bits"]) and "com.microsoft" in str(found["gelu"])


@pytest.mark.parametrize(
    ("opset", "int4", "taken"), [(20, False, True), (21, False, False), (21, True, True), (23, True, False)]
)
def test_opsets(opset, int4, taken, tmp_path, without_tensorrt):
    weights = [helper.make_tensor("w", onnx.TensorProto.INT4, [4], [1, 2, 3, 4])] if int4 else []
    path = save(tmp_path / "g.onnx", [helper.make_node("Identity", ["x"], ["y"])], weights, opset)
    assert (unsupported(path) == []) == taken


def test_the_parser_names_what_no_rule_knows(needs, tmp_path):
    needs("tensorrt_rtx")
    nodes = [
        helper.make_node("Relu", ["x"], ["r"], "fine"),
        helper.make_node("Unique", ["r"], ["y"], "unique", sorted=1),
    ]
    assert [(p.node, p.operator) for p in unsupported(save(tmp_path / "g.onnx", nodes))] == [("unique", "Unique")]


def test_sizes_follow_the_tasks(bundle):
    def spans(name):
        return shape_ranges(bundle.manifest, name, bundle.path(bundle.manifest.graphs[name].file))

    tiles = spans("encoder")["tiles"]
    assert (tiles.least, tiles.most) == ((1, 5, 64, 64), (BATCH, 5, 512, 512))
    heads = spans("detect")
    assert {name: span.most[2:] for name, span in heads.items()} == {
        "c2": (128, 128), "c3": (64, 64), "c4": (32, 32), "c5": (16, 16)
    }  # fmt: skip
    assert spans("change")["before_c1"].least == (1, 16, 32, 32)
    caption = bundle.manifest.tasks.caption
    decoder = spans(caption.decoder.graph)
    past = decoder["past_key_values.0.key"]
    prompt = decoder["inputs_embeds"].most[1]
    assert past.least == (1, 4, 0, 64) and past.most == (BATCH * caption.beams, 4, prompt + caption.max_tokens, 64)
    assert decoder["inputs_embeds"].usual[1] == 1


def test_every_probe_is_within_its_sizes(bundle):
    """What the golden probe feeds is what tasks feed."""
    for case in bundle.manifest.probe:
        spans = shape_ranges(bundle.manifest, case.graph, bundle.path(bundle.manifest.graphs[case.graph].file))
        with np.load(bundle.path(case.file)) as golden:
            for name, span in spans.items():
                shape = golden[f"in.{name}"].shape
                assert all(low <= size <= high for low, size, high in zip(span.least, shape, span.most, strict=True))


def test_images_of_any_size_have_a_range():
    steps = [{"op": "smart_resize", "multiple": 28, "min_pixels": 3136, "max_pixels": 50176, "filter": "bicubic"}]
    shapes = prepared_shapes(InputSpec.model_validate({**INPUT, "tile_px": 224, "whole_px": 448, "prepare": steps}))
    assert all(s.height % 28 == s.width % 28 == 0 and s.height * s.width <= 50176 for s in shapes)
    assert {s.height < s.width for s in shapes} == {True, False}


def test_sizes_are_arithmetic_and_nothing_else():
    assert size_of("8*(s0//16) + 1", {"s0": 40}) == 17
    for text in ("s1", "__import__('os')", "s0 ** 2", "s0["):
        with pytest.raises(InputError, match="cannot be told"):
            size_of(text, {"s0": 2})


def test_packaged_graphs_compile_in_half_precision(compiled, half, trained):
    for name, graph in trained.manifest.graphs.items():
        assert unsupported(half[name]) == []
        spans = shape_ranges(trained.manifest, name, trained.path(graph.file))
        assert compiled(half[name], spans) > 100_000


def test_packaged_graphs_compile_in_8_bits(compiled, bundle):
    made = {name: graph.tensorrt for name, graph in bundle.manifest.graphs.items() if graph.tensorrt}
    assert made.keys() >= {"encoder", "detect", "change"}
    for graph in made.values():
        assert unsupported(bundle.path(graph.file)) == []
        assert compiled(bundle.path(graph.file), graph.shapes) > 100_000


def test_sizes_that_do_not_fit_the_graph_are_refused(compiled, half):
    with pytest.raises(BundleError):
        compiled(
            half["encoder"], {"tiles": ShapeRange(least=(1, 3, 64, 64), usual=(1, 3, 64, 64), most=(1, 3, 64, 64))}
        )
