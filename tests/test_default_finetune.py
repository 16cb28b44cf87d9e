"""The default model's decoder, fine-tuned on other captions, and its export with the adapter."""

from __future__ import annotations

import io
import json
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch", reason="needs torch: not installed")
pytest.importorskip("transformers", reason="needs transformers: not installed")
peft = pytest.importorskip("peft", reason="needs peft: not installed")

from edge_rsvlm.bundle import load_bundle  # noqa: E402
from edge_rsvlm.errors import BundleError, InputError  # noqa: E402
from edge_rsvlm.export import artifact  # noqa: E402
from edge_rsvlm.export.adapters.reading import read_adapter  # noqa: E402
from edge_rsvlm.export.adapters.resolve import resolve  # noqa: E402
from edge_rsvlm.export.adapters.updates import merge  # noqa: E402
from edge_rsvlm.export.chain import run_export  # noqa: E402
from edge_rsvlm.export.checkpoint.reading import MemoryTensor  # noqa: E402
from edge_rsvlm.export.default import finetune as captions  # noqa: E402
from edge_rsvlm.export.default.checkpoint import DefaultModel  # noqa: E402
from edge_rsvlm.export.default.data import contents  # noqa: E402
from edge_rsvlm.export.default.data.captions import BOS_ID  # noqa: E402
from edge_rsvlm.export.default.model.language import TOKEN_CHANNELS  # noqa: E402
from edge_rsvlm.export.default.stages.features import tokens_of  # noqa: E402
from edge_rsvlm.export.finetuning.recipe import FinetuneRecipe, load_finetune_recipe  # noqa: E402
from edge_rsvlm.export.finetuning.run import finetune  # noqa: E402
from edge_rsvlm.export.finetuning.samples import read_samples  # noqa: E402
from edge_rsvlm.export.recipe import AdapterChoice, Recipe  # noqa: E402
from edge_rsvlm.export.steps import parity as parity_step  # noqa: E402
from edge_rsvlm.pipeline.runtime import Runtime, cpu_engine  # noqa: E402
from tests.default_stages import CUTS, write_stages  # noqa: E402

SAID = ("two ships in the left", "a harbour", "many airplanes, and a road", "no roofs")


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    return write_stages(tmp_path_factory.mktemp("stages"))


@pytest.fixture
def data(tmp_path):
    """A ``.tar`` of four images, and a JSONL that tells more of each than its captions."""
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        for number in range(len(SAID)):
            noise = np.random.default_rng(number).integers(0, 256, (5, 6, 3), dtype=np.uint8)
            file = io.BytesIO()
            Image.fromarray(noise).resize((130, 90)).save(file, "PNG")
            info = tarfile.TarInfo(f"{number}.png")
            info.size = file.tell()
            tar.addfile(info, io.BytesIO(file.getvalue()))
    lines = [{"image": f"{n}.png", "scene": "x", "captions": [f"{said} ."]} for n, said in enumerate(SAID)]
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return path


def recipe_of(stages, data, out, **changes):
    given = {"checkpoint": stages, "data": data, "images": data.with_suffix(".tar"), "out": out, "steps": 2, "batch": 4}
    return FinetuneRecipe(**{**given, **changes})


def greedy(model, tile, count):
    """Tokens of a caption, the whole sequence read anew for each."""
    tokens = []
    with torch.no_grad():
        seen = tokens_of(model.encoder(tile))
        for _ in range(count):
            tokens.append(int(model(seen, torch.tensor([[BOS_ID, *tokens]])).logits[0, -1].argmax()))
    return tokens


def test_fine_tuned_exported_and_equal_to_the_adapter_not_merged(stages, data, tmp_path, monkeypatch):
    adapter = finetune(recipe_of(stages, data, tmp_path / "lora", steps=30, rate=1e-2))
    log = json.loads((adapter / "training.json").read_text())
    assert log["samples"] == len(SAID) and log["losses"][-1] < 0.75 * log["losses"][0]
    assert not list(tmp_path.glob(".lora*"))
    assert len(read_adapter(adapter).factors) == 4 * 7

    adapters, out, work = (AdapterChoice(path=adapter),), tmp_path / "bundle", tmp_path / "work"
    recipe = Recipe(checkpoint=stages, target="onnx:f16", out=out, work=work, adapters=adapters)
    run_export(recipe, lambda *_: None)
    bundle = load_bundle(out, allow_unsigned=True, allow_older=True)
    manifest = bundle.manifest
    assert [step.step for step in manifest.steps] == ["checkpoint", "merge_lora", "compile_onnx", "parity"]
    assert manifest.name == "edge-rsvlm-default-lora" and not manifest.accuracy
    assert manifest.licence.startswith("research") and len(manifest.training_data) > 5
    assert {case.graph for case in manifest.probe} == set(manifest.graphs)
    assert manifest.tasks.detect.score_threshold == CUTS.detect and manifest.tasks.change.threshold == CUTS.change
    assert all(task.memory.measured for _, task in manifest.tasks if task is not None)

    torch.manual_seed(4)
    tile = torch.randn(1, 5, 256, 256)
    learnt = peft.PeftModel.from_pretrained(DefaultModel.from_pretrained(stages), adapter).eval()
    wanted = greedy(learnt, tile, 8)
    assert wanted != greedy(DefaultModel.from_pretrained(stages), tile, 8)
    runtime = Runtime(bundle, cpu_engine(1, 0))
    task = manifest.tasks.caption.model_copy(update={"beams": 1})
    image = type("Image", (), {"pixels_KCHW": tile.numpy(), "rows": 1, "cols": 1})()
    (tokens,) = runtime.generator("caption", task).tokens([image], "")
    assert tokens.tolist()[:8] == wanted[: len(tokens)]

    # The graphs are compared with the stages themselves, and not with what they were filled from.
    shutil.rmtree(work / "parity")
    monkeypatch.setattr(parity_step, "streamed_model", with_a_scaled_layer(parity_step.streamed_model))
    with pytest.raises(BundleError, match=r"first off: encoder\.stages\.1\.0\.layers\.1\.conv"):
        run_export(recipe, lambda *_: None)


