"""Adapters that stay apart: graphs that take their factors, against peft, and the runtime that switches them."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edge_rsvlm.errors import BundleError, InputError, UsageError

torch = pytest.importorskip("torch", reason="the export extra is not installed")
transformers = pytest.importorskip("transformers", reason="the export extra is not installed")
peft = pytest.importorskip("peft", reason="the export extra is not installed")
pytest.importorskip("onnxscript", reason="the export extra is not installed")
pytest.importorskip("sentencepiece", reason="Llama's tokenizer is a sentencepiece model")

import onnx  # noqa: E402

from edge_rsvlm import verify  # noqa: E402
from edge_rsvlm.bundle import load_bundle  # noqa: E402
from edge_rsvlm.export.adapters.kept import check_names, keep_apart  # noqa: E402
from edge_rsvlm.export.adapters.reading import read_adapter  # noqa: E402
from edge_rsvlm.export.bundle_writer import probe_case, write_manifest  # noqa: E402
from edge_rsvlm.export.checkpoint.reading import open_checkpoint  # noqa: E402
from edge_rsvlm.export.checkpoint.skeleton import skeleton  # noqa: E402
from edge_rsvlm.export.families.base import Source  # noqa: E402
from edge_rsvlm.export.families.registry import family_of  # noqa: E402
from edge_rsvlm.export.graphs import external_data  # noqa: E402
from edge_rsvlm.export.graphs.switching import input_names, switchable, unused, write_adapters  # noqa: E402
from edge_rsvlm.export.graphs.tracing import trace  # noqa: E402
from edge_rsvlm.export.proof.probe import prepared, probe_image  # noqa: E402
from edge_rsvlm.pipeline.runtime import Runtime, cpu_engine  # noqa: E402
from edge_rsvlm.pipeline.session import Limits, Session  # noqa: E402
from edge_rsvlm.tasks.search import Sampling  # noqa: E402
from tests import tiny_generators as tiny  # noqa: E402
from tests.wide import runner  # noqa: E402

TEXT = "how many ships are there?"
GREEDY = Sampling(temperature=0.0, max_tokens=16)
MEMORY = {"session_bytes": 1 << 26, "tile_bytes": 1 << 22}
ADAPTERS = {
    "harbour": {"r": 3, "target_modules": ["q_proj", "v_proj"], "lora_alpha": 5},
    "runway": {"r": 6, "target_modules": "all-linear", "use_rslora": True, "rank_pattern": {"v_proj": 2}},
}
CHECKPOINTS = {
    "llava": tiny.llava,
    "qwen2_vl": lambda folder: tiny.qwen(folder, tied=True),
    "smolvlm": lambda folder: tiny.idefics3(folder, smol=True),
}
TIED = {"head": {"r": 2, "target_modules": ["lm_head", "down_proj"]}}
"""On an output layer that shares its tensor with the embedding, which stays as it is."""


class Made:
    """A checkpoint, its adapters, and a bundle of both."""

    def __init__(self, name: str, folder: Path) -> None:
        self.checkpoint = open_checkpoint(CHECKPOINTS[name](folder / "checkpoint"))
        self.family = family_of(self.checkpoint.config)
        self.source = Source(self.checkpoint.folder, self.checkpoint.config)
        self.model_class = self.family.model_class(self.checkpoint.config)
        self.folders = {}
        for seed, (adapter, config) in enumerate((ADAPTERS | (TIED if name == "qwen2_vl" else {})).items()):
            self.folders[adapter] = save_adapter(self.model(), folder / adapter, seed, **config)
        self.kept = [self.keep(adapter, path) for adapter, path in self.folders.items()]
        plans, config = self.family.graphs(self.source), self.checkpoint.config
        self.traced = {plan.name: trace(self.model_class, config, plan) for plan in plans}
        empty = skeleton(self.model_class, config)
        self.changed = {name: switchable(traced, self.kept, empty) for name, traced in self.traced.items()}
        self.graphs = {name: changed.weights for name, changed in self.changed.items()}
        self.bundle_folder = self.write(folder / "bundle", "f32")
        self.bundle = load_bundle(self.bundle_folder, allow_unsigned=True)
        self.bare = folder / "bare"
        self.bare.mkdir()
        for name, traced in self.traced.items():
            external_data.write(traced, self.weights, self.bare / f"{name}.onnx", "f32")

    def keep(self, name: str, folder: Path, weight: float = 1.0):
        empty = skeleton(self.model_class, self.checkpoint.config)
        return keep_apart(name, read_adapter(folder, weight), empty, self.weights)

    @property
    def weights(self):
        return self.checkpoint.weights(self.model_class)

    def write(self, folder: Path, precision: str) -> Path:
        folder.mkdir()
        for name, changed in self.changed.items():
            external_data.write(changed.traced, self.weights, folder / f"{name}.onnx", precision)
        described = self.family.describe(self.source)
        for name, content in described.files.items():
            (folder / name).write_bytes(content)
        self.fields = {
            "name": "tiny", "version": 1, "description": "", "licence": "", "training_data": [],
            "probe": [],
            "graphs": {
                name: {"file": f"{name}.onnx", "precision": precision, **roles}
                for name, roles in described.graphs.items()
            },
            "tasks": {verb: {**task, "memory": MEMORY} for verb, task in described.tasks.items()},
            "adapters": write_adapters(self.kept, self.graphs, folder, precision, described.tasks),
        }  # fmt: skip
        write_manifest(folder, self.fields)
        return folder

    def model(self):
        return self.model_class.from_pretrained(self.checkpoint.folder, dtype=torch.float32).eval()

    def reference(self, model):
        return self.family.reference(self.source, model, probe_image(), TEXT)

    def answer(self, runtime):
        task = runtime.manifest.tasks.ask
        runtime._engine.logits.clear()
        (tokens,) = runtime.generator("ask", task).tokens([prepared(task.input, probe_image())], TEXT, GREEDY)
        return {"tokens": tokens, "logits": runtime._engine.logits[0][0, -1]}


class Listening:
    """The real engine, which keeps the logits that went by."""

    def __init__(self):
        self.engine, self.logits, self.opened = cpu_engine(1, 0), [], []

    def open(self, graph):
        self.opened.append(graph.name)
        session = self.engine.open(graph)
        outer = self

        class Session:
            def run(self, inputs, outputs):
                found = session.run(inputs, outputs)
                outer.logits += [found[0]] if outputs[0] == "logits" else []
                return found

        return Session()


def save_adapter(model, folder: Path, seed: int, **config) -> Path:
    """A random adapter, strong enough to change what the model says."""
    made = peft.get_peft_model(model, peft.LoraConfig(**config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.requires_grad and "original_module" not in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    made.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A family's bundle by name, made once."""
    return cache(lambda name: Made(name, tmp_path_factory.mktemp(name)))


