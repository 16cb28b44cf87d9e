"""What an export writes for TensorRT: graphs that its compiler takes, and what is known of those that it does not."""

from __future__ import annotations

import numpy as np
import pytest

from edge_rsvlm.bundle import load_bundle
from edge_rsvlm.errors import BundleError, UsageError

onnx = pytest.importorskip("onnx", reason="the export extra is not installed")
pytest.importorskip("torch", reason="the export extra is not installed")
from edge_rsvlm.export.quantize.settings import Int4, Int8  # noqa: E402
from edge_rsvlm.export.quantize.static import quantize_static  # noqa: E402
from edge_rsvlm.export.quantize.typed import half_precision  # noqa: E402
from edge_rsvlm.export.quantize.weight_only import quantize_int4  # noqa: E402
from edge_rsvlm.export.tensorrt import checked as checking  # noqa: E402
from edge_rsvlm.export.tensorrt import compiled  # noqa: E402
from edge_rsvlm.export.tensorrt.checked import checked  # noqa: E402
from edge_rsvlm.export.tensorrt.report import unsupported  # noqa: E402

TAKEN = "compiled for SM86 by tensorrt_rtx "


@pytest.fixture
def bundle(trained):
    return trained


@pytest.fixture
def written(bundle, tmp_path):
    """A graph as a recipe leaves it, before it is checked."""
    file = tmp_path / "language_prefix.tensorrt.onnx"
    half_precision(source_of(bundle, "language_prefix"), file)
    return file


def source_of(bundle, name):
    return bundle.path(bundle.manifest.graphs[name].file)


def golden_of(bundle, name):
    return bundle.path(next(case.file for case in bundle.manifest.probe if case.graph == name))


def check(bundle, written, name="language_prefix"):
    return checked(bundle.manifest, name, source_of(bundle, name), written, golden_of(bundle, name))


def test_a_family_is_exported_for_tensorrt(needs, tmp_path):
    needs("tensorrt_rtx")
    from edge_rsvlm.export.chain import run_export
    from edge_rsvlm.export.recipe import Recipe
    from tests import tiny_generators

    tiny_generators.idefics3(tmp_path / "smol", smol=True)
    recipe = Recipe(
        checkpoint=tmp_path / "smol", target="onnx:f16", engines=("onnxruntime", "tensorrt"),
        out=tmp_path / "smol.bundle", bundle={"licence": "none"},
    )  # fmt: skip
    made = load_bundle(run_export(recipe, lambda *_: None), allow_unsigned=True).manifest
    assert made.graphs.keys() == {"image", "embed", "decoder"}
    (step,) = [step for step in made.steps if step.step == "quantize"]
    for name, graph in made.graphs.items():
        said = str(step.metrics[f"{name} tensorrt"])
        assert said.startswith(TAKEN) and "run on no device, cosine 1.0000 to the graph before" in said
        assert graph.tensorrt is not None and graph.tensorrt.file in made.files


def test_blocks_of_4_bits_compile(needs, bundle, tmp_path):
    needs("tensorrt_rtx")
    source, out, file = source_of(bundle, "language_decoder"), tmp_path / "d.onnx", tmp_path / "d.tensorrt.onnx"
    quantize_int4(source, [], Int4(method="rtn"), out, file)
    kinds = [tensor.data_type for tensor in onnx.load(file, load_external_data=False).graph.initializer]
    assert kinds.count(onnx.TensorProto.INT4) > 20
    assert check(bundle, file, "language_decoder").said.startswith(TAKEN)
    assert {problem.operator for problem in unsupported(out)} >= {"MatMulNBits"}


def test_what_tensorrt_would_not_take_is_left_out_and_said(bundle, written):
    model = onnx.load(written)
    model.graph.node[0].op_type, model.graph.node[0].domain = "MatMulInteger", ""
    model.graph.node[0].name = "first"
    onnx.save(model, written)
    written.with_name(f"{written.stem}.f16.data").write_bytes(b"weights of its own")
    found = check(bundle, written)
    assert found.graph is None
    assert found.said.startswith("left to ONNX Runtime: MatMulInteger first: integer products of ONNX Runtime")
    assert not list(written.parent.iterdir())


def test_without_a_compiler_rules_have_the_word(bundle, written, monkeypatch):
    def missing():
        raise UsageError("it is not installed", fix="none")

    monkeypatch.setattr(checking, "compiler", missing)
    found = check(bundle, written)
    said = "checked by rules: TensorRT for RTX is not installed here, run on no device, cosine 1.0"
    assert found.said.startswith(said)
    assert found.graph is not None and found.graph.shapes["c5"].most == (8, 320, 16, 16)


def test_large_graphs_are_not_compiled(bundle, written, monkeypatch):
    monkeypatch.setattr(checking, "COMPILED_BYTES", written.stat().st_size - 1)
    monkeypatch.setattr(compiled, "load_tensorrt", lambda *names: pytest.fail("it was asked"))
    found = check(bundle, written)
    assert found.graph is not None and "too large to be compiled here" in found.said


def test_graphs_that_compute_something_else_are_left_out(bundle, written):
    """Whose weights are those of another channel, say."""
    model = onnx.load(written)
    weight = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    values = onnx.numpy_helper.to_array(weight)
    weight.CopyFrom(onnx.numpy_helper.from_array(values[::-1].copy(), weight.name))
    onnx.save(model, written)
    found = check(bundle, written)
    assert found.graph is None and "it computes something else: cosine" in found.said


def test_8_bits_compile_where_they_are_symmetric(needs, bundle, tmp_path):
    needs("tensorrt_rtx")
    source, out, file = source_of(bundle, "encoder"), tmp_path / "e.onnx", tmp_path / "e.tensorrt.onnx"
    with np.load(golden_of(bundle, "encoder")) as golden:
        samples = [{"tiles": golden["in.tiles"]}]
    quantize_static(source, samples, Int8(ranges="minmax"), out, file)
    found = check(bundle, file, "encoder")
    assert found.graph is not None and found.said.startswith(TAKEN)
    assert float(found.said.partition("cosine ")[2].split()[0]) > 0.98
    assert {problem.operator for problem in unsupported(out)} == {"QuantizeLinear", "DequantizeLinear"}
    with pytest.raises(BundleError, match=r"cannot read e\.onnx"):
        compiled.compiled_bytes(out, found.graph.shapes)
