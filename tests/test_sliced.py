"""Graphs run slice by slice, models read parameter by parameter, and the layer where the two part."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch: not installed")
pytest.importorskip("transformers", reason="needs transformers: not installed")

import onnxruntime  # noqa: E402
from onnx import TensorProto, helper  # noqa: E402

from edge_rsvlm.export.checkpoint.reading import MemoryTensor, open_checkpoint  # noqa: E402
from edge_rsvlm.export.checkpoint.streaming import streamed_model  # noqa: E402
from edge_rsvlm.export.families.causal_decoder import TextModel, decoder_plan  # noqa: E402
from edge_rsvlm.export.graphs import external_data  # noqa: E402
from edge_rsvlm.export.graphs.sliced import run_sliced  # noqa: E402
from edge_rsvlm.export.graphs.tracing import trace  # noqa: E402
from edge_rsvlm.export.proof.layers import compare_layers, first_above  # noqa: E402
from tests.tiny_weights import tiny  # noqa: E402


def text_of(model):
    return TextModel(model.get_input_embeddings(), model.model.language_model, model.lm_head)


class Exported:
    def __init__(self, folder):
        self.model_class, self.model = tiny("llava")
        self.config = self.model.config
        self.plan = decoder_plan(self.config.text_config, text_of, mrope=False)
        self.traced = trace(self.model_class, self.config, self.plan)
        self.weights = {name: MemoryTensor(tensor) for name, tensor in self.model.state_dict().items()}
        self.path = folder / "decoder.onnx"
        external_data.write(self.traced, self.weights, self.path, "f32")
        rng = np.random.default_rng(0)
        sizes = {"batch": 2, "tokens": 3, "past": 4}
        self.inputs = {
            spec.name: rng.normal(size=[sizes.get(size, size) for size in spec.shape]).astype(np.float32)
            for spec in self.plan.inputs
        }
        self.inputs["position_ids"] = np.tile(np.arange(4, 7), (2, 1))

    def outputs(self):
        """By onnxruntime, whole."""
        values = onnxruntime.InferenceSession(self.path).run(list(self.plan.outputs), self.inputs)
        return dict(zip(self.plan.outputs, values, strict=True))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(external_data, "EMBEDDED_BYTES", 0)
        return Exported(tmp_path_factory.mktemp("graph"))


@pytest.mark.parametrize("slice_bytes", [1, 20_000, 1 << 30])
def test_slices_give_what_the_whole_graph_gives(exported, slice_bytes):
    assert exported.path.with_name("decoder.onnx.data").is_file()
    whole = exported.outputs()
    sliced = dict(run_sliced(exported.path, exported.inputs, list(whole), slice_bytes))
    assert sliced.keys() == whole.keys()
    for name, value in whole.items():
        np.testing.assert_allclose(sliced[name], value, rtol=1e-4, atol=1e-5)


def test_values_come_in_the_order_of_the_graph(exported):
    wanted = list(exported.traced.layers.values())
    got = [name for name, _ in run_sliced(exported.path, exported.inputs, wanted[::-1], 1)]
    assert got == list(dict.fromkeys(wanted))


def test_unknown_value(exported):
    with pytest.raises(KeyError, match="no-such-value"):
        next(run_sliced(exported.path, exported.inputs, ["no-such-value"]))


def test_values_that_only_a_subgraph_reads(tmp_path):
    """The branch of an If reads a value of an earlier slice by name."""
    branch = helper.make_graph(
        [helper.make_node("Add", ["doubled", "weight"], ["sum"])],
        "branch",
        [],
        [helper.make_empty_tensor_value_info("sum")],
    )
    nodes = [
        helper.make_node("Add", ["x", "x"], ["doubled"]),
        helper.make_node("Mul", ["x", "weight"], ["scaled"]),
        helper.make_node("If", ["yes"], ["y"], then_branch=branch, else_branch=branch),
    ]
    weight = helper.make_tensor("weight", TensorProto.FLOAT, [2], [10.0, 20.0])
    yes = helper.make_tensor("yes", TensorProto.BOOL, [], [True])
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])
    graph = helper.make_graph(nodes, "graph", [x], [helper.make_empty_tensor_value_info("y")], [weight, yes])
    path = tmp_path / "if.onnx"
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path.write_bytes(proto.SerializeToString())
    got = dict(run_sliced(path, {"x": np.float32([1, 2])}, ["y", "scaled"], 1))
    np.testing.assert_array_equal(got["y"], [12, 24])
    np.testing.assert_array_equal(got["scaled"], [10, 40])


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "siglip", "align"])
def test_streamed_model_equals_the_loaded_one(name, tmp_path):
    model_class, model = tiny(name)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    loaded = model_class.from_pretrained(tmp_path, dtype=torch.float32).eval()
    checkpoint = open_checkpoint(tmp_path)
    streamed = streamed_model(model_class, checkpoint.config, checkpoint.weights(model_class))
    ids = torch.randint(3, 59, (2, 5))
    arguments = {"input_ids": ids}
    if name in ("siglip", "align"):
        side = model.config.vision_config.image_size
        arguments["pixel_values"] = torch.randn(2, 3, side, side)
    with torch.no_grad():
        got, wanted = streamed(**arguments), loaded(**arguments)
    assert got[0].isfinite().all()
    # Tensors lie elsewhere in memory, and sums of unaligned ones are added up in another order.
    torch.testing.assert_close(got[0], wanted[0], rtol=1e-5, atol=1e-6)


def test_streamed_model_generates(tmp_path):
    model_class, model = tiny("qwen2_vl")
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    streamed = streamed_model(model_class, checkpoint.config, checkpoint.weights(model_class))
    keywords = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": 63}
    ids = torch.randint(3, 59, (1, 5))
    assert torch.equal(streamed.generate(ids, **keywords), model.generate(ids, **keywords))


def test_streamed_model_holds_no_parameter(tmp_path):
    model_class, model = tiny("clip")
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    streamed = streamed_model(model_class, checkpoint.config, checkpoint.weights(model_class))
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    assert {name: parameter.shape for name, parameter in streamed.named_parameters()} == shapes
    assert all(parameter.untyped_storage().nbytes() <= 4 for parameter in streamed.parameters())


def test_layers_of_an_honest_export(exported):
    streamed = streamed_model(exported.model_class, exported.config, exported.weights)
    rows = compare_layers(exported.path, exported.traced.layers, streamed, exported.plan, exported.inputs, 20_000)
    inside = exported.model.model.language_model.named_modules()
    leaves = [f"model.language_model.{name}" for name, part in inside if next(part.parameters(False), None) is not None]
    leaves.remove("model.language_model.embed_tokens")
    assert {row.module for row in rows} >= {*leaves, "lm_head", "model.language_model.layers.1"}
    assert max(row.error for row in rows) < 1e-5
    assert first_above(rows, 1e-5) is None


@pytest.mark.parametrize(
    "bad",
    [
        "model.language_model.layers.0.self_attn.v_proj",
        "model.language_model.layers.1.input_layernorm",
        "model.language_model.layers.1.mlp.down_proj",
        "lm_head",
    ],
)
@pytest.mark.parametrize("scale", [100.0, float("nan")])
def test_one_bad_layer_is_the_first_row_that_jumps(exported, bad, scale):
    name = f"{bad}.weight"
    changed = {**exported.weights, name: MemoryTensor(exported.weights[name].read() * scale)}
    streamed = streamed_model(exported.model_class, exported.config, changed)
    rows = compare_layers(exported.path, exported.traced.layers, streamed, exported.plan, exported.inputs)
    first = first_above(rows, 1e-3)
    assert first is not None
    assert first.module == bad
    assert first.growth > 1e4
    assert all(row.error < 1e-5 for row in rows[: rows.index(first)])
