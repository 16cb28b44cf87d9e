"""ONNX exports in the layouts of optimum and transformers.js, made here with torch.onnx, against transformers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch: not installed")
transformers = pytest.importorskip("transformers", reason="needs transformers: not installed")
onnx = pytest.importorskip("onnx", reason="needs onnx: not installed")
pytest.importorskip("onnxscript", reason="needs onnxscript: not installed")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from PIL import Image  # noqa: E402

from edge_rsvlm.config.manifest import Graph  # noqa: E402
from edge_rsvlm.config.task_specs import GenerateTask, MatchTask  # noqa: E402
from edge_rsvlm.engines.onnxruntime import OnnxRuntimeEngine  # noqa: E402
from edge_rsvlm.errors import InputError  # noqa: E402
from edge_rsvlm.export.families.clip import Clip  # noqa: E402
from edge_rsvlm.export.families.image_processors import load_image_processor  # noqa: E402
from edge_rsvlm.export.families.tokenizers import load_tokenizer  # noqa: E402
from edge_rsvlm.export.onnx_folder.graphs import cut, inputs_of  # noqa: E402
from edge_rsvlm.export.onnx_folder.reading import read_onnx_folder  # noqa: E402
from edge_rsvlm.pipeline.runtime import RoleSession  # noqa: E402
from edge_rsvlm.tasks.decoder import OnnxLanguage, cache_names  # noqa: E402
from edge_rsvlm.tasks.generate import Generator, Vision  # noqa: E402
from edge_rsvlm.tasks.match import Matcher  # noqa: E402
from edge_rsvlm.tasks.text import Texts  # noqa: E402
from edge_rsvlm.tiles.prepare import prepare  # noqa: E402
from tests import tiny_checkpoints, tiny_generators  # noqa: E402
from tests.onnx_exports import Tower, export, load, made_in, without_weights  # noqa: E402
from tests.onnx_graphs import decoder_graph, embed_graph, save  # noqa: E402

MEMORY = {"session_bytes": 1, "tile_bytes": 1}
QUESTION = "how many airplanes are there?"


def scene(height, width):
    """Blobs, so that what a resize keeps differs from place to place."""
    noise = np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC))


@pytest.fixture
def made(tmp_path_factory):
    return partial(made_in, tmp_path_factory.getbasetemp())


def sessions_of(taken, out):
    out.mkdir(exist_ok=True)
    files = taken.write(out)
    for name, content in taken.description.files.items():
        (out / name).write_bytes(content)
    engine = OnnxRuntimeEngine()
    caches = frozenset()
    if "decoder" in files:
        caches = frozenset(cache_names(generate_task(taken, "ask").decoder.cache).values())
    return {
        name: RoleSession(
            engine.open(out / file), Graph(file=file, precision="f32", **taken.description.graphs[name]), caches
        )
        for name, file in files.items()
    }


def generate_task(taken, verb):
    return GenerateTask.model_validate({**taken.description.tasks[verb], "memory": MEMORY})


def matcher(taken, out, verb="search"):
    task = MatchTask.model_validate({**taken.description.tasks[verb], "memory": MEMORY})
    sessions = sessions_of(taken, out)
    texts = Texts(task.text.tokenizer, out / task.text.tokenizer.file)
    return task, Matcher(task, sessions[task.encoder], sessions[task.text.graph], texts)


def check_matcher(export, taken, out):
    """Embeddings and class scores as transformers computes them."""
    task, match = matcher(taken, out, "classify")
    pixels = np.random.default_rng(1).normal(size=(3, 3, 64, 64)).astype(np.float32)
    labels = ["a cat", "an airport at night", "ships"]
    prompts = [task.label_prompt.format(label=label) for label in labels]
    tokenizer = load_tokenizer(export.folder, export.source.config)
    padding = "max_length" if task.score == "sigmoid" else "longest"
    longest = task.text.tokenizer.max_length
    tokens = tokenizer(prompts, padding=padding, max_length=longest, truncation=True, return_tensors="pt")
    names = ("input_ids", "attention_mask") if task.score == "softmax" else ("input_ids",)
    tokens = {name: tokens[name] for name in names}
    with torch.inference_mode():
        wanted = export.model(pixel_values=torch.from_numpy(pixels), **tokens)
    images_ND = match.images(pixels)
    np.testing.assert_allclose(images_ND, wanted.image_embeds, atol=1e-5)
    np.testing.assert_allclose(match.texts(prompts), wanted.text_embeds, atol=1e-5)
    logits = wanted.logits_per_image
    scores = logits.sigmoid() if task.score == "sigmoid" else logits.softmax(-1)
    np.testing.assert_allclose(match.scores(images_ND, labels), scores, atol=1e-4)


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_a_dual_encoder_in_one_graph_is_cut_in_two(made, tmp_path, name):
    export = made(name)
    taken = read_onnx_folder(export.folder)
    assert taken.description.graphs["image_encoder"]["inputs"] == {"tiles": "pixel_values"}
    check_matcher(export, taken, tmp_path)
    whole, halves = export.folder / "onnx" / "model.onnx", list(tmp_path.glob("*.onnx"))
    assert len(halves) == 2
    assert sum(path.stat().st_size for path in halves) < 1.05 * whole.stat().st_size, "each half has its own weights"


def test_both_halves_share_external_data(made, tmp_path):
    folder = Path(shutil.copytree(made("clip").folder, tmp_path / "copy"))
    path = folder / "onnx" / "model.onnx"
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="model.onnx_data")
    export = SimpleNamespace(**{**vars(made("clip")), "folder": folder})
    check_matcher(export, read_onnx_folder(folder), tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "image_encoder.onnx", "text_encoder.onnx", "model.onnx_data", "tokenizer.json"
    }  # fmt: skip
    (folder / "onnx" / "model.onnx_data").unlink()
    with pytest.raises(InputError, match=r"model\.onnx_data"):
        read_onnx_folder(folder).write(tmp_path / "out")


def test_two_towers_rank_and_classify_only_with_the_trained_scale(tmp_path):
    folder = tiny_checkpoints.clip(tmp_path)
    source, model = load(folder, Clip())
    export(Tower(model, "image"), folder / "vision_model.onnx", {"pixel_values": torch.randn(2, 3, 64, 64)},
           ["image_embeds"], {"pixel_values": (0,)})  # fmt: skip
    export(Tower(model, "text"), folder / "text_model.onnx", {"input_ids": torch.full((2, 9), 5)},
           ["text_embeds"], {"input_ids": (0, 1)})  # fmt: skip
    check_matcher(SimpleNamespace(folder=folder, source=source, model=model), read_onnx_folder(folder), tmp_path / "a")
    without_weights(folder)
    taken = read_onnx_folder(folder)
    assert taken.description.tasks.keys() == {"search"}
    out = tmp_path / "b"
    _, match = matcher(taken, out)
    assert match.texts(["a cat"]).shape == (1, 16)
    assert (out / "text_model.onnx").read_bytes() == (folder / "text_model.onnx").read_bytes()


@pytest.mark.parametrize(("name", "size_hw"), [("smolvlm", (200, 130)), ("smolvlm", (60, 60)), ("llava", (90, 130))])
def test_generation_says_what_transformers_says(made, tmp_path, name, size_hw):
    export, image_HWC = made(name), scene(*size_hw)
    taken = read_onnx_folder(export.folder)
    task, sessions = generate_task(taken, "ask"), sessions_of(taken, tmp_path)
    task = task.model_copy(update={"max_tokens": 16})
    roles = frozenset(taken.description.graphs["decoder"]["inputs"])
    assert roles == {"inputs_embeds", "attention_mask", "position_ids"}
    generator = Generator(
        task, Vision(sessions["image"], None),
        OnnxLanguage(task.decoder, sessions["embed"], sessions["decoder"], roles), tmp_path / "tokenizer.json",
    )  # fmt: skip
    image = prepare(image_HWC, task.input.prepare, task.input.mean, task.input.std)
    tokens = export.family.reference(export.source, export.model, image_HWC, QUESTION)["tokens"]
    tokenizer = load_tokenizer(export.folder, export.source.config)
    said = generator([image, image], QUESTION)
    assert said == [tokenizer.decode(tokens, skip_special_tokens=True).strip()] * 2
    assert len(said[0]) > 5


def test_files_that_fit_are_copied_unchanged(made, tmp_path):
    export = made("llava")
    files = read_onnx_folder(export.folder).write(tmp_path)
    for file in files.values():
        assert (tmp_path / file).read_bytes() == (export.folder / "onnx" / file).read_bytes()


def test_links_of_a_cache_become_files(made, tmp_path):
    folder = tmp_path / "snapshot"
    shutil.copytree(made("llava").folder, folder, ignore=lambda *_: ["onnx"])
    (folder / "onnx").mkdir()
    for path in (made("llava").folder / "onnx").iterdir():
        (folder / "onnx" / path.name).symlink_to(path)
    (tmp_path / "out").mkdir()
    for file in read_onnx_folder(folder).write(tmp_path / "out").values():
        assert not (tmp_path / "out" / file).is_symlink() and (tmp_path / "out" / file).stat().st_size > 0


def test_patches_are_those_of_qwens_image_processor(tmp_path):
    folder = tiny_generators.qwen(tmp_path / "qwen")
    width, numbers = 48, 3 * 2 * 14 * 14
    mean = np.random.default_rng(0).normal(size=(4 * numbers, width)).astype(np.float32) / 50
    token = [
        helper.make_node("Reshape", ["pixel_values", "by_token"], ["joined"]),
        helper.make_node("MatMul", ["joined", "weights"], ["mixed"]),
        helper.make_node("Cast", ["grid_thw"], ["grid"], to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["grid"], ["total"], keepdims=0),
        helper.make_node("Add", ["mixed", "total"], ["image_features"]),
    ]
    weights = [
        numpy_helper.from_array(mean, "weights"),
        numpy_helper.from_array(np.array([-1, 4 * numbers]), "by_token"),
    ]
    inputs = [
        helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["patches", numbers]),
        helper.make_tensor_value_info("grid_thw", TensorProto.INT64, ["images", 3]),
    ]
    outputs = [helper.make_tensor_value_info("image_features", TensorProto.FLOAT, ["tokens", width])]
    save(folder / "vision_encoder.onnx", token, inputs, outputs, weights)
    embed_graph(folder, width)
    decoder_graph(folder, position_rank=3)
    taken = read_onnx_folder(folder)
    task, sessions = generate_task(taken, "ask"), sessions_of(taken, tmp_path / "out")
    image_HWC = scene(90, 200)
    found = load_image_processor(folder)(Image.fromarray(image_HWC), return_tensors="np")
    patches, (grid,) = found["pixel_values"], found["image_grid_thw"]
    wanted = patches.reshape(-1, 4 * numbers) @ mean + grid.sum() * 2  # for two images
    tiles = prepare(image_HWC, task.input.prepare, task.input.mean, task.input.std).pixels_KCHW
    assert tiles.shape[2:] == (14 * grid[1], 14 * grid[2]) and grid[1] != grid[2]
    (features,) = sessions["image"].run({"tiles": np.concatenate([tiles, tiles])}, ["features"])
    assert features.shape == (2, len(wanted), width)
    # Prepared pixels may be off by one of 255 levels.
    np.testing.assert_allclose(features, np.stack([wanted, wanted]), atol=0.05)
    assert task.positions == "mrope" and task.decoder.cache.layers == 2


def test_a_cut_keeps_what_subgraphs_read_and_no_more():
    branch = helper.make_graph(
        [helper.make_node("Add", ["a", "w1"], ["chosen"])], "yes",
        [], [helper.make_tensor_value_info("chosen", TensorProto.FLOAT, None)],
    )  # fmt: skip
    other = helper.make_graph(
        [helper.make_node("Identity", ["w2"], ["chosen2"])], "no",
        [], [helper.make_tensor_value_info("chosen2", TensorProto.FLOAT, None)],
    )  # fmt: skip
    value = helper.make_tensor_value_info
    weights = [numpy_helper.from_array(np.array([n], np.float32), f"w{n}") for n in (1, 2, 3)]
    graph = helper.make_graph(
        [
            helper.make_node("If", ["flag"], ["y"], then_branch=branch, else_branch=other),
            helper.make_node("Add", ["b", "w3"], ["z"]),
        ],
        "made",
        [value("flag", TensorProto.BOOL, []), value("a", TensorProto.FLOAT, [1]), value("b", TensorProto.FLOAT, [1])],
        [value("y", TensorProto.FLOAT, [1]), value("z", TensorProto.FLOAT, [1])],
        weights,
    )
    part = cut(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), ["y"])
    assert list(inputs_of(part)) == ["flag", "a"]
    assert {tensor.name for tensor in part.graph.initializer} == {"w1", "w2"}
    onnx.checker.check_model(part)


def test_an_export_by_optimum(tmp_path):
    """Optimum's exporter wants an older transformers: an environment of its own, which borrows torch from this one."""
    if os.environ.get("EDGE_RSVLM_SLOW") != "1":
        pytest.skip("needs slow: set EDGE_RSVLM_SLOW=1 to install optimum and export with it (a minute)")
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    tiny_checkpoints.as_4x(tiny_checkpoints.clip(checkpoint))
    venv, out = tmp_path / "venv", tmp_path / "exported"
    run(sys.executable, "-m", "venv", str(venv))
    (site,) = venv.glob("lib/python*/site-packages")
    (site / "borrowed.pth").write_text(str(Path(torch.__file__).parents[1]))
    python = str(venv / "bin" / "python")
    run(python, "-m", "pip", "install", "-q", "--no-deps", "optimum==2.1.0", "optimum-onnx==0.1.0",
        "transformers==4.57.6", "huggingface_hub==0.36.2", "tokenizers==0.22.2", "requests", "urllib3",
        "charset_normalizer")  # fmt: skip
    task = ("--task", "zero-shot-image-classification")
    run(python, "-m", "optimum.exporters.onnx", "-m", str(checkpoint), *task, str(out))
    source, model = load(checkpoint, Clip())
    check_matcher(SimpleNamespace(folder=out, source=source, model=model), read_onnx_folder(out), tmp_path / "taken")


def run(*command):
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
