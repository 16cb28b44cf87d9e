"""Graphs traced without weights and filled from a checkpoint, against torch."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch: not installed")
pytest.importorskip("transformers", reason="needs transformers: not installed")

import onnx  # noqa: E402
import onnxruntime  # noqa: E402
from torch import nn  # noqa: E402

from edge_rsvlm.errors import InputError, UsageError  # noqa: E402
from edge_rsvlm.export.checkpoint.reading import MemoryTensor  # noqa: E402
from edge_rsvlm.export.checkpoint.skeleton import skeleton  # noqa: E402
from edge_rsvlm.export.families.base import GraphInput, GraphPlan  # noqa: E402
from edge_rsvlm.export.families.causal_decoder import TextModel, decoder_plan, embed_plan  # noqa: E402
from edge_rsvlm.export.graphs import external_data  # noqa: E402
from edge_rsvlm.export.graphs.external_data import write  # noqa: E402
from edge_rsvlm.export.graphs.tracing import trace  # noqa: E402
from tests.tiny_weights import CONFIGS, tiny  # noqa: E402

GRAPHS = {"llava": ("decoder", "embed"), "qwen2_vl": ("embed",)}
SIZES = [
    {"batch": 2, "tokens": 3, "past": 4},
    {"batch": 1, "tokens": 5, "past": 0},
    {"batch": 1, "tokens": 1, "past": 9},
]


def text_of(model):
    return TextModel(model.get_input_embeddings(), model.model.language_model, model.lm_head)


def plans(config):
    return {"decoder": decoder_plan(config.text_config, text_of, mrope=False), "embed": embed_plan(text_of)}


class Traces:
    """Tracing takes seconds: once per model and graph."""

    def __init__(self):
        self.models = {name: tiny(name) for name in ("llava", "qwen2_vl")}
        self.plans = {name: plans(model.config) for name, (_, model) in self.models.items()}
        self.traced = {
            (name, graph): trace(model_class, model.config, self.plans[name][graph])
            for name, (model_class, model) in self.models.items()
            for graph in GRAPHS[name]
        }

    def weights(self, name):
        return {key: MemoryTensor(tensor) for key, tensor in self.models[name][1].state_dict().items()}


@pytest.fixture(scope="module")
def traces():
    return Traces()


def feeds(plan, sizes, seed=0):
    rng = np.random.default_rng(seed)
    arrays = {}
    for spec in plan.inputs:
        shape = [sizes.get(size, size) for size in spec.shape]
        integer = spec.dtype == torch.int64
        arrays[spec.name] = rng.integers(0, 60, shape) if integer else rng.normal(size=shape).astype(np.float32)
    return arrays


def by_torch(plan, model, arrays):
    with torch.no_grad():
        outputs = plan.wrap(model)(*(torch.from_numpy(array) for array in arrays.values()))
    return outputs if isinstance(outputs, tuple) else (outputs,)


def assert_equal(path, plan, model, tolerance):
    onnx.checker.check_model(str(path), full_check=True)
    session = onnxruntime.InferenceSession(path)
    for sizes in SIZES:
        arrays = feeds(plan, sizes)
        for name, got, wanted in zip(
            plan.outputs, session.run(list(plan.outputs), arrays), by_torch(plan, model, arrays), strict=True
        ):
            assert got.dtype == np.float32 and got.shape == wanted.shape, name
            assert np.abs(got - wanted.numpy()).max() <= tolerance * wanted.abs().max(), name


@pytest.mark.parametrize("embedded", [True, False], ids=["one-file", "external-data"])
@pytest.mark.parametrize("precision", ["f32", "f16"])
@pytest.mark.parametrize(("name", "graph"), [(name, graph) for name in GRAPHS for graph in GRAPHS[name]])
def test_filled_graph_equals_torch(traces, name, graph, precision, embedded, tmp_path, monkeypatch):
    if not embedded:
        monkeypatch.setattr(external_data, "EMBEDDED_BYTES", 0)
    monkeypatch.setattr(external_data, "BLOCK_BYTES", 1000)
    path, seen = tmp_path / "graph.onnx", []
    files = write(
        traces.traced[name, graph],
        traces.weights(name),
        path,
        precision,
        lambda done, total: seen.append((done, total)),
    )
    assert set(files) == set(tmp_path.iterdir())
    assert len(files) == (1 if embedded else 2)
    assert seen == sorted(seen) and seen[-1][0] == seen[-1][1]
    model = traces.models[name][1]
    assert_equal(path, traces.plans[name][graph], model, 1e-5 if precision == "f32" else 2e-3)


def test_half_precision_is_stored_and_not_computed(traces, tmp_path):
    for precision in ("f32", "f16"):
        write(traces.traced["llava", "decoder"], traces.weights("llava"), tmp_path / precision, precision)
    graph = onnx.load(tmp_path / "f16").graph
    stored = {tensor.name: tensor.data_type for tensor in graph.initializer}
    assert stored["lm_head.weight"] == onnx.TensorProto.FLOAT16
    assert stored["model.language_model.norm.weight"] == onnx.TensorProto.FLOAT
    widened = [index for index, node in enumerate(graph.node) if node.op_type == "Cast" and node.input[0] in stored]
    assert len(widened) > 10
    assert all(graph.node[i].output[0] in graph.node[i + 1].input for i in widened)  # where it is read, not all at once
    assert (tmp_path / "f16").stat().st_size < 0.75 * (tmp_path / "f32").stat().st_size


def test_what_half_precision_cannot_hold_stays(traces, tmp_path):
    weights = traces.weights("llava")
    large = weights["lm_head.weight"].read()
    large[3, 3] = 1e5
    write(traces.traced["llava", "decoder"], {**weights, "lm_head.weight": MemoryTensor(large)}, tmp_path / "x", "f16")
    stored = {tensor.name: tensor for tensor in onnx.load(tmp_path / "x").graph.initializer}
    assert stored["lm_head.weight"].data_type == onnx.TensorProto.FLOAT
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(stored["lm_head.weight"]), large.T)


def test_embedding_table_is_widened_after_the_lookup(traces, tmp_path):
    write(traces.traced["llava", "embed"], traces.weights("llava"), tmp_path / "x", "f16")
    graph = onnx.load(tmp_path / "x").graph
    assert [node.op_type for node in graph.node] == ["Gather", "Cast"]
    assert [output.name for output in graph.output] == ["inputs_embeds"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stored_in_half(traces, dtype, tmp_path):
    _, model = tiny("llava")
    weights = {name: MemoryTensor(tensor.to(dtype)) for name, tensor in model.state_dict().items()}
    model.load_state_dict({name: weight.read().float() for name, weight in weights.items()})
    write(traces.traced["llava", "decoder"], weights, tmp_path / "x", "f32")
    assert_equal(tmp_path / "x", traces.plans["llava"]["decoder"], model, 1e-5)


def test_matrices_are_stored_as_they_are_read(traces):
    traced = traces.traced["llava", "decoder"]
    initializers = traced.model.graph.initializers
    assert all(node.op_type != "Transpose" or node.inputs[0].name not in initializers for node in traced.model.graph)
    assert traced.weights["lm_head.weight"].transposed
    assert not traced.weights["model.language_model.norm.weight"].transposed


def test_axes_have_the_names_of_the_plan(traces, tmp_path):
    write(traces.traced["llava", "decoder"], traces.weights("llava"), tmp_path / "x", "f32")
    graph = onnx.load(tmp_path / "x").graph
    axes = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in graph.input}
    assert axes["inputs_embeds"] == ["batch", "tokens", 32]
    assert axes["position_ids"] == ["batch", "tokens"]
    assert axes["past_key_values.1.value"] == ["batch", 2, "past", 8]
    named = {d.dim_param for v in (*graph.output, *graph.value_info) for d in v.type.tensor_type.shape.dim}
    assert not any(part[0] == "s" and part[1:].isdigit() for axis in named for part in axis.split())


def test_nothing_of_the_machine_is_in_the_file(traces, tmp_path):
    write(traces.traced["llava", "decoder"], traces.weights("llava"), tmp_path / "x", "f32")
    model = onnx.load(tmp_path / "x")
    model.graph.ClearField("initializer")
    text = model.SerializeToString()
    assert not [word for word in (b"site-packages", b".py", b"pkg.", sys.prefix.encode()) if word in text]


def test_writing_again_gives_the_same_bytes(traces, tmp_path):
    for name in ("a", "b"):
        write(traces.traced["llava", "decoder"], traces.weights("llava"), tmp_path / name, "f16")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_weight_of_another_shape(traces, tmp_path):
    wrong = {**traces.weights("llava"), "lm_head.weight": MemoryTensor(torch.zeros(64, 33))}
    with pytest.raises(InputError, match=r"lm_head.weight.*\(64, 33\)"):
        write(traces.traced["llava", "decoder"], wrong, tmp_path / "x", "f32")


class Both(nn.Module):
    """Embedding and head in one graph: tied weights, read as rows and as a matrix."""

    def __init__(self, model):
        super().__init__()
        self.embed, self.head = model.get_input_embeddings(), model.lm_head

    def forward(self, input_ids):
        return self.head(self.embed(input_ids))


@pytest.mark.parametrize("precision", ["f32", "f16"])
def test_tied_weights_are_written_once(traces, precision, tmp_path):
    model_class, model = traces.models["qwen2_vl"]
    plan = replace(traces.plans["qwen2_vl"]["embed"], wrap=Both, outputs=("logits",))
    traced = trace(model_class, model.config, plan)
    assert len(traced.weights) == 1
    write(traced, traces.weights("qwen2_vl"), tmp_path / "x", precision)
    assert_equal(tmp_path / "x", plan, model, 1e-5 if precision == "f32" else 2e-3)


class Early(nn.Module):
    """Computes from a weight in the constructor, where there is none."""

    def __init__(self, model):
        super().__init__()
        self.register_buffer("rows", model.get_input_embeddings().weight[:5] * 2)

    def forward(self, input_ids):
        return self.rows[input_ids]


def test_weights_computed_too_early(traces):
    model_class, model = traces.models["llava"]
    with pytest.raises(UsageError, match="'rows' is computed from weights"):
        trace(model_class, model.config, replace(traces.plans["llava"]["embed"], wrap=Early))


class Narrow(nn.Module):
    """Only works for the length that it was traced with."""

    def __init__(self, model):
        super().__init__()
        self.embed = model.get_input_embeddings()

    def forward(self, input_ids):
        return self.embed(input_ids).reshape(input_ids.shape[0], 7 * 32)


def test_a_dynamic_size_that_the_model_fixes(traces):
    model_class, model = traces.models["llava"]
    with pytest.raises(UsageError, match=r"input_ids.*size.*\[1\]"):
        trace(model_class, model.config, replace(traces.plans["llava"]["embed"], wrap=Narrow))


class Film(nn.Module):
    """A 3-D convolution without bias."""

    def __init__(self, model):
        super().__init__()
        self.proj = model.model.visual.patch_embed.proj

    def forward(self, film):
        return self.proj(film).flatten(1)


def test_convolution_over_time(traces, tmp_path):
    model_class, model = traces.models["qwen2_vl"]
    plan = GraphPlan("film", Film, (GraphInput("film", ("batch", 3, 2, 8, 8)),), ("features",), {"batch": 3})
    traced = trace(model_class, model.config, plan)
    write(traced, traces.weights("qwen2_vl"), tmp_path / "x", "f32")
    assert_equal(tmp_path / "x", plan, model, 1e-5)


class Pixels(nn.Module):
    """Reads persistent buffers of the checkpoint (batch norm) and a computed one."""

    def __init__(self, model):
        super().__init__()
        self.vision = model.vision_model

    def forward(self, tiles):
        return self.vision(pixel_values=tiles).pooler_output


def test_buffers_of_the_checkpoint_are_weights(tmp_path):
    model_class, model = tiny("align")
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 2.0)
    plan = GraphPlan("image", Pixels, (GraphInput("tiles", ("batch", 3, 32, 32)),), ("embedding",), {"batch": 2})
    traced = trace(model_class, model.config, plan)
    assert any(name.endswith("running_var") for name in traced.weights)
    weights = {name: MemoryTensor(tensor) for name, tensor in model.state_dict().items()}
    write(traced, weights, tmp_path / "x", "f32")
    assert_equal(tmp_path / "x", plan, model, 1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_skeleton_has_the_buffers_of_the_model(name):
    model_class, model = tiny(name)
    bare = skeleton(model_class, model.config)
    assert all(parameter.is_meta for parameter in bare.parameters())
    assert {k: p.shape for k, p in bare.named_parameters()} == {k: p.shape for k, p in model.named_parameters()}
    buffers = dict(bare.named_buffers())
    assert buffers.keys() == dict(model.named_buffers()).keys()
    for key, buffer in model.named_buffers():
        assert buffers[key].dtype == buffer.dtype and torch.equal(buffers[key], buffer), key
