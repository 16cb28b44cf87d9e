"""Families that write text, against transformers: equal features, logits and tokens, by the manifest's words alone."""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch: not installed")
transformers = pytest.importorskip("transformers", reason="needs transformers: not installed")
pytest.importorskip("onnxscript", reason="needs onnxscript: not installed")
pytest.importorskip("sentencepiece", reason="needs sentencepiece: not installed")

from PIL import Image  # noqa: E402

from edge_rsvlm.config.manifest import GenerateTask  # noqa: E402
from edge_rsvlm.errors import UsageError  # noqa: E402
from edge_rsvlm.export.families.base import Source  # noqa: E402
from edge_rsvlm.export.families.blip_2 import Blip2  # noqa: E402
from edge_rsvlm.export.families.causal_decoder import causal_mask  # noqa: E402
from edge_rsvlm.export.families.generation import greedy, image_token  # noqa: E402
from edge_rsvlm.export.families.idefics3 import Idefics3, position_ids, tokens_per_tile  # noqa: E402
from edge_rsvlm.export.families.image_processors import load_image_processor  # noqa: E402
from edge_rsvlm.export.families.llava import Llava  # noqa: E402
from edge_rsvlm.export.families.qwen2_vl import Qwen2VL  # noqa: E402
from edge_rsvlm.export.families.tokenizers import load_tokenizer, tokenizer_json  # noqa: E402
from edge_rsvlm.tasks.decoder import Decoder, OnnxLanguage  # noqa: E402
from edge_rsvlm.tasks.generate import Generator, Vision  # noqa: E402
from edge_rsvlm.tasks.prompt import Layout, grid, mrope_positions, sequence_positions, write_image  # noqa: E402
from edge_rsvlm.tiles.prepare import prepare  # noqa: E402
from tests import tiny_generators as tiny  # noqa: E402

QUESTION = "how many airplanes are there?"
SIZES_HW = ((90, 130), (200, 56), (33, 310))
FAMILIES = {"llava": Llava(), "idefics3": Idefics3(), "smolvlm": Idefics3(), "blip-2": Blip2()}
FAMILIES |= {"qwen2_vl": Qwen2VL(), "qwen2_5_vl": Qwen2VL()}
MAKERS = {
    "llava": tiny.llava,
    "idefics3": tiny.idefics3,
    "smolvlm": lambda folder: tiny.idefics3(folder, smol=True),
    "qwen2_vl": tiny.qwen,
    "qwen2_5_vl": lambda folder: tiny.qwen(folder, version="qwen2_5_vl"),
    "blip-2": tiny.blip_2,
}


@dataclass
class Made:
    """A checkpoint, its family, and transformers' own model of it."""

    source: Source
    model: torch.nn.Module

    @property
    def family(self):
        return FAMILIES[self.source.config.model_type]


@dataclass
class Prepared:
    pixels_KCHW: np.ndarray
    rows: int = 1
    cols: int = 1


class TorchSession:
    """A graph before it is traced."""

    def __init__(self, plan, model):
        self.plan, self.module = plan, plan.wrap(model).eval()

    def run(self, inputs, outputs):
        given = [torch.from_numpy(np.ascontiguousarray(inputs[spec.name])) for spec in self.plan.inputs]
        with torch.no_grad():
            found = self.module(*given)
        found = dict(zip(self.plan.outputs, found if isinstance(found, tuple) else (found,), strict=True))
        return [found[name].numpy() for name in outputs]