def with_a_scaled_layer(streamed_model):
    def make(model_class, config, tensors):
        name = "encoder.stages.1.0.layers.1.conv.weight"
        values = tensors[name].read().float() * 100
        return streamed_model(model_class, config, {**tensors, name: MemoryTensor(values)})

    return make


def test_adapters_merge_into_what_peft_computes(stages, tmp_path):
    model = DefaultModel.from_pretrained(stages)
    modules = r"language\..*\.(q_proj|down_proj|project)"
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=12, use_rslora=True, target_modules=modules))
    for name, values in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(values, std=0.2)
    wrapped.save_pretrained(tmp_path / "lora")
    merged = DefaultModel.from_pretrained(stages)
    found = resolve([read_adapter(tmp_path / "lora")], merged)
    assert len(found.updates) == 9 and not found.untied and not found.notes
    merged.load_state_dict({k: merge(v, found.updates.get(k, ())) for k, v in merged.state_dict().items()})
    seen, ids = torch.randn(2, TOKEN_CHANNELS, 3, 4), torch.randint(0, 200, (2, 6))
    with torch.no_grad():
        torch.testing.assert_close(merged(seen, ids).logits, wrapped(seen, ids).logits, atol=1e-4, rtol=1e-4)


def test_features_are_computed_once(stages, data, tmp_path, monkeypatch):
    calls = []
    true = captions.caption_view
    monkeypatch.setattr(captions, "caption_view", lambda scenes, i, v: calls.append((i, v)) or true(scenes, i, v))

    class Killed(Exception):
        pass

    def kill(step, done, loss):
        if step == 4:
            raise Killed

    recipe = recipe_of(stages, data, tmp_path / "lora", steps=8)
    with pytest.raises(Killed):
        finetune(recipe, kill)
    finetune(recipe)
    assert len(calls) == len(set(calls)) and {view for _, view in calls} > {0}
    assert {view for image, view in calls if image == 0} == {0}, "left is not left in another view"


def test_samples_that_the_device_would_see_otherwise_are_refused(stages, data, tmp_path):
    model = DefaultModel.from_pretrained(stages)
    Image.new("RGB", (513, 20)).save(tmp_path / "wide.png")
    data.write_text('{"image": "wide.png", "caption": "a road"}\n')
    samples = read_samples(data)
    encoder = captions.CaptionEncoder(stages, model, samples, tmp_path / "tokens.f16")
    with pytest.raises(InputError, match=r"jsonl:1: .*wide\.png is 513 x 20.*at most 512"):
        encoder(captions.viewed(samples)[0])
    data.write_text('{"image": "wide.png", "question": "a road?", "answer": "yes"}\n')
    with pytest.raises(InputError, match="captions only"):
        finetune(recipe_of(stages, data, tmp_path / "lora", images=None))


def test_images_are_in_a_folder_or_an_archive(data, tmp_path):
    samples = read_samples(data, data.with_suffix(".tar"))
    assert [sample.answer for sample in samples] == [f"{said} ." for said in SAID]
    with pytest.raises(InputError, match="no file"):
        read_samples(data)
    (tmp_path / "no.tar").write_bytes(b"x" * 2000)
    with pytest.raises(InputError, match=r"cannot read .*no\.tar"):
        read_samples(data, tmp_path / "no.tar")
    toml = tmp_path / "FINETUNE.toml"
    toml.write_text('version = 1\ncheckpoint = "c"\ndata = "d.jsonl"\nimages = "i.tar"\nout = "o"\nsteps = 2\n')
    assert load_finetune_recipe(toml).images == tmp_path / "i.tar"


def test_contents_leave_out_what_validation_shows(needs, tmp_path):
    backbone = artifact.Artifact(tmp_path, {"metrics": {"ucm_left_out": ["agricultural00.webp"]}})
    contents.write(needs("data", "ucm_captions").parent, backbone, tmp_path)
    train, val = ((tmp_path / f"{part}.jsonl").read_text().splitlines() for part in ("train", "val"))
    assert (len(train), len(val)) == (1679, 210)
    assert json.loads(train[0]) == {"image": "agricultural01.webp", "captions": ["field"]}
    assert "bare soil, buildings, cars, pavement, trees" in "\n".join(val)