def assert_equal(found, expected):
    assert found["tokens"].tolist() == expected["tokens"].tolist()
    np.testing.assert_allclose(found["logits"], expected["logits"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_switching_gives_what_peft_gives(made, name):
    case = made(name)
    engine = Listening()
    runtime = Runtime(case.bundle, engine)
    base = case.reference(case.model())
    expected = {a: case.reference(peft.PeftModel.from_pretrained(case.model(), f)) for a, f in case.folders.items()}
    for adapter in (None, *expected, None, *reversed(expected)):
        runtime.switch(adapter)
        found = case.answer(runtime)
        assert_equal(found, base if adapter is None else expected[adapter])
        assert adapter is None or not np.allclose(found["logits"], base["logits"], atol=1e-2)
    assert sorted(engine.opened) == ["decoder.onnx", "embed.onnx", "image.onnx"], "opened once, whatever is chosen"


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_without_an_adapter_every_bit_is_the_base_graphs(made, name):
    case = made(name)
    with_inputs, bare = (Runtime(case.bundle, Listening()) for _ in range(2))
    bare._engine.open = lambda graph, opened=bare._engine.open: opened(case.bare / graph.name)
    one, other = case.answer(with_inputs), case.answer(bare)
    assert np.array_equal(one["tokens"], other["tokens"])
    assert all(np.array_equal(a, b) for a, b in zip(with_inputs._engine.logits, bare._engine.logits, strict=True))


def test_half_precision_stays_near(made, tmp_path):
    case = made("llava")
    bundle = load_bundle(case.write(tmp_path / "bundle", "f16"), allow_unsigned=True)
    runtime = Runtime(bundle, Listening())
    runtime.switch("runway")
    expected = case.reference(peft.PeftModel.from_pretrained(case.model(), case.folders["runway"]))["logits"]
    found = case.answer(runtime)["logits"]
    assert np.linalg.norm(found - expected) < 2e-2 * np.linalg.norm(expected)
    with np.load(bundle.path("adapter-runway.npz")) as stored:
        assert {stored[name].dtype for name in stored.files} == {np.dtype(np.float16)}


def test_layers_that_no_graph_computes_are_named(made):
    """LLaVA takes what the last vision layer but one gives, so an adapter on the last has no effect."""
    case = made("llava")
    harbour, runway = (unused(adapter, case.graphs) for adapter in case.kept)
    assert harbour and all("vision_tower" in weight and "layers.2" in weight for weight in (*harbour, *runway))
    assert not any(".layers.1." in weight for weight in runway)


def test_outputs_of_layers_keep_their_names(made):
    case = made("smolvlm")
    layers = case.traced["decoder"].layers
    graph = onnx.load(case.bundle.path("decoder.onnx")).graph
    makers = {output: node.op_type for node in graph.node for output in node.output}
    adapted = [name for name in layers if f"{name}.weight" in case.graphs["decoder"]]
    assert len(adapted) == 14
    assert {makers[layers[name]] for name in adapted} == {"Add"}
    inputs = {value.name for value in graph.input}
    assert all(inputs >= set(input_names(f"{name}.weight")) for name in adapted)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"use_dora": True, "target_modules": ["q_proj"]}, "DoRA"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "lm_head.weight' (the whole tensor"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens.weight' (Embedding)"),
        ({"target_modules": ["patch_embedding", "q_proj"]}, "patch_embedding.weight' (Conv2d)"),
        ({"target_modules": ["fc1"], "lora_bias": True}, "fc1.bias' (a bias"),
        ({"target_modules": ["q_proj"], "trainable_token_indices": [3, 4]}, "embed_tokens.weight' (rows"),
    ],
)
def test_what_cannot_stay_apart_is_refused_by_name(made, config, reason, tmp_path):
    case = made("llava")
    save_adapter(case.model(), tmp_path, 0, **config)
    with pytest.raises(InputError) as refused:
        case.keep("it", tmp_path)
    assert reason in str(refused.value) and "merge this adapter" in str(refused.value)