class OnnxSession:
    def __init__(self, plan, model, file):
        ort = pytest.importorskip("onnxruntime", reason="needs onnxruntime: not installed")
        module = plan.wrap(model).eval()
        free = torch.export.Dim.DYNAMIC
        shapes = [{k: free for k, size in enumerate(spec.shape) if isinstance(size, str)} for spec in plan.inputs]
        named = sum(p.kind is not p.VAR_POSITIONAL for p in inspect.signature(module.forward).parameters.values())
        shapes = (*shapes[:named], *([tuple(shapes[named:])] if shapes[named:] else []))
        torch.onnx.export(
            module, tuple(map(self.example, plan.inputs, [plan.sizes] * len(plan.inputs))), file,
            input_names=[spec.name for spec in plan.inputs], output_names=list(plan.outputs), dynamic_shapes=shapes,
            dynamo=True, opset_version=20, external_data=False, verbose=False,
        )  # fmt: skip
        self.session = ort.InferenceSession(str(file), providers=["CPUExecutionProvider"])

    @staticmethod
    def example(spec, sizes):
        shape = [sizes[size] if isinstance(size, str) else size for size in spec.shape]
        return torch.zeros(shape, dtype=spec.dtype)

    def run(self, inputs, outputs):
        return self.session.run(list(outputs), dict(inputs))


def load(folder: Path) -> Made:
    config = transformers.AutoConfig.from_pretrained(folder)
    model_class = FAMILIES[config.model_type].model_class(config)
    return Made(Source(folder, config), model_class.from_pretrained(folder).eval())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A family's checkpoint by name, made once."""
    return cache(lambda name: load(MAKERS[name](tmp_path_factory.mktemp(name))))


def torch_sessions(made: Made) -> dict:
    return {plan.name: TorchSession(plan, made.model) for plan in made.family.graphs(made.source)}


def scene(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Blobs, so that what a resize keeps differs from image to image."""
    noise = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC))


def prepared(made: Made, image_HWC: np.ndarray) -> Prepared:
    """The image as transformers prepares it, in the layout of our graphs."""
    options = {"return_row_col_info": True} if isinstance(made.family, Idefics3) else {}
    found = load_image_processor(made.source.folder)(Image.fromarray(image_HWC), return_tensors="np", **options)
    pixels = np.asarray(found["pixel_values"], np.float32)
    if "rows" in found:
        return Prepared(pixels[0], max(int(found["rows"][0][0]), 1), max(int(found["cols"][0][0]), 1))
    if "image_grid_thw" in found:
        _, rows, cols = found["image_grid_thw"][0]
        patches = pixels.reshape(rows // 2, cols // 2, 2, 2, 3, 2, 14, 14)[:, :, :, :, :, 0]
        pixels = patches.transpose(4, 0, 2, 5, 1, 3, 6).reshape(1, 3, rows * 14, cols * 14)
    return Prepared(pixels)


def features_of(made: Made, image_HWC: np.ndarray) -> np.ndarray:
    """Visual tokens [T, D] as transformers computes them."""
    inputs = made.family.inputs(made.source, Image.fromarray(image_HWC), QUESTION)
    wanted = {
        name: inputs[name] for name in ("pixel_values", "image_grid_thw", "pixel_attention_mask") if name in inputs
    }
    with torch.no_grad():
        found = made.model.get_image_features(**wanted).pooler_output
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in found]).numpy()


def task_of(made: Made, verb: str = "ask") -> GenerateTask:
    fields = made.family.describe(made.source).tasks[verb]
    return GenerateTask.model_validate({**fields, "memory": {"session_bytes": 1, "tile_bytes": 1}})


def layout_of(image: Prepared) -> Layout:
    return Layout(len(image.pixels_KCHW), image.rows, image.cols, image.pixels_KCHW.shape[2:])


def prompt_ids(made: Made, task: GenerateTask, image: Prepared, text: str) -> np.ndarray:
    from tokenizers import Tokenizer

    written = task.prompt.replace("{image}", write_image(task.visual, layout_of(image))).replace("{text}", text)
    tokenizer = Tokenizer.from_str(tokenizer_json(load_tokenizer(made.source.folder)).decode())
    return np.array(tokenizer.encode(written, add_special_tokens=task.tokenizer.add_special_tokens).ids)


def answer(made: Made, sessions: dict, image_HWC: np.ndarray, text: str = QUESTION, chunk: int = 10**6):
    """Logits of the first token and 16 greedy tokens, read in chunks, by the manifest's fields only."""
    task, image = task_of(made), prepared(made, image_HWC)
    ids = prompt_ids(made, task, image, text)
    (features,) = sessions["image"].run({"tiles": image.pixels_KCHW}, ["features"])
    features = features.reshape(1, -1, features.shape[-1])
    if task.visual.token is None:
        ids = np.concatenate([np.full(features.shape[1], -1), ids])
        visual = ids == -1
    else:
        visual = ids == made.source.config.image_token_id
    (embeds,) = sessions["embed"].run({"input_ids": np.maximum(ids, 0)[None]}, ["inputs_embeds"])
    embeds[:, visual] = features
    if task.positions == "mrope":
        positions = mrope_positions(visual, grid(task.visual, layout_of(image).tile_hw))
    else:
        positions = sequence_positions(len(ids))
    decoder = Decoder(task.decoder.cache, sessions["decoder"], frozenset({"position_ids"}), 1)
    for start in range(0, len(ids), chunk):
        logits = decoder.read(embeds[:, start : start + chunk], positions[..., start : start + chunk])
    first, tokens = logits[0], [int(logits.argmax())]
    while len(tokens) < 16 and tokens[-1] not in task.eos_ids:
        (embeds,) = sessions["embed"].run({"input_ids": np.array([tokens[-1:]])}, ["inputs_embeds"])
        tokens.append(int(decoder.go_on(embeds, np.arange(1)).argmax()))
    return first, tokens


def assert_same(made: Made, sessions: dict, image_HWC: np.ndarray, **how) -> list[int]:
    expected = made.family.reference(made.source, made.model, image_HWC, QUESTION)
    logits, tokens = answer(made, sessions, image_HWC, **how)
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-4)
    assert tokens == expected["tokens"].tolist()
    return tokens


