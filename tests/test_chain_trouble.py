"""Exports that are killed, altered on the way, or asked for what cannot be: nothing wrong comes out, and it is said."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the export extra is not installed")
transformers = pytest.importorskip("transformers", reason="the export extra is not installed")
peft = pytest.importorskip("peft", reason="needs peft: not installed")
onnx = pytest.importorskip("onnx", reason="the export extra is not installed")
pytest.importorskip("onnxscript", reason="the export extra is not installed")

from click.testing import CliRunner  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from edge_rsvlm.cli import cli  # noqa: E402
from edge_rsvlm.errors import EdgeRsvlmError  # noqa: E402
from edge_rsvlm.export.artifact import file_hash  # noqa: E402
from edge_rsvlm.export.graphs import external_data  # noqa: E402
from edge_rsvlm.export.steps import merge_lora, parity  # noqa: E402
from tests import tiny_checkpoints, tiny_generators  # noqa: E402
from tests import transformers_says as says  # noqa: E402

SLOW = os.environ.get("EDGE_RSVLM_SLOW") == "1"
VISION = "vision_model.encoder.layers.1.self_attn.v_proj"
WORDS = "text_model.encoder.layers.0.mlp.fc2"
UNSEEN = "visual_projection"
"""Scaled, it changes no embedding of unit length."""


def run(*arguments):
    return CliRunner().invoke(cli, ["export", "run", *(str(argument) for argument in arguments)])


def trouble(*arguments):
    """(exit code, message) of an export that stops."""
    error = run(*arguments).exception
    assert isinstance(error, EdgeRsvlmError), error
    return error.exit_code, str(error)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return tiny_checkpoints.clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def adapter(clip, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    config = peft.LoraConfig(r=3, target_modules=["v_proj", "fc2", "visual_projection"])
    model = peft.get_peft_model(says.model_of(clip), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return folder


def recipe_in(folder, checkpoint, adapter):
    path = folder / "recipe.toml"
    path.write_text(
        f'version = 1\ncheckpoint = "{checkpoint}"\nout = "out"\nwork = "work"\n[[adapters]]\npath = "{adapter}"\n'
    )
    return path


@pytest.fixture(scope="module")
def finished(clip, adapter, tmp_path_factory):
    """The recipe of an export that is done, its steps beside it."""
    recipe = recipe_in(tmp_path_factory.mktemp("finished"), clip, adapter)
    done = run(recipe)
    assert done.exit_code == 0, done.exception
    return recipe


@pytest.fixture
def copied(finished, tmp_path):
    shutil.copytree(finished.parent, tmp_path, dirs_exist_ok=True)
    return tmp_path / finished.name


def scale_merged(folder, layer):
    path = folder / "merged.safetensors"
    tensors = load_file(path)
    tensors[f"{layer}.weight"] = tensors[f"{layer}.weight"] * 100
    save_file(tensors, path)


def scale_compiled(folder, layer):
    path = folder / "bundle" / ("text_encoder.onnx" if layer.startswith("text") else "image_encoder.onnx")
    model = onnx.load(path)
    (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == f"{layer}.weight"]
    tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * np.float32(100), tensor.name))
    onnx.save(model, path)
    manifest = path.parent / "manifest.json"
    fields = json.loads(manifest.read_text())
    fields["files"][path.name] = {"sha256": file_hash(path), "bytes": path.stat().st_size}
    manifest.write_text(json.dumps(fields))


def own_up(folder):
    """Hashes of what is there now, as if the step had written it."""
    path = folder / "artifact.json"
    manifest = json.loads(path.read_text())
    for name, entry in manifest["files"].items():
        entry |= {"sha256": file_hash(folder / name), "bytes": (folder / name).stat().st_size}
    path.write_text(json.dumps(manifest))


ALTERED = [("merge_lora", scale_merged), ("compile_onnx", scale_compiled)]


@pytest.mark.parametrize(("step", "scale"), ALTERED)
def test_an_altered_step_is_refused_and_its_tensor_named(copied, step, scale):
    scale(copied.parent / "work" / step, VISION)
    code, message = trouble(copied, "--allow", "parity")
    assert code == 3
    assert f"({VISION}.weight)" in message and "remove that folder" in message


SCALED = [(step, layer) for step in ALTERED for layer in (VISION, WORDS, UNSEEN)]


@pytest.mark.parametrize(("step", "layer"), SCALED if SLOW else [SCALED[0], SCALED[5]])
def test_a_layer_scaled_after_the_merge_stops_the_export_by_name(copied, step, layer):
    step, scale = step
    scale(copied.parent / "work" / step, layer)
    own_up(copied.parent / "work" / step)
    bundle = (copied.parent / "out" / "manifest.json").read_bytes()
    code, message = trouble(copied)
    assert code == 5
    if layer != UNSEEN:
        assert f"first off: {layer}, " in message
    assert f"not the checkpoint's: {layer}.weight, error 99" in message and "--allow parity" in message
    assert (copied.parent / "out" / "manifest.json").read_bytes() == bundle  # the one before stands
    if not SLOW and layer == UNSEEN:
        return
    done = run(copied, "--allow", "parity")
    assert done.exit_code == 0, done.exception
    steps = json.loads((copied.parent / "out" / "manifest.json").read_text())["steps"]
    assert {step["step"]: step["allowed"] for step in steps} == {
        "checkpoint": [], "merge_lora": [], "compile_onnx": [], "parity": ["parity"],
    }  # fmt: skip


def test_what_passes_was_not_let_through(copied):
    assert run(copied, "--allow", "parity").exit_code == 0
    steps = json.loads((copied.parent / "out" / "manifest.json").read_text())["steps"]
    assert not any(step["allowed"] for step in steps)


def test_a_wrong_merge_is_found_by_what_the_adapter_does_unmerged(clip, adapter, tmp_path, monkeypatch):
    right = merge_lora.merge
    monkeypatch.setattr(merge_lora, "merge", lambda tensor, *more: 100 * right(tensor, *more))
    code, message = trouble(recipe_in(tmp_path, clip, adapter))
    assert (
        code == 5
        and "not the checkpoint's: text_model" in message
        and "image_encoder: first off: vision_model.encoder.layers.0." in message
    )
    assert not (tmp_path / "out").exists()


def test_weights_beside_the_graph_are_named_too(clip, adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(external_data, "EMBEDDED_BYTES", 0)
    recipe = recipe_in(tmp_path, clip, adapter)
    assert run(recipe).exit_code == 0
    compiled = tmp_path / "work" / "compile_onnx"
    model = onnx.load(compiled / "bundle" / "text_encoder.onnx", load_external_data=False)
    (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == f"{WORDS}.weight"]
    place = {entry.key: entry.value for entry in tensor.external_data}
    data = compiled / "bundle" / place["location"]
    with data.open("r+b") as file:
        file.seek(int(place["offset"]) + 8)
        byte = file.read(1)
        file.seek(int(place["offset"]) + 8)
        file.write(bytes([byte[0] ^ 1]))
    code, message = trouble(recipe)
    assert code == 3 and f"{data.name} ({WORDS}.weight)" in message


# Killed


def process(recipe):
    command = [str(Path(sys.executable).with_name("edge-rsvlm")), "export", "run", str(recipe)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def kill_at(recipe, line):
    """Start the export, and kill it when it says this; returns what it said."""
    said = []
    with process(recipe) as export:
        for text in export.stderr:
            said.append(text.strip())
            if said[-1] == line:
                export.send_signal(signal.SIGKILL)
        assert export.wait() == -signal.SIGKILL, said
    return said


def steps_made(work):
    """When each finished step was made."""
    return {path.parent.name: path.stat().st_mtime_ns for path in work.glob("[a-z]*/artifact.json")}


def content(folder):
    """Bytes of a bundle by file, but for what was measured, which differs from run to run."""
    found = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    manifest = json.loads(found.pop(Path("manifest.json")))
    for task in filter(None, manifest["tasks"].values()):
        assert task.pop("memory")["measured"]
    return found, manifest


MOMENTS = (
    "merge_lora",
    "compile_onnx image_encoder",
    "compile_onnx text_encoder",
    "parity text_encoder",
    "make_bundle",
)


def test_a_killed_export_goes_on_where_it_stopped(clip, adapter, finished, tmp_path):
    recipe, work = recipe_in(tmp_path, clip, adapter), tmp_path / "work"
    before: dict[str, int] = {}
    for moment in MOMENTS if SLOW else MOMENTS[3:4]:
        kill_at(recipe, moment)
        assert not (tmp_path / "out").exists()
        now = steps_made(work)
        assert now | before == now, "a finished step was made again"
        before = now
    assert {"checkpoint", "merge_lora", "compile_onnx"} <= before.keys()
    assert run(recipe).exit_code == 0
    after = steps_made(work)
    assert after | before == after and {path.name for path in work.iterdir()} == after.keys()
    assert content(tmp_path / "out") == content(finished.parent / "out")


def test_a_full_disk_leaves_nothing_half_made(clip, adapter, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", "probe.npz")

    monkeypatch.setattr(parity.np, "savez_compressed", full)
    recipe = recipe_in(tmp_path, clip, adapter)
    code, message = trouble(recipe)
    assert code == 2 and "probe.npz: No space left on device; make room" in message
    assert {path.name for path in (tmp_path / "work").iterdir()} == {"checkpoint", "merge_lora", "compile_onnx"}
    assert {path.name for path in tmp_path.iterdir()} == {"recipe.toml", "work"}


# Misused


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def remove(*patterns):
    def apply(folder):
        for pattern in patterns:
            for path in folder.glob(pattern):
                path.unlink()

    return apply


BAD_CHECKPOINTS = {
    "nothing": (shutil.rmtree, 3, "no config.json"),
    "no tokenizer": (remove("tokenizer*"), 2, "neither tokenizer.json nor"),
    "no preprocessor": (remove("processor_config.json"), 2, "add the preprocessor_config.json"),
    "no weights": (remove("*.safetensors"), 3, "no weights in"),
    "unknown": (
        lambda folder: edit(folder / "config.json", model_type="bert", architectures=["BertModel"]),
        2,
        "type 'bert' cannot be exported; known types are align, blip-2, clip,",
    ),
    "quantized": (
        lambda folder: edit(folder / "config.json", quantization_config={"quant_method": "bitsandbytes"}),
        3,
        "holds quantized weights",
    ),
}


@pytest.mark.parametrize("case", BAD_CHECKPOINTS)
def test_checkpoints_that_cannot_be_used(case, clip, tmp_path):
    spoil, code, words = BAD_CHECKPOINTS[case]
    folder = shutil.copytree(clip, tmp_path / "checkpoint")
    spoil(folder)
    assert_refused(folder, tmp_path, code, words)


def assert_refused(folder, tmp_path, code, words, *more):
    """In one line, before anything is written."""
    found, message = trouble("--checkpoint", folder, "--out", tmp_path / "out", *more)
    assert (found, words in message, "\n" in message) == (code, True, False), message
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out-export").exists()


def test_adapters_that_cannot_be_used(clip, adapter, tmp_path):
    other = shutil.copytree(adapter, tmp_path / "other")
    tensors = load_file(other / "adapter_model.safetensors")
    save_file(
        {key.replace("vision_model", "sound_model"): value for key, value in tensors.items()},
        other / "adapter_model.safetensors",
    )
    assert_refused(clip, tmp_path, 3, "this model has no place for 'sound_model.", "--adapter", other)
    extra = {f"{VISION}.surprise": torch.ones(3)}
    save_file(tensors | {f"base_model.model.{key}": value for key, value in extra.items()},
              other / "adapter_model.safetensors")  # fmt: skip
    assert_refused(clip, tmp_path, 3, f"{VISION}.surprise", "--adapter", other)
    assert_refused(clip, tmp_path, 3, "no adapter_config.json", "--adapter", clip)


def test_settings_of_generation_that_no_bundle_has_are_named(tmp_path):
    pytest.importorskip("sentencepiece", reason="Llama's tokenizer is a sentencepiece model")
    folder = tiny_generators.qwen(tmp_path / "qwen")
    edit(folder / "generation_config.json", suppress_tokens=[5])
    assert_refused(folder, tmp_path, 2, "generation_config.json sets 'suppress_tokens'")


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("taken", "no bundle that could be replaced"),
        ("taken/file/out", "takes no new files"),
        ("clip/out", "lies in the checkpoint"),
    ],
)
def test_places_that_cannot_be_written_or_must_not(out, words, clip, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    (tmp_path / "clip").symlink_to(clip)
    code, message = trouble("--checkpoint", clip, "--out", tmp_path / out)
    assert code == 2 and words in message
    assert (tmp_path / "taken" / "file").read_text() == "mine"


def test_what_will_not_fit_the_device_is_said_before_the_work(clip, tmp_path, monkeypatch):
    from edge_rsvlm.export import explain

    monkeypatch.setattr(explain.profiles, "load", lambda name: {"memory_bytes": 1 << 16})
    shown = run("--checkpoint", clip, "--out", tmp_path / "out", "--profile", "jetson-orin-nano-8gb", "--explain")
    assert "DOES NOT FIT" in shown.stdout and not list(tmp_path.iterdir())
    (tmp_path / "out").write_text("not a bundle")
    done = run("--checkpoint", clip, "--out", tmp_path / "out", "--profile", "jetson-orin-nano-8gb")
    assert done.stderr.startswith("warning: onnx:f32 on jetson-orin-nano-8gb: about")
    assert "no bundle that could be replaced" in str(done.exception)  # the work would have begun


def test_unknown_words_on_the_command_line(clip, tmp_path):
    assert trouble("--checkpoint", clip, "--out", tmp_path / "out", "--profile", "toaster")[0] == 2
    assert run("--checkpoint", clip, "--out", tmp_path / "out", "--allow", "everything").exit_code == 2
    assert trouble("--checkpoint", clip)[0] == 2
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('version = 1\ncheckpoint = "c"\nout = "o"\nallow = ["everything"]\n')
    assert trouble(recipe)[0] == 2
