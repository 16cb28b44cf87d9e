"""Families that write text, against transformers: equal features, logits and tokens, by the manifest's words alone."""

from __future__ import annotations

from functools import cache, partial

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch: not installed")
pytest.importorskip("transformers", reason="needs transformers: not installed")
pytest.importorskip("onnxscript", reason="needs onnxscript: not installed")
pytest.importorskip("sentencepiece", reason="needs sentencepiece: not installed")

from edge_rsvlm.export.families.causal_decoder import causal_mask  # noqa: E402
from edge_rsvlm.export.families.idefics3 import position_ids  # noqa: E402
from edge_rsvlm.export.families.tokenizers import load_tokenizer, tokenizer_json  # noqa: E402
from edge_rsvlm.tasks.decoder import OnnxLanguage  # noqa: E402
from edge_rsvlm.tasks.generate import Generator, Vision  # noqa: E402
from edge_rsvlm.tiles.prepare import prepare  # noqa: E402
from tests import tiny_generators as tiny  # noqa: E402
from tests.generator_checks import (  # noqa: E402
    MAKERS,
    QUESTION,
    SIZES_HW,
    OnnxSession,
    assert_same,
    features_of,
    load,
    made_in,
    prepared,
    scene,
    task_of,
    torch_sessions,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return partial(made_in, tmp_path_factory.getbasetemp())


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