@pytest.fixture(scope="module")
def graphs(checkpoint, tmp_path_factory):
    """ONNX graphs by family and name, made once."""

    @cache
    def made_graph(name: str, graph: str) -> OnnxSession:
        made = checkpoint(name)
        (plan,) = [plan for plan in made.family.graphs(made.source) if plan.name == graph]
        return OnnxSession(plan, made.model, tmp_path_factory.mktemp(f"{name}-{graph}") / "model.onnx")

    return made_graph


@pytest.mark.parametrize("name", sorted(set(MAKERS) - {"smolvlm"}))
def test_image_graph(checkpoint, graphs, name):
    made = checkpoint(name)
    for size in SIZES_HW:
        image = scene(*size)
        expected = features_of(made, image)
        tiles = prepared(made, image).pixels_KCHW
        (found,) = graphs(name, "image").run({"tiles": tiles}, ["features"])
        assert found.shape[0] == len(tiles)
        np.testing.assert_allclose(found.reshape(expected.shape), expected, atol=1e-4)
        assert np.abs(expected).max() > 0.5
        both = np.concatenate([tiles, tiles[::-1]])
        (twice,) = graphs(name, "image").run({"tiles": both}, ["features"])
        np.testing.assert_allclose(twice, np.concatenate([found, found[::-1]]), atol=1e-5)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "blip-2"])
def test_onnx_answers_as_transformers_does(checkpoint, graphs, name):
    made = checkpoint(name)
    sessions = {graph: graphs(name, graph) for graph in ("image", "embed", "decoder")}
    tokens = assert_same(made, sessions, scene(90, 130))
    assert assert_same(made, sessions, scene(200, 56, seed=1), chunk=7) != tokens, "the image makes no difference"


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_wrappers_answer_as_transformers_does(checkpoint, name):
    made = checkpoint(name)
    sessions = torch_sessions(made)
    answers = {tuple(assert_same(made, sessions, scene(*size, seed=n))) for n, size in enumerate(SIZES_HW)}
    assert len(answers) == len(SIZES_HW) and all(len(set(tokens)) > 3 for tokens in answers)


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_4x_layout(checkpoint, name, tmp_path):
    new, old = checkpoint(name), load(tiny.as_4x(MAKERS[name](tmp_path)))
    assert old.family.describe(old.source) == new.family.describe(new.source)
    image = scene(90, 130)
    expected = new.family.reference(new.source, new.model, image, QUESTION)
    found = old.family.reference(old.source, old.model, image, QUESTION)
    np.testing.assert_array_equal(found["logits"], expected["logits"])
    assert_same(old, torch_sessions(old), image)


