"""A model and a projector made for llama.cpp, as hubs ship them, become a bundle that answers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs torch: not installed")
pytest.importorskip("transformers", reason="needs transformers: not installed")
pytest.importorskip("onnxscript", reason="needs onnxscript: not installed")
gguf = pytest.importorskip("gguf", reason="needs gguf: not installed")
pytest.importorskip("llama_cpp", reason="needs llama_cpp: not installed")

from click.testing import CliRunner  # noqa: E402

import edge_rsvlm  # noqa: E402
from edge_rsvlm.cli import cli  # noqa: E402
from edge_rsvlm.errors import EdgeRsvlmError, InputError, UsageError  # noqa: E402
from edge_rsvlm.export.gguf.pair import GgufSource, Pair, read_pair, read_source  # noqa: E402
from edge_rsvlm.export.gguf.template import expand  # noqa: E402
from edge_rsvlm.export.recipe import Recipe  # noqa: E402
from edge_rsvlm.export.steps.take_gguf import take_gguf  # noqa: E402
from tests import tiny_gguf  # noqa: E402
from tests.tiny_gguf import EYE, TEMPLATE, TINY  # noqa: E402

SCENE = Path(edge_rsvlm.__file__).parent / "scenes" / "marina.webp"
LONG = dataclasses.replace(TINY, context=2048)
MODEL, PROJECTOR = "tiny-F32.gguf", "mmproj-tiny-F32.gguf"


def pair(folder: Path, size=LONG, **text) -> Path:
    folder.mkdir(exist_ok=True)
    tiny_gguf.write_text(folder / MODEL, tiny_gguf.text_weights(size), size, **text)
    tiny_gguf.write_projector(folder / PROJECTOR)
    return folder


def run(*arguments: object):
    return CliRunner().invoke(cli, [str(a) for a in arguments], standalone_mode=False)


def export(folder: Path, *more: object):
    return run("export", "run", "--checkpoint", folder, "--out", folder.parent / "bundle", *more)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """With boxes, so that all three verbs are there."""
    folder = tmp_path_factory.mktemp("taken")
    pair(folder / "pair")
    (folder / "RECIPE.toml").write_text(
        'version = 1\ncheckpoint = "pair"\nout = "bundle"\n[prompts]\nground = "find {text}"\n'
        '[boxes]\nopen = "<|box_start|>"\nclose = "<|box_end|>"\nscale = 1000\n'
    )
    done = run("export", "run", folder / "RECIPE.toml")
    assert done.exception is None, done.exception
    return folder / "bundle"


def test_what_is_made(made):
    found = json.loads((made / "manifest.json").read_text())
    tasks = {verb: task for verb, task in found["tasks"].items() if task}
    assert set(tasks) == {"ask", "caption", "ground"} and {task["kind"] for task in tasks.values()} == {"gguf"}
    start, end = "<|im_start|>User:{image}", "<end_of_utterance>\nAssistant:"
    assert tasks["ask"]["prompt"] == f"{start}{{text}}{end}"
    assert tasks["ground"]["prompt"] == f"{start}find {{text}}{end}"
    assert tasks["ground"]["boxes"] == {"open": "<|box_start|>", "close": "<|box_end|>", "scale": 1000.0}
    # Four tiles and the whole, of 16 visual tokens each, and what libmtmd writes around them; a question, an answer.
    assert 5 * 16 + 512 + 128 < tasks["ask"]["context_tokens"] < 5 * 16 + 512 + 128 + 80
    assert tasks["ask"]["model"]["quantization"] == "F32" and tasks["ask"]["memory"]["measured"]
    assert [step["step"] for step in found["steps"]] == ["checkpoint", "take_gguf"]
    assert [(case["task"], case["graph"]) for case in found["probe"]] == [("caption", None)]
    files = {path.name for path in made.iterdir() if path.is_file()}
    assert files == {"language.gguf", "projector.gguf", "manifest.json"}


@pytest.mark.parametrize(("fields", "penalty"), [({}, 1.0), ({"general.sampling.penalty_repeat": 1.05}, 1.05)])
def test_the_repetition_penalty_is_that_of_the_file(tmp_path, fields, penalty):
    found = read_pair(pair(tmp_path / "pair"))
    model = dataclasses.replace(found.model, fields=found.model.fields | fields)
    recipe = Recipe(checkpoint=tmp_path / "pair", out=tmp_path / "bundle")
    take_gguf(dataclasses.replace(found, model=model), recipe, tmp_path)
    tasks = json.loads((tmp_path / "bundle" / "manifest.json").read_text())["tasks"]
    assert [tasks[verb]["repetition_penalty"] for verb in ("ask", "caption")] == [penalty, penalty]


def test_it_answers_and_verifies(made):
    trusted = ("--bundle", made, "--allow-unsigned")
    for verb, words in (("caption", ()), ("ask", ("how many boats?",)), ("ground", ("a boat",))):
        done = run(verb, SCENE, *words, *trusted, "--json")
        assert done.exception is None, done.exception
    assert run("verify", *trusted).exception is None


def test_the_plan_is_told_and_nothing_is_done(tmp_path):
    done = export(pair(tmp_path / "pair"), "--explain")
    assert done.exception is None
    for part in (f"{MODEL}: llama, F32, reads 2048 tokens", f"{PROJECTOR}: idefics3, F32", "answers ask, caption"):
        assert part in done.output
    assert [path.name for path in tmp_path.iterdir()] == ["pair"]


def refusal(folder: Path, *more: object) -> EdgeRsvlmError:
    """What both the export and its plan are refused with."""
    done, planned = export(folder, *more), export(folder, *more, "--explain")
    assert isinstance(done.exception, EdgeRsvlmError) and str(done.exception) == str(planned.exception)
    assert not (folder.parent / "bundle").exists()
    return done.exception


def test_files_that_are_no_pair(tmp_path):
    folder = pair(tmp_path / "pair")
    model, projector = (folder / name for name in (MODEL, PROJECTOR))

    def refused(message: str, kind=UsageError) -> None:
        found = refusal(folder)
        assert isinstance(found, kind) and message in str(found), found

    extra = (folder / "tiny-Q8_0.gguf").resolve()
    extra.write_bytes(model.read_bytes())
    refused(f"one language model is wanted, and there are: {MODEL}, tiny-Q8_0.gguf")
    extra.rename(folder / "mmproj-other.gguf")
    refused("one projector is wanted")
    (folder / "mmproj-other.gguf").unlink()
    projector.rename(tmp_path / PROJECTOR)
    refused("has no projector (mmproj*.gguf)")
    model.rename(folder / "m.gguf")
    (tmp_path / PROJECTOR).rename(folder / MODEL)
    (folder / "m.gguf").rename(projector)
    refused(f"{MODEL}: holds 'clip', which is not what its name says")
    swapped = projector.read_bytes()
    model.rename(projector)
    refused("one language model is wanted, and there are: none")
    (folder / "tiny-00001-of-00002.gguf").write_bytes(swapped)
    refused("llama-gguf-split --merge tiny-00001-of-00002.gguf")


@pytest.mark.parametrize("name", [MODEL, PROJECTOR])
@pytest.mark.parametrize("keep", [0, 100, 3000])
def test_files_that_are_broken(tmp_path, name, keep):
    folder = pair(tmp_path / "pair")
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:keep])
    found = refusal(folder)
    assert isinstance(found, InputError) and name in str(found)


def test_files_that_are_cut_short(tmp_path):
    folder = pair(tmp_path / "pair")
    for name in (MODEL, PROJECTOR):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[:-4000])
        assert isinstance(export(folder).exception, InputError)
        (folder / name).write_bytes(whole)


def test_what_is_not_done_to_files(tmp_path):
    folder = pair(tmp_path / "pair")
    (tmp_path / "lora").mkdir()
    assert "cannot be merged" in str(refusal(folder, "--adapter", tmp_path / "lora"))
    assert "taken as they are, whatever 'target' says" in str(refusal(folder, "--target", "gguf:Q8_0"))
    assert "whatever 'calibration' says" in str(refusal(folder, "--calibration", SCENE.parent))


def test_a_pair_that_is_of_two_models(tmp_path):
    folder = pair(tmp_path / "pair")
    tiny_gguf.write_projector(folder / PROJECTOR, dataclasses.replace(TINY, width=32))
    done = export(folder)
    assert isinstance(done.exception, InputError) and "one and the same checkpoint" in str(done.exception)


def edited(path: Path, old: bytes, new: bytes) -> None:
    assert len(old) == len(new)
    data = path.read_bytes()
    assert data.count(old) == 1
    path.write_bytes(data.replace(old, new))


def test_projectors_that_llama_does_not_know(tmp_path):
    folder = pair(tmp_path / "pair")
    edited(folder / PROJECTOR, b"idefics3", b"idefics9")
    done = export(folder)
    assert isinstance(done.exception, InputError) and "unknown projector type: idefics9" in str(done.exception)


def test_templates_that_ask_nothing(tmp_path):
    done = export(pair(tmp_path / "pair", template="Hello"))
    assert isinstance(done.exception, UsageError) and "the chat template does not write" in str(done.exception)
    done = export(pair(tmp_path / "pair", template=""))
    assert isinstance(done.exception, UsageError)


def test_a_context_that_no_image_fits(tmp_path):
    done = export(pair(tmp_path / "pair", dataclasses.replace(TINY, context=200)))
    assert isinstance(done.exception, UsageError) and "it reads 200" in str(done.exception)


QWEN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for c in m.content %}{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ c.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAVA = "{{ bos_token }}{% for m in messages %}USER: {{ m['content'] | trim }} {% endfor %}ASSISTANT:"
IMAGE_ON_ITS_LINE = (
    "{{ bos_token }}{% for m in messages %}[INST]{% for c in m['content'] %}{% if c['type'] == 'image' %}"
    "<start_of_image>\n{% else %}{{ c['text'] | trim }}{% endif %}{% endfor %}[/INST]{% endfor %}"
)
TEXT_FIRST = (
    "{% for m in messages %}{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] }}{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'image' %}<image>{% endfor %}{% endfor %}"
)
PICKY = "{% if messages[0]['content'] is not string %}{{ raise_exception('text alone') }}{% endif %}" + LLAVA


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        (TEMPLATE, "<|im_start|>User:{image}{text}<end_of_utterance>\nAssistant:"),
        (QWEN, "<|im_start|>user\n{image}{text}<|im_end|>\n<|im_start|>assistant\n"),
        (IMAGE_ON_ITS_LINE, "<s>[INST]{image}\n{text}[/INST]"),
        (PICKY, "<s>USER: {image}\n{text} ASSISTANT:"),
    ],
)
def test_prompts(template, prompt):
    """libmtmd writes what stands around an image; line ends and all the rest stay."""
    assert expand(template, {"bos_token": "<s>", "eos_token": "</s>"}, "here") == prompt


@pytest.mark.parametrize("template", [TEXT_FIRST, "{{ broken", "{{ messages[0]['content'] * 2 }}"])
def test_templates_that_are_refused(template):
    with pytest.raises(UsageError, match="does not write an image"):
        expand(template, {"bos_token": "", "eos_token": ""}, "here")


def test_a_template_has_no_way_out():
    escape = "{{ messages.__class__.__mro__ }}"
    with pytest.raises(UsageError):
        expand(escape, {}, "here")


def described(kind: str, **fields: object) -> Pair:
    vision = {f"clip.vision.{name}": value for name, value in fields.items()}
    projector = {"general.architecture": "clip", "clip.projector_type": kind, **vision}
    empty = GgufSource(Path("m.gguf"), {"general.architecture": "llama"}, {}, frozenset())
    return Pair(empty, dataclasses.replace(empty, fields=projector))


def test_images_by_projector():
    (fixed,) = described("mlp", image_size=384, patch_size=14).image_steps(1 << 20)
    assert fixed == {"op": "resize_longest", "px": 384, "filter": "bicubic"}
    (free,) = described("qwen2vl_merger", image_size=560, patch_size=14).image_steps(1 << 20)
    assert (free["op"], free["multiple"], free["min_pixels"], free["max_pixels"]) == (
        "smart_resize", 28, 8 * 28 * 28, 1 << 20
    )  # fmt: skip
    (merged,) = described("pixtral", image_size=1024, patch_size=16, spatial_merge_size=1).image_steps(1 << 20)
    assert merged["multiple"] == 16
    longest, tiles = described("idefics3", image_size=512, patch_size=16, preproc_image_size=2048).image_steps(1)
    assert (longest["px"], tiles["px"]) == (2048, 512)
    with pytest.raises(InputError, match="which images"):
        described("mlp").image_steps(1)


def test_caches_are_counted():
    llama = {"block_count": 3, "embedding_length": 64, "attention.head_count": 4}
    fields = {"general.architecture": "llama", **{f"llama.{name}": value for name, value in llama.items()}}
    whole = Pair(GgufSource(Path("m"), fields, {}, frozenset()), described("mlp").projector)
    assert whole.cache_bytes_per_token == 2 * 2 * 3 * 64
    fields = fields | {"llama.attention.head_count_kv": [2, 1, 1], "llama.attention.key_length": 24}
    grouped = Pair(GgufSource(Path("m"), fields, {}, frozenset()), whole.projector)
    assert grouped.cache_bytes_per_token == 2 * 4 * (24 + 16)


def test_metadata_is_read(tmp_path):
    found = read_source(tiny_gguf.write_projector(tmp_path / "mmproj.gguf"))
    assert found.architecture == "clip" and found.quantization == "F32" and found.types.keys() == {"F32"}
    assert found.fields["clip.vision.image_size"] == EYE.image and "v.patch_embd.weight" in found.tensors


def test_clip_is_refused(tmp_path):
    folder = pair(tmp_path / "pair")
    writer = gguf.GGUFWriter(str(folder / PROJECTOR), "clip")
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("mlp")
    writer.add_tensor("v.class_embd", np.zeros(24, np.float32))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    with pytest.raises(UsageError, match="confuses the patches"):
        read_pair(folder)