@pytest.mark.parametrize("names", [["a", "A"], ["../a"], ["my lora"], [""], ["-a"]])
def test_names_that_are_no_file_names_or_met_twice(names):
    check_names(["harbour", "run.way-2"])
    with pytest.raises(UsageError, match="named"):
        check_names(names)


def test_an_adapter_of_nothing_that_runs_is_refused(made, tmp_path):
    case = made("llava")
    with pytest.raises(UsageError, match="'harbour' changes nothing"):
        write_adapters(case.kept[:1], {"image": frozenset()}, tmp_path, "f32", ["ask"])
    with pytest.raises(UsageError, match="only caption, ask, ground take an adapter"):
        write_adapters(case.kept[:1], case.graphs, tmp_path, "f32", ["detect", "search"])


def test_an_unknown_adapter_is_refused_with_the_known_ones(made, tmp_path):
    Image.fromarray(probe_image()).save(tmp_path / "it.png")
    run = runner(made("llava").bundle_folder)
    code, _, errors = run("caption", tmp_path / "it.png", "--adapter", "harbor")
    assert code == 2
    assert "no adapter 'harbor', it has: harbour, runway" in errors


def test_the_command_line_answers_by_the_chosen_adapter(made, tmp_path):
    case = made("qwen2_vl")
    Image.fromarray(probe_image()).save(tmp_path / "it.png")
    run, answers = runner(case.bundle_folder), {}
    for adapter in (None, *case.folders):
        chosen = [] if adapter is None else ["--adapter", adapter]
        for verb, words in (("caption", []), ("ask", [TEXT]), ("ground", ["a ship"])):
            code, out, errors = run(verb, tmp_path / "it.png", *words, "--json", *chosen)
            assert code == 0, errors
            answers[adapter, verb] = json.loads(out)
    for verb, key in (("caption", "caption"), ("ask", "answer")):
        assert len({answers[adapter, verb][key] for adapter in (None, *case.folders)}) == 1 + len(case.folders)