VARIANTS = {
    "llava-layers": lambda f: tiny.llava(f, vision_feature_layer=[0, -2, 3]),
    "llava-full": lambda f: tiny.llava(f, vision_feature_select_strategy="full", vision_feature_layer=-1),
    "llava-siglip": lambda f: tiny.llava(f, tower="siglip_vision_model", vision_feature_select_strategy="full"),
    "llava-siglip-default": lambda f: tiny.llava(f, tower="siglip_vision_model"),
    "llava-mistral-window": lambda f: tiny.llava(f, text={"model_type": "mistral", "sliding_window": 9}),
    "llava-qwen2-windows": lambda f: tiny.llava(
        f, text={"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}
    ),
    "llava-tied-relu": lambda f: tiny.llava(f, tie_word_embeddings=True, text={"hidden_act": "relu", "head_dim": 10}),
    "llava-biases": lambda f: tiny.llava(
        f, projector_hidden_act="quick_gelu", multimodal_projector_bias=False, text={"attention_bias": True}
    ),
    "idefics3-whole": lambda f: tiny.idefics3(f, split=False),
    "idefics3-large-tiles": lambda f: tiny.idefics3(f, tile_px=120),
    "smolvlm-small-tiles": lambda f: tiny.idefics3(f, smol=True, tile_px=60),
    "qwen-tied": lambda f: tiny.qwen(f, tied=True),
    "qwen-window": lambda f: tiny.qwen(
        f, text={"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}
    ),
    "qwen2_5-tied": lambda f: tiny.qwen(f, version="qwen2_5_vl", tied=True),
    "blip_2-old": lambda f: tiny.blip_2(f, image_token=False),
    "blip_2-llama": lambda f: tiny.blip_2(f, text={"model_type": "llama", **tiny.TEXT, "vocab_size": 311}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(name, tmp_path):
    made = load(VARIANTS[name](tmp_path))
    sessions = torch_sessions(made)
    image = scene(90, 130)
    (found,) = sessions["image"].run({"tiles": prepared(made, image).pixels_KCHW}, ["features"])
    np.testing.assert_allclose(found.reshape(-1, found.shape[-1]), features_of(made, image), atol=1e-4)
    assert_same(made, sessions, image)
    assert_same(made, sessions, image, chunk=5)


def test_position_buckets():
    """HF Idefics3 reuses rows for some grids; the plain order would differ."""
    assert position_ids(100, 4, 100) != list(range(25 * 25))
    assert position_ids(512, 16, 512) == list(range(32 * 32))
    assert sorted(set(position_ids(100, 4, 20))) == [
        25 * row + col for row in range(0, 25, 5) for col in range(0, 25, 5)
    ]


def test_mask_of_windows():
    mask = causal_mask(torch.zeros(1, 2, 4), 3, 2)[0, 0]
    assert (mask == 0).tolist() == [[False, False, True, True, False], [False, False, False, True, True]]


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


def test_runtime_answers(checkpoint, tmp_path):
    """From the image's bytes to words, the runtime says what transformers says."""
    for name in sorted(MAKERS):
        made = checkpoint(name)
        task, sessions = task_of(made), torch_sessions(made)
        tokenizer = load_tokenizer(made.source.folder)
        (tmp_path / "tokenizer.json").write_bytes(tokenizer_json(tokenizer))
        generator = Generator(
            task.model_copy(update={"max_tokens": 16}),
            Vision(sessions["image"], None),
            OnnxLanguage(
                task.decoder, sessions["embed"], sessions["decoder"], frozenset({"inputs_embeds", "position_ids"})
            ),
            tmp_path / "tokenizer.json",
        )
        image = scene(90, 130)
        tokens = made.family.reference(made.source, made.model, image, QUESTION)["tokens"]
        said = [token for token in tokens if token not in task.eos_ids]
        expected = tokenizer.decode(said, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()
        ours = prepare(image, task.input.prepare, task.input.mean, task.input.std)
        assert generator([ours], QUESTION) == [expected]


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
