"""Fine-tuning: tiny checkpoints learn a few samples by heart, runs resume, and adapters come back through the merge."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from functools import cache

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch", reason="needs torch: not installed")
transformers = pytest.importorskip("transformers", reason="needs transformers: not installed")
peft = pytest.importorskip("peft", reason="needs peft: not installed")

from edge_rsvlm.config.task_specs import BoxFormat  # noqa: E402
from edge_rsvlm.errors import InputError, UsageError  # noqa: E402
from edge_rsvlm.export.adapters.reading import read_adapter  # noqa: E402
from edge_rsvlm.export.adapters.resolve import resolve  # noqa: E402
from edge_rsvlm.export.adapters.updates import merge  # noqa: E402
from edge_rsvlm.export.families.base import Source  # noqa: E402
from edge_rsvlm.export.families.registry import family_of  # noqa: E402
from edge_rsvlm.export.finetuning import loop as finetune_loop  # noqa: E402
from edge_rsvlm.export.finetuning.recipe import FinetuneRecipe, load_finetune_recipe  # noqa: E402
from edge_rsvlm.export.finetuning.run import finetune  # noqa: E402
from edge_rsvlm.export.finetuning.samples import Encoder, read_samples  # noqa: E402
from edge_rsvlm.tasks.generate import parse_boxes  # noqa: E402
from tests import tiny_generators as tiny  # noqa: E402

MAKERS = {
    "llava": tiny.llava,
    "smolvlm": lambda folder: tiny.idefics3(folder, smol=True),
    "idefics3": tiny.idefics3,
    "qwen2_vl": lambda folder: tiny.qwen(folder, tied=True),
    "qwen2_5_vl": lambda folder: tiny.qwen(folder, version="qwen2_5_vl"),
    "blip-2": tiny.blip_2,
}
ANSWERS = ("red", "two ships", "a harbour", "airplanes", "there are no roofs", "one", "the colour of a ship", "no")
BOX = {"image": "0.png", "phrase": "the ship", "box": [13, 20, 40, 30]}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The folder of a family's tiny checkpoint, made once."""
    return cache(lambda name: MAKERS[name](tmp_path_factory.mktemp(name)))


