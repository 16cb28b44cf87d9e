"""What families that write text say to the model: the prompts of transformers' own processors, templates, ends."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch: not installed")
transformers = pytest.importorskip("transformers", reason="needs transformers: not installed")
pytest.importorskip("onnxscript", reason="needs onnxscript: not installed")
pytest.importorskip("sentencepiece", reason="needs sentencepiece: not installed")

from PIL import Image  # noqa: E402

from edge_rsvlm.errors import UsageError  # noqa: E402
from edge_rsvlm.export.families.base import Source  # noqa: E402
from edge_rsvlm.export.families.blip_2 import Blip2  # noqa: E402
from edge_rsvlm.export.families.generation import greedy, image_token  # noqa: E402
from edge_rsvlm.export.families.idefics3 import tokens_per_tile  # noqa: E402
from edge_rsvlm.export.families.image_processors import load_image_processor  # noqa: E402
from edge_rsvlm.export.families.tokenizers import load_tokenizer  # noqa: E402
from tests import tiny_generators as tiny  # noqa: E402
from tests.generator_checks import (  # noqa: E402
    MAKERS,
    QUESTION,
    SIZES_HW,
    Made,
    assert_same,
    load,
    made_in,
    prepared,
    prompt_ids,
    scene,
    task_of,
    torch_sessions,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return partial(made_in, tmp_path_factory.getbasetemp())


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_prompt_is_what_the_processor_writes(checkpoint, name):
    """Ids of the manifest's one string equal those of transformers, BOS exactly once."""
    made = checkpoint(name)
    task = task_of(made)
    for size in SIZES_HW:
        image = scene(*size)
        expected = made.family.inputs(made.source, Image.fromarray(image), QUESTION)["input_ids"][0].tolist()
        ids = prompt_ids(made, task, prepared(made, image), QUESTION).tolist()
        assert ids == expected
        bos = load_tokenizer(made.source.folder).bos_token_id
        assert ids.count(bos) == (0 if bos is None else 1)


def test_processors_agree(checkpoint):
    """Where transformers' own processor can be built, it makes the same inputs as ``inputs``."""
    built = {
        "idefics3": lambda images, words: transformers.Idefics3Processor(images, words, image_seq_len=25),
        "blip-2": lambda images, words: transformers.Blip2Processor(images, words, num_query_tokens=5),
    }
    for name, processor in built.items():
        made = checkpoint(name)
        words, images = load_tokenizer(made.source.folder), load_image_processor(made.source.folder)
        prompts = {"idefics3": f"<|begin_of_text|>User:<image>{QUESTION}<end_of_utterance>\nAssistant:"}
        prompt = prompts.get(name, f"Question: {QUESTION} Answer:")
        image = Image.fromarray(scene(90, 130))
        found = processor(images, words)(
            images=image, text=prompt, return_tensors="pt", add_special_tokens=name == "blip-2"
        )
        with torch.no_grad():
            expected = greedy(made.model, dict(found), task_of(made, "ask").eos_ids)
        answered = made.family.reference(made.source, made.model, np.asarray(image), QUESTION)
        np.testing.assert_array_equal(answered["logits"], expected["logits"])
        assert answered["tokens"].tolist() == expected["tokens"].tolist()


def test_captions_and_boxes(checkpoint):
    made = checkpoint("llava")
    tasks = made.family.describe(made.source).tasks
    assert set(tasks) == {"caption", "ask"}
    assert tasks["caption"]["prompt"] == "USER: {image}\nDescribe this image in one sentence. ASSISTANT:"
    assert task_of(checkpoint("blip-2"), "caption").prompt == ""
    assert task_of(checkpoint("qwen2_vl"), "ground").boxes.scale == 1000
    boxes = task_of(checkpoint("qwen2_5_vl"), "ground").boxes
    assert boxes.scale is None and boxes.open == '"bbox_2d": ['