def test_the_plan_counts_the_adapter(made, tmp_path):
    case = made("llava")
    Image.fromarray(probe_image()).save(tmp_path / "it.png")
    from edge_rsvlm.raster.reader import open_raster

    totals = {}
    for adapter in (None, "runway"):
        session = Session(case.bundle, Limits(memory_bytes=1 << 32), adapter=adapter)
        with open_raster(str(tmp_path / "it.png")) as raster:
            totals[adapter] = dict(session.admit(session.demand("caption", raster)[1]).items)
    with np.load(case.bundle.path("adapter-runway.npz")) as stored:
        assert totals["runway"]["adapter"] == 4 * sum(stored[name].size for name in stored.files)
    assert "adapter" not in totals[None]


def rewritten(case, folder: Path, arrays: dict, **fields):
    """The bundle with other arrays in harbour's file, listed as they are."""
    shutil.copytree(case.bundle_folder, folder)
    np.savez(folder / "adapter-harbour.npz", **arrays)
    adapters = {**case.fields["adapters"]}
    adapters["harbour"] = {**adapters["harbour"], **fields}
    write_manifest(folder, {**case.fields, "adapters": adapters})
    return Runtime(load_bundle(folder, allow_unsigned=True), Listening())


@pytest.mark.parametrize("fault", ["more", "fewer", "graph", "text"])
def test_a_file_that_is_not_what_the_manifest_says(made, fault, tmp_path):
    case = made("llava")
    with np.load(case.bundle.path("adapter-harbour.npz")) as stored:
        arrays = dict(stored)
    first = next(iter(arrays))
    if fault == "more":
        arrays[first] = np.zeros((2000, 2000), np.float32)
    elif fault == "fewer":
        del arrays[first]
    elif fault == "graph":
        arrays["nowhere/x"] = arrays.pop(first)
    else:
        arrays[first] = np.array(["text"])
    runtime = rewritten(case, tmp_path / "bundle", arrays)
    with pytest.raises(BundleError, match=r"harbour\.npz' is no adapter of this bundle"):
        runtime.switch("harbour")


def test_an_input_that_the_graph_does_not_have_is_no_crash(made, tmp_path):
    case = made("llava")
    with np.load(case.bundle.path("adapter-harbour.npz")) as stored:
        arrays = dict(stored)
    arrays["decoder/nothing"] = arrays.pop(next(name for name in arrays if name.startswith("decoder/")))
    runtime = rewritten(case, tmp_path / "bundle", arrays)
    runtime.switch("harbour")
    with pytest.raises(BundleError, match=r"decoder\.onnx failed"):
        case.answer(runtime)


def test_the_golden_probe_is_replayed_with_the_adapter(made, tmp_path):
    case = made("llava")
    runtime, folder = Runtime(case.bundle, Listening()), tmp_path / "bundle"
    tiles = prepared(case.bundle.manifest.tasks.ask.input, probe_image()).pixels_KCHW
    runtime.switch("runway")
    golden = runtime.open("image").run({"tiles": tiles}, ["features"])[0]
    shutil.copytree(case.bundle_folder, folder)
    probe = probe_case(folder, "image", {"tiles": tiles}, {"features": golden}, 1e-4)
    write_manifest(folder, {**case.fields, "probe": [{**probe, "adapter": "runway"}]})
    bundle = load_bundle(folder, allow_unsigned=True)
    (result,) = verify.replay(bundle, bundle.manifest.probe[0])
    assert result.passed and "runway" in result.output
    (other,) = verify.replay(bundle, bundle.manifest.probe[0].model_copy(update={"adapter": None}))
    assert not other.passed
    write_manifest(folder, {**case.fields, "probe": [{**probe, "adapter": "runaway"}]})
    with pytest.raises(BundleError, match="an adapter 'runaway' that it does not list"):
        load_bundle(folder, allow_unsigned=True)


def test_a_weight_of_the_adapter_is_in_its_factors(made):
    case = made("llava")
    once, half = (case.keep("a", case.folders["harbour"], weight).factors for weight in (1.0, 0.5))
    for name, factors in once.items():
        torch.testing.assert_close(half[name].a @ half[name].b * 2, factors.a @ factors.b)
