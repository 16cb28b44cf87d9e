"""Projector files: what libmtmd sees by them against transformers, pixels to logits; and tasks pointed at them."""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch: not installed")
pytest.importorskip("transformers", reason="needs transformers: not installed")
pytest.importorskip("sentencepiece", reason="needs sentencepiece: not installed")
gguf = pytest.importorskip("gguf", reason="needs gguf: not installed")
pytest.importorskip("llama_cpp", reason="needs llama_cpp: not installed")

from click.testing import CliRunner  # noqa: E402
from PIL import Image  # noqa: E402

from edge_rsvlm.cli import cli  # noqa: E402
from edge_rsvlm.config.manifest import Manifest  # noqa: E402
from edge_rsvlm.config.task_specs import GenerateTask, GgufTask  # noqa: E402
from edge_rsvlm.engines.llama import LlamaLanguage  # noqa: E402
from edge_rsvlm.engines.llama_vision import LlamaVision  # noqa: E402
from edge_rsvlm.errors import UsageError  # noqa: E402
from edge_rsvlm.export.default.family import Default  # noqa: E402
from edge_rsvlm.export.families.base import Description  # noqa: E402
from edge_rsvlm.export.families.generation import PARITY_TOKENS  # noqa: E402
from edge_rsvlm.export.families.image_processors import load_image_processor  # noqa: E402
from edge_rsvlm.export.gguf.projector import can_see, prompt_around, write_projector  # noqa: E402
from edge_rsvlm.export.recipe import Recipe  # noqa: E402
from edge_rsvlm.export.steps import quantize as step  # noqa: E402
from edge_rsvlm.export.steps.compile_gguf import (  # noqa: E402
    FILE,
    PROJECTOR_FILE,
    LanguageWriter,
    context_tokens,
    decoder_graph,
)
from edge_rsvlm.tasks.gguf import GgufGenerator, eight_bits  # noqa: E402
from edge_rsvlm.tasks.search import Sampling  # noqa: E402
from edge_rsvlm.tiles.prepare import prepare  # noqa: E402
from tests import tiny_generators as tiny  # noqa: E402
from tests.gguf_models import Made, read, relative  # noqa: E402

QUESTION = "how many ships are there?"
SIZES_HW = ((90, 130), (200, 56), (33, 310))
MEMORY = {"session_bytes": 1, "tile_bytes": 1}


def paragraphs(folder: Path) -> Path:
    """The last word of the tokenizer becomes the end of a paragraph, which Idefics3's tokenizers all have."""
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    words, merges = tokenizer["model"]["vocab"], tokenizer["model"]["merges"]
    words["ĊĊ"] = words.pop("".join(merges[-1]))
    merges[-1] = ["Ċ", "Ċ"]
    path.write_text(json.dumps(tokenizer))
    return folder


def siglip(folder: Path, **more) -> Path:
    return tiny.llava(folder, tower="siglip_vision_model", vision_feature_select_strategy="full", **more)


MAKERS = {
    "smolvlm": lambda folder: paragraphs(tiny.idefics3(folder, smol=True)),
    "idefics3": lambda folder: paragraphs(tiny.idefics3(folder)),
    "llava": siglip,
    "llava, last layer": lambda folder: siglip(folder, vision_feature_layer=-1),
    "qwen2_vl": tiny.qwen,
    "qwen2_5_vl": lambda folder: tiny.qwen(folder, version="qwen2_5_vl"),
    "qwen2_vl, 4.x": lambda folder: tiny.as_4x(tiny.qwen(folder)),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A family's checkpoint by name with its text model in F32, made once."""

    def make(name: str) -> Made:
        folder = MAKERS[name](tmp_path_factory.mktemp("checkpoint"))
        return read(folder, folder / FILE)

    return cache(make)


def task_of(case: Made, verb: str = "ask", kind: str = "F32") -> dict:
    """A task of the family's, pointed at llama.cpp's files."""
    fields = {"tasks": case.family.describe(case.source).tasks}
    for task in fields["tasks"].values():
        task["memory"] = MEMORY
    LanguageWriter(case.family, case.source, case.weights, "mmproj").point(fields, kind, 2048)
    return fields["tasks"][verb]


def scene(height: int, width: int) -> np.ndarray:
    noise = np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC))


def vision(case: Made, precision: str) -> LlamaVision:
    path = case.source.folder / f"{precision}-{PROJECTOR_FILE}"
    write_projector(case.family, case.source, case.weights, path, precision)
    return LlamaVision(LlamaLanguage(case.file, 2048, 1), path)