@pytest.fixture
def data(tmp_path):
    """Eight samples, of which the image alone tells the answer."""
    lines = []
    for number, answer in enumerate(ANSWERS):
        noise = np.random.default_rng(number).integers(0, 256, (5, 6, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((130, 90), Image.Resampling.BICUBIC).save(tmp_path / f"{number}.png")
        asked = {"question": "what is it?", "answer": answer} if number % 2 else {"caption": answer}
        lines.append({"image": f"{number}.png", **asked})
    return write(tmp_path / "train.jsonl", lines)


def write(path, lines):
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    return path


def recipe_of(checkpoint, data, out, **changes):
    return FinetuneRecipe(**{"checkpoint": checkpoint, "data": data, "out": out, "steps": 3, "batch": 4, **changes})


def encoder_of(folder):
    config = transformers.AutoConfig.from_pretrained(folder)
    return Encoder(Source(folder, config), family_of(config))


@pytest.mark.parametrize("name", MAKERS)
def test_learns_by_heart_and_merges(name, checkpoint, data, tmp_path):
    folder = checkpoint(name)
    steps = 16 if name in ("llava", "qwen2_vl") else 2
    out = finetune(recipe_of(folder, data, tmp_path / "lora", steps=steps, batch=8, rate=3e-2))
    log = json.loads((out / "training.json").read_text())
    assert len(log["losses"]) == steps and log["samples"] == 8 and log["tools"]["peft"]
    if steps > 2:
        assert log["losses"][-1] < 0.5 * log["losses"][0]
    assert not list(tmp_path.glob(".lora*"))
    config = transformers.AutoConfig.from_pretrained(folder)
    model_class = family_of(config).model_class(config)
    base = model_class.from_pretrained(folder).eval()
    adapter = read_adapter(out)
    assert adapter.factors and all(not path.endswith("lm_head") for path in adapter.factors)
    resolution = resolve([adapter], base)
    encoded = encoder_of(folder)(read_samples(data)[1])
    with torch.no_grad():
        before = base(**encoded.inputs).logits
        wanted = (
            peft.PeftModel.from_pretrained(model_class.from_pretrained(folder), out).eval()(**encoded.inputs).logits
        )
        base.load_state_dict({k: merge(v, resolution.updates.get(k, ())) for k, v in base.state_dict().items()})
        torch.testing.assert_close(base(**encoded.inputs).logits, wanted, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(before, wanted, atol=1e-2)


class Killed(Exception):
    pass


def test_a_killed_run_goes_on(checkpoint, data, tmp_path, monkeypatch):
    folder = checkpoint("llava")
    recipe = recipe_of(folder, data, tmp_path / "cut", steps=5)
    whole = finetune(recipe.model_copy(update={"out": tmp_path / "whole"}))
    monkeypatch.setattr(finetune_loop, "CHECKPOINT_EVERY_S", 0.0)
    for stop in (2, 4):

        def kill(step, done, loss, stop=stop):
            if step == stop:
                raise Killed

        with pytest.raises(Killed):
            finetune(recipe, kill)
        assert not (tmp_path / "cut").exists()
    with pytest.raises(InputError, match="another recipe"):
        finetune(recipe.model_copy(update={"rate": 1.0}))
    seen = []
    cut = finetune(recipe, lambda step, done, loss: seen.append(step))
    assert seen == [5]
    losses = [json.loads((out / "training.json").read_text())["losses"] for out in (whole, cut)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    for path, factors in read_adapter(whole).factors.items():
        for one, other in zip(factors.pair, read_adapter(cut).factors[path].pair, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", [n for n in MAKERS if n != "blip-2"])
def test_prompts_are_those_of_transformers_and_answers_end(name, checkpoint, data):
    folder = checkpoint(name)
    config = transformers.AutoConfig.from_pretrained(folder)
    family, sample = family_of(config), read_samples(data)[1]
    encoded = encoder_of(folder)(sample)
    with Image.open(sample.image) as image:
        wanted = family.inputs(Source(folder, config), image.convert("RGB"), sample.text)
    ids, answer = encoded.inputs["input_ids"][0], encoded.answer_tokens
    assert ids[:-answer].tolist() == wanted["input_ids"][0].tolist()
    assert set(wanted) <= {*encoded.inputs, "mm_token_type_ids"}
    for key in wanted.keys() - {"input_ids", "attention_mask", "mm_token_type_ids"}:
        assert torch.equal(encoded.inputs[key], wanted[key])
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(ids[-answer:-1]).strip() == "two ships"
    assert ids[-1] in family.eos_ids(Source(folder, config), tokenizer)


def test_blip_2_reads_its_queries_before_the_text(checkpoint, data):
    folder = checkpoint("blip-2")
    config = transformers.AutoConfig.from_pretrained(folder)
    caption, question = (encoder_of(folder)(sample).inputs["input_ids"][0] for sample in read_samples(data)[:2])
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for ids, prompt in ((caption, ""), (question, "Question: what is it? Answer:")):
        start = tokenizer(prompt)["input_ids"]
        assert ids[: 5 + len(start)].tolist() == [config.image_token_index] * 5 + start


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_boxes_are_written_as_the_runtime_reads_them(name, checkpoint, data):
    folder = checkpoint(name)
    config = transformers.AutoConfig.from_pretrained(folder)
    encoded = encoder_of(folder)(read_samples(write(data.parent / "boxes.jsonl", [BOX]))[0])
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = tokenizer.decode(encoded.inputs["input_ids"][0, -encoded.answer_tokens :])
    form = BoxFormat.model_validate(family_of(config).describe(Source(folder, config)).tasks["ground"]["boxes"])
    _, down, across = encoded.inputs["image_grid_thw"][0].tolist()
    (found,) = parse_boxes(text, form, (down * 14, across * 14))
    assert found == pytest.approx((13 / 130, 20 / 90, 53 / 130, 50 / 90), abs=0.01)


def test_only_answer_tokens_are_learnt(checkpoint, data, tmp_path):
    """The loss of a step is the mean over answer tokens of the base's own cross entropy, before anything is learnt."""
    folder = checkpoint("llava")
    out = finetune(recipe_of(folder, data, tmp_path / "lora", steps=1, batch=8))
    config = transformers.AutoConfig.from_pretrained(folder)
    model = family_of(config).model_class(config).from_pretrained(folder).eval()
    total, count = 0.0, 0
    for sample in read_samples(data):
        encoded = encoder_of(folder)(sample)
        labels = encoded.inputs["input_ids"].clone()
        labels[0, : -encoded.answer_tokens] = -100
        with torch.no_grad():
            loss = float(model(**encoded.inputs, labels=labels).loss)
        total, count = total + loss * encoded.answer_tokens, count + encoded.answer_tokens
    assert json.loads((out / "training.json").read_text())["losses"] == pytest.approx([total / count], rel=1e-4)


def test_processes_share_a_batch(checkpoint, data, tmp_path):
    recipe = recipe_of(checkpoint("llava"), data, tmp_path / "two", steps=2, batch=3)
    alone = finetune(recipe.model_copy(update={"out": tmp_path / "one"}))
    code = (
        "import sys; from edge_rsvlm.export.finetuning import run as finetune, recipe as finetune_recipe; "
        "finetune.finetune(finetune_recipe.FinetuneRecipe.model_validate_json(sys.argv[1]))"
    )
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", code, recipe.model_dump_json()],
            env={**os.environ, **shared, "RANK": str(rank), "CUDA_VISIBLE_DEVICES": ""},
        )
        for rank in (0, 1)
    ]
    assert [run.wait(timeout=300) for run in runs] == [0, 0]
    losses = [json.loads((out / "training.json").read_text())["losses"] for out in (alone, tmp_path / "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for path, factors in read_adapter(alone).factors.items():
        torch.testing.assert_close(read_adapter(tmp_path / "two").factors[path].pair[1], factors.pair[1])


LINES = {
    "not json": ("{", "train.jsonl:2 is not JSON"),
    "unknown key": ('{"image": "0.png", "captoin": "a"}', "2: 'captoin'.*did you mean 'caption'"),
    "no image": ('{"image": "none.png", "caption": "a"}', "2: no file .*none.png"),
    "nothing": ('{"image": "0.png"}', "nothing to learn"),
    "half": ('{"image": "0.png", "question": "what?"}', "2 has question; give a caption, or a question and its answer"),
    "both": ('{"image": "0.png", "caption": "a", "question": "b", "answer": "c"}', "2 has answer, caption, question"),
    "flat box": ('{"image": "0.png", "phrase": "a", "box": [1, 2, 0, 4]}', "'box.2'"),
    "not an object": ("[]", "train.jsonl:2"),
}


@pytest.mark.parametrize("case", LINES)
def test_wrong_lines_are_named(case, data):
    line, message = LINES[case]
    data.write_text(data.read_text().splitlines()[0] + "\n" + line + "\n")
    with pytest.raises(InputError, match=message):
        read_samples(data)


def test_wrong_samples_are_named(checkpoint, data):
    encoder = encoder_of(checkpoint("llava"))
    (data.parent / "text.png").write_text("no image")
    Image.fromarray(np.zeros((9, 9), np.uint16)).save(data.parent / "deep.png")
    cases = [
        ({"image": "text.png", "caption": "a"}, "cannot read .*text.png"),
        ({"image": "deep.png", "caption": "a"}, "pixels of mode I;16.*8-bit"),
        ({"image": "0.png", "caption": "<image>"}, "'<image>' would pass for an image"),
        (BOX, "'llava' have no form for boxes"),
    ]
    for line, message in cases:
        (sample,) = read_samples(write(data, [line]))
        with pytest.raises(InputError, match=message):
            encoder(sample)
    write(data, [])
    with pytest.raises(InputError, match="has no samples"):
        read_samples(data)


def test_wrong_recipes(checkpoint, data, tmp_path):
    folder = checkpoint("llava")
    (tmp_path / "there").mkdir()
    cases = [
        ({"steps": None}, "needs an end"),
        ({"minutes": 1.0}, "needs an end"),
        ({"out": tmp_path / "there"}, "exists already"),
        ({"targets": ("no_such_layer",)}, "targets: .*no_such_layer"),
    ]
    for changes, message in cases:
        with pytest.raises(UsageError, match=message):
            finetune(recipe_of(folder, data, **{"out": tmp_path / "lora", **changes}))
    path = tmp_path / "FINETUNE.toml"
    path.write_text('version = 1\ncheckpoint = "c"\ndata = "d.jsonl"\nout = "o"\nminutes = 2\ntargets = ["q_proj"]\n')
    recipe = load_finetune_recipe(path)
    assert (recipe.checkpoint, recipe.out, recipe.targets) == (tmp_path / "c", tmp_path / "o", ("q_proj",))
    path.write_text(path.read_text().replace("minutes", "minuets"))
    with pytest.raises(UsageError, match="did you mean 'minutes'"):
        load_finetune_recipe(path)


def test_minutes_end_a_run(checkpoint, data, tmp_path):
    out = finetune(recipe_of(checkpoint("llava"), data, tmp_path / "lora", steps=None, minutes=0.02, batch=1))
    assert json.loads((out / "training.json").read_text())["losses"]