def test_blip_2_captions(checkpoint):
    """An empty prompt is what ``generate`` starts from without a text."""
    made = checkpoint("blip-2")
    image = scene(90, 130)
    pixels = made.family.inputs(made.source, Image.fromarray(image), "")["pixel_values"]
    ends = task_of(made, "caption").eos_ids
    expected = greedy(made.model, {"pixel_values": pixels}, ends)
    assert prompt_ids(made, task_of(made, "caption"), prepared(made, image), "").tolist() == [
        made.source.config.text_config.bos_token_id
    ]
    bos = torch.tensor([[made.source.config.image_token_index] * 5 + [made.source.config.text_config.bos_token_id]])
    found = greedy(made.model, {"pixel_values": pixels, "input_ids": bos}, ends)
    np.testing.assert_array_equal(found["logits"], expected["logits"])


def test_eos(checkpoint, tmp_path):
    made = checkpoint("qwen2_vl")
    folder = tiny.qwen(tmp_path)
    for written, expected in (([5, 9], (5, 9)), (7, (7,))):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": written}))
        assert task_of(Made(Source(folder, made.source.config), made.model)).eos_ids == expected
    (folder / "generation_config.json").unlink()
    assert task_of(Made(Source(folder, made.source.config), made.model)).eos_ids == (
        load_tokenizer(folder).eos_token_id,
    )


TEMPLATES = {
    "list": (
        "chat_template.json",
        json.dumps({"chat_template": tiny.LLAVA_TEMPLATE}),
        "USER: {image}\n{text} ASSISTANT:",
    ),
    "text only": (
        "chat_template.jinja",
        "{% for m in messages %}[{{ m['content'] | trim }}]{% endfor %}",
        "[{image}\n{text}]",
    ),
    "strict about text": (
        "chat_template.jinja",
        "{% for m in messages %}{% if m['content'] is not string %}{{ raise_exception('no') }}{% endif %}"
        "<s>{{ m['content'] }}{% endfor %}",
        "<s>{image}\n{text}",
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates(name, tmp_path):
    folder = tiny.llava(tmp_path)
    file, content, expected = TEMPLATES[name]
    (folder / "chat_template.jinja").unlink()
    (folder / file).write_text(content)
    made = load(folder)
    task = task_of(made)
    assert task.prompt == expected
    assert task.tokenizer.add_special_tokens == (not expected.startswith("<s>"))
    assert_same(made, torch_sessions(made), scene(90, 130))


def test_no_template(tmp_path):
    folder = tiny.llava(tmp_path)
    (folder / "chat_template.jinja").unlink()
    made = load(folder)
    assert task_of(made).prompt == "USER: {image}\n{text} ASSISTANT:"
    assert_same(made, torch_sessions(made), scene(90, 130))


def test_refusals(checkpoint, tmp_path):
    made = checkpoint("llava")
    folder = tiny.llava(tmp_path / "a")
    (folder / "chat_template.jinja").write_text("hello")
    with pytest.raises(UsageError, match="chat template"):
        task_of(Made(Source(folder, made.source.config), made.model))
    config = transformers.AutoConfig.from_pretrained(made.source.folder)
    config.image_token_index = 10_000
    with pytest.raises(UsageError, match="no token of the number 10000"):
        image_token(Source(folder, config), load_tokenizer(folder))
    config.vision_config.model_type = "pixtral"
    with pytest.raises(UsageError, match="pixtral"):
        made.family.graphs(Source(folder, config))
    t5 = transformers.Blip2Config(text_config={"model_type": "t5", "d_model": 16})
    with pytest.raises(UsageError, match="t5"):
        Blip2().model_class(t5)
    with pytest.raises(UsageError, match="60 px are 15 x 15"):
        config_3 = transformers.Idefics3Config(vision_config={"patch_size": 4}, scale_factor=2)
        tokens_per_tile(config_3, 60)
    with pytest.raises(UsageError, match="chunked_attention"):
        config.vision_config.model_type = "clip_vision_model"
        config.text_config.layer_types = ["chunked_attention"] * 2
        made.family.graphs(Source(folder, config))[-1].wrap(made.model)