def image_features(case: Made, image_HWC: np.ndarray) -> np.ndarray:
    """Visual tokens [T, D] that transformers computes of its own processor's pixels."""
    given = load_image_processor(case.source.folder)(Image.fromarray(image_HWC), return_tensors="pt")
    names = ("pixel_values", "pixel_attention_mask", "image_grid_thw")
    with torch.no_grad():
        found = case.model.model.get_image_features(**{name: given[name] for name in names if name in given})
    found = getattr(found, "pooler_output", found)
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in found]).numpy()


@pytest.mark.parametrize("precision", ["F32", "F16"])
@pytest.mark.parametrize("name", MAKERS)
def test_images_are_seen_as_by_transformers(made, name, precision):
    """Same tokens, visual tokens within 0.5 %, and logits of the first token of the answer."""
    case = made(name)
    spec = GgufTask.model_validate(task_of(case))
    seeing = vision(case, precision)
    for height, width in SIZES_HW:
        image_HWC = scene(height, width)
        pixels_HWC = eight_bits(prepare(image_HWC, spec.input.prepare, spec.input.mean, spec.input.std))
        prompt = spec.prompt.replace("{image}", seeing.marker).replace("{text}", QUESTION)
        parts = list(seeing._parts(pixels_HWC, prompt))
        wanted = case.family.inputs(case.source, Image.fromarray(image_HWC), QUESTION)
        ids = wanted["input_ids"][0].numpy()
        visual = np.concatenate([np.full(len(part.ids_T), part.visual_TD is not None) for part in parts])
        np.testing.assert_array_equal(visual, ids == case.source.config.image_token_id)
        np.testing.assert_array_equal(np.concatenate([part.ids_T for part in parts])[~visual], ids[~visual])
        features_TD = np.concatenate([part.visual_TD for part in parts if part.visual_TD is not None])
        assert relative(features_TD, image_features(case, image_HWC)) <= 5e-3
        with torch.no_grad():
            logits_V = case.model(**wanted).logits[0, -1].numpy()
        assert relative(seeing.start(pixels_HWC, prompt)[0][0], logits_V) <= 5e-3


def test_tensor_types(made):
    """Half precision leaves vectors, the convolution and the positions as they are."""
    case = made("smolvlm")
    path = case.source.folder / "types.gguf"
    write_projector(case.family, case.source, case.weights, path, "F16")
    reader = gguf.GGUFReader(path)
    wide = {tensor.name for tensor in reader.tensors if tensor.tensor_type.name == "F32"}
    assert {"v.patch_embd.weight", "v.position_embd.weight", "v.post_ln.bias"} <= wide
    assert {tensor.name for tensor in reader.tensors} - wide == {
        "mm.model.fc.weight",
        *(
            f"v.blk.{n}.{part}.weight"
            for n in (0, 1)
            for part in ("attn_q", "attn_k", "attn_v", "attn_out", "ffn_up", "ffn_down")
        ),
    }
    assert reader.get_field("clip.projector_type").contents() == "idefics3"


def test_answers_are_those_of_the_manifest(made):
    """A task that a bundle would have answers as transformers generates."""
    case = made("qwen2_vl")
    spec = GgufTask.model_validate(task_of(case))
    image_HWC = scene(90, 130)
    prepared = prepare(image_HWC, spec.input.prepare, spec.input.mean, spec.input.std)
    (tokens,) = GgufGenerator(spec, vision(case, "F32")).tokens([prepared], QUESTION)
    wanted = case.family.reference(case.source, case.model, image_HWC, QUESTION)["tokens"]
    np.testing.assert_array_equal(tokens[: len(wanted)], wanted)


def test_tasks_point_at_both_files(made):
    case = made("qwen2_vl")
    task = GgufTask.model_validate(task_of(case, "ground", "Q4_K_M"))
    assert (task.model.file, task.model.quantization) == (FILE, "Q4_K_M")
    assert (task.projector.file, task.projector.quantization) == (PROJECTOR_FILE, "F16")
    assert task.boxes.open == "<|box_start|>"
    assert "<|im_start|>user\n{image}" in task.prompt  # libmtmd writes what goes around it
    assert task.input.prepare[0].min_pixels == 8 * 28 * 28  # below which libmtmd would resize


def test_text_models_alone_leave_the_graphs_that_see(made):
    case = made("llava")
    description = case.family.describe(case.source)
    graphs = {name: {"file": f"{name}.onnx", "precision": "f32", **roles} for name, roles in description.graphs.items()}
    fields = {
        "schema_version": 4, "name": "tiny", "version": 1, "description": "", "licence": "", "training_data": (),
        "graphs": graphs, "tasks": {verb: {**task, "memory": MEMORY} for verb, task in description.tasks.items()},
        "probe": (), "files": {},
    }  # fmt: skip
    manifest = Manifest.model_validate(fields)
    hybrid = LanguageWriter(case.family, case.source, case.weights)
    assert hybrid.replaces(manifest) == ("embed", decoder_graph(manifest)) == ("embed", "decoder")
    alone = LanguageWriter(case.family, case.source, case.weights, "mmproj")
    assert alone.replaces(manifest) == ("image", "embed", "decoder")
    detect = {
        "kind": "heat_map", "input": fields["tasks"]["ask"]["input"], "encoder": "image", "head": "embed",
        "encoder_outputs": ("features",), "classes": ("ship",), "stride": 4, "score_threshold": 0.5, "nms_iou": 0.5,
        "max_boxes_per_tile": 1, "memory": MEMORY,
    }  # fmt: skip
    shared = Manifest.model_validate(fields | {"tasks": fields["tasks"] | {"detect": detect}})
    assert alone.replaces(shared) == ("decoder",)
    recipe = Recipe(checkpoint=Path("tiny"), out=Path("out"), target="gguf:F16", precision={"decoder": "f16"})
    with pytest.raises(UsageError, match="names 'decoder', whose work"):
        step._replaced(hybrid, manifest, recipe)
    assert step._replaced(None, manifest, recipe) == ()
    hybrid.point(fields, "Q4_0", 600)
    assert fields["tasks"]["ask"]["decoder"] == {
        "kind": "gguf",
        "model": {"file": FILE, "quantization": "Q4_0"},
        "context_tokens": 600,
    }


def test_context_holds_the_largest_image(made):
    """Nine tiles and an overview, of 169 tokens each; then four and one."""
    task = made("smolvlm").family.describe(made("smolvlm").source).tasks["ask"] | {"memory": MEMORY}

    def tokens(longest_px: int, longest: int = 1 << 20) -> int:
        steps = [
            step | ({"px": longest_px} if step["op"] == "resize_longest" else {}) for step in task["input"]["prepare"]
        ]
        visual = task["visual"] | {"per_tile": 169}
        changed = task | {"visual": visual, "input": task["input"] | {"prepare": steps}}
        return context_tokens(GenerateTask.model_validate(changed), longest)

    assert tokens(300) == 10 * (169 + 8) + 512 + 128
    assert tokens(200) == 5 * (169 + 8) + 512 + 128
    assert tokens(300, 1000) == 1000


def test_memory_of_what_is_too_large_to_measure(tmp_path):
    """Graphs, the files of llama.cpp and its caches; a task of graphs alone has no such files."""
    (tmp_path / "image.onnx").write_bytes(bytes(1000))
    (tmp_path / FILE).write_bytes(bytes(20_000))
    (tmp_path / PROJECTOR_FILE).write_bytes(bytes(3000))
    large = {"session_bytes": 1, "measured": False}
    tasks = {
        "ask": {"context_tokens": 500, "memory": {**large}},
        "caption": {"decoder": {"context_tokens": 400}, "memory": {**large}},
        "detect": {"memory": {**large}},
    }
    step._estimate({"graphs": {"image": {"precision": "int8", "file": "image.onnx"}}, "tasks": tasks}, tmp_path, 8)
    found = {verb: task["memory"]["session_bytes"] for verb, task in tasks.items()}
    assert found == {"ask": 28_000 * 5 // 4, "caption": 27_200 * 5 // 4, "detect": 1000 * 5 // 4}


def test_what_libmtmd_sees_otherwise_is_refused(tmp_path):
    def reason(name: str, make, **how) -> str | None:
        folder = make(tmp_path / name, **how)
        case = read(folder, folder / FILE)
        found = can_see(case.family, case.source)
        if found is not None:
            with pytest.raises(UsageError, match=r'take \[gguf\] vision = "onnx"'):
                write_projector(case.family, case.source, case.weights, folder / PROJECTOR_FILE, "F32")
        return found

    assert "one token" in reason("lines", tiny.idefics3)
    assert "always splits" in reason("whole", lambda folder: paragraphs(tiny.idefics3(folder, split=False)))
    assert "clip_vision_model" in reason("clip", tiny.llava)
    assert "leaves out the first" in reason("first", lambda folder: tiny.llava(folder, tower="siglip_vision_model"))
    assert "reads one layer" in reason("layers", lambda folder: siglip(folder, vision_feature_layer=[-2, -1]))
    assert "GELU" in reason("relu", lambda folder: siglip(folder, projector_hidden_act="relu"))
    assert (
        can_see(Default(), None) == "llama.cpp cannot see for the family edge-rsvlm, but for idefics3, llava, qwen2_vl"
    )


def test_settings_that_change_pictures_or_words_are_refused(made, monkeypatch):
    case = made("qwen2_vl")
    vision_config = case.source.config.vision_config
    for name, value, message in (
        ("temporal_patch_size", 1, "joins 2 frames"),
        ("hidden_act", "gelu", "with gelu"),
        ("mlp_ratio", 1, "swapped"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(vision_config, name, value)
            assert message in can_see(case.family, case.source)
    newer = made("qwen2_5_vl")
    for name, value, message in (("window_size", 56, "112 px"), ("fullatt_block_indexes", [0, 2], "regular distances")):
        with monkeypatch.context() as patch:
            patch.setattr(newer.source.config.vision_config, name, value)
            assert message in can_see(newer.family, newer.source)
    with pytest.raises(UsageError, match="around an image"):
        prompt_around(case.family, case.source, "{image}{text}")


def test_check_tells_before_the_work(made, tmp_path, monkeypatch):
    case = read(tiny.llava(tmp_path / "clip"), tmp_path / FILE)
    LanguageWriter(case.family, case.source, case.weights).check()
    with pytest.raises(UsageError, match="confuses the patches"):
        LanguageWriter(case.family, case.source, case.weights, "mmproj").check()
    case = made("qwen2_vl")
    beams = Description({}, {"ask": {"beams": 3}}, {})
    monkeypatch.setattr(type(case.family), "describe", lambda *_: beams)
    with pytest.raises(UsageError, match="one beam"):
        LanguageWriter(case.family, case.source, case.weights, "mmproj").check()


def test_repetitions_are_penalised_as_by_transformers(tmp_path):
    """Greedy answers of 16 tokens, which the penalty of the checkpoint's own settings makes others."""
    folder = tiny.qwen(tmp_path / "qwen")
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"repetition_penalty": 1.4}))
    case = read(folder, tmp_path / "qwen.gguf")
    LanguageWriter(case.family, case.source, case.weights, "mmproj").check()
    spec, seeing, image_HWC = GgufTask.model_validate(task_of(case)), vision(case, "F32"), scene(*SIZES_HW[0])
    image = prepare(image_HWC, spec.input.prepare, spec.input.mean, spec.input.std)
    chosen = Sampling(0.0, max_tokens=PARITY_TOKENS)
    (found,) = GgufGenerator(spec, seeing).tokens([image], QUESTION, chosen)
    wanted = case.family.reference(case.source, case.model, image_HWC, QUESTION)["tokens"]
    np.testing.assert_array_equal(found, wanted)
    free = spec.model_copy(update={"repetition_penalty": 1.0})
    assert GgufGenerator(free, seeing).tokens([image], QUESTION, chosen)[0].tolist() != found.tolist()


@pytest.mark.skipif(not os.environ.get("EDGE_RSVLM_SLOW"), reason="needs EDGE_RSVLM_SLOW=1: a minute")
def test_whole_chain(tmp_path, monkeypatch):
    """Exported and asked on the command line: the answers of the graphs, and the same projector beside fewer bits."""
    pytest.importorskip("onnxscript", reason="needs onnxscript: not installed")
    for name, size in (("hidden_size", 64), ("intermediate_size", 96)):  # blocks of 32 numbers divide them
        monkeypatch.setitem(tiny.TEXT, name, size)
    folder = MAKERS["smolvlm"](tmp_path / "smol")
    Image.fromarray(scene(180, 240)).save(tmp_path / "scene.png")

    def answer(target: str, sees: str) -> tuple[Path, str]:
        out = tmp_path / f"{target}-{sees}".replace(":", "-")
        recipe = (
            f'version = 1\ncheckpoint = "{folder}"\ntarget = "{target}"\nout = "{out}"\n[gguf]\nvision = "{sees}"\n'
        )
        (tmp_path / "RECIPE.toml").write_text(recipe)
        assert CliRunner().invoke(cli, ["export", "run", str(tmp_path / "RECIPE.toml")]).exit_code == 0
        asked = ["ask", "--bundle", str(out), "--allow-unsigned", "--json", "--max-tokens", "12"]
        found = CliRunner().invoke(cli, [*asked, str(tmp_path / "scene.png"), QUESTION])
        assert found.exit_code == 0, found.output
        return out, json.loads(found.stdout)["answer"]

    _, by_graphs = answer("onnx:f32", "onnx")
    wide, by_llama = answer("gguf:F32", "mmproj")
    assert by_llama == by_graphs
    assert {path.name for path in wide.iterdir() if path.is_file()} == {FILE, PROJECTOR_FILE, "manifest.json"}
    small, _ = answer("gguf:Q8_0", "mmproj")
    assert not json.loads((small / "manifest.json").read_text())["graphs"]
    _, by_both = answer("gguf:F32", "onnx")
    assert by_both == by_graphs
