"""Text models written as GGUF files: what llama.cpp makes of them against transformers, in f32 and with fewer bits."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch: not installed")
pytest.importorskip("transformers", reason="needs transformers: not installed")
pytest.importorskip("sentencepiece", reason="needs sentencepiece: not installed")
gguf = pytest.importorskip("gguf", reason="needs gguf: not installed")
pytest.importorskip("llama_cpp", reason="needs llama_cpp: not installed")

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers  # noqa: E402

from edge_rsvlm.errors import InputError, UsageError  # noqa: E402
from edge_rsvlm.export.checkpoint.reading import MemoryTensor  # noqa: E402
from edge_rsvlm.export.default import baselines  # noqa: E402
from edge_rsvlm.export.default.data.captions import BOS_ID  # noqa: E402
from edge_rsvlm.export.default.data.scenes import TILE_PX  # noqa: E402
from edge_rsvlm.export.default.data.views import RGB_BANDS, U8_RANGE, cut  # noqa: E402
from edge_rsvlm.export.default.stages.features import tokens_of  # noqa: E402
from edge_rsvlm.export.families.base import Source  # noqa: E402
from edge_rsvlm.export.families.registry import family_of, open_source  # noqa: E402
from edge_rsvlm.export.families.tokenizers import load_tokenizer, tokenizer_json  # noqa: E402
from edge_rsvlm.export.gguf import vocabulary  # noqa: E402
from edge_rsvlm.export.gguf.files import Entry, write_file  # noqa: E402
from edge_rsvlm.export.gguf.importance import decoder_plan, measure_importance  # noqa: E402
from edge_rsvlm.export.gguf.quantizing import TYPES, inspect, quantize  # noqa: E402
from edge_rsvlm.export.gguf.vocabulary import for_llama, read_vocabulary  # noqa: E402
from edge_rsvlm.export.gguf.writing import can_write  # noqa: E402
from tests import tiny_generators as tiny  # noqa: E402
from tests.gguf_models import Made, llama_logits, read, relative, torch_logits  # noqa: E402
from tests.llama_files import llama  # noqa: E402

DEFAULT_WEIGHTS = Path(baselines.__file__).parent / "weights"
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
QWEN2_5 = "qwen2_5_vl"
MAKERS = {
    "smolvlm": lambda folder: tiny.idefics3(folder, smol=True),
    "idefics3": tiny.idefics3,
    "llava": tiny.llava,
    "llava, tied": lambda folder: tiny.llava(folder, tie_word_embeddings=True, text={"tie_word_embeddings": True}),
    "llava, llama3 rope": lambda folder: tiny.llava(folder, text={"rope_parameters": LLAMA3_ROPE}),
    "llava, linear rope": lambda folder: tiny.llava(folder, text={"rope_parameters": LINEAR_ROPE}),
    "llava, wide heads": lambda folder: tiny.llava(folder, text={"head_dim": 16}),
    "llava of mistral": lambda folder: tiny.llava(folder, text={"model_type": "mistral", "sliding_window": None}),
    "llava of qwen2": lambda folder: tiny.llava(folder, text={"model_type": "qwen2"}),
    "qwen2_vl": tiny.qwen,
    "qwen2_vl, tied": lambda folder: tiny.qwen(folder, tied=True),
    "qwen2_5_vl": lambda folder: tiny.qwen(folder, version=QWEN2_5),
    "qwen2_vl, 4.x": lambda folder: tiny.as_4x(tiny.qwen(folder)),
    "smolvlm, 4.x": lambda folder: tiny.as_4x(tiny.idefics3(folder, smol=True)),
}
ARCHITECTURES = {name: "qwen2vl" for name in MAKERS if name.startswith("qwen")} | {"llava of qwen2": "qwen2"}
WIDE = {"hidden_size": 256, "intermediate_size": 512}
"""Rows that the blocks of every type divide."""
MAKERS["llava, wide"] = lambda folder: tiny.llava(folder, text=WIDE)
IDS = [5, 40, 7, 7, 290, 13, 101, 66, 3, 250, 31]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A family's checkpoint by name, made and written once."""
    folders = cache(lambda name: tmp_path_factory.mktemp("checkpoint"))
    return cache(lambda name: read(MAKERS[name](folders(name)), folders(name) / "text.gguf"))


@pytest.fixture(scope="module")
def default(tmp_path_factory) -> Made:
    """The trained decoder of the default model, in half precision."""
    return read(DEFAULT_WEIGHTS, tmp_path_factory.mktemp("default") / "text.gguf", "F16")


@pytest.mark.parametrize("name", MAKERS)
def test_logits_are_those_of_transformers(made, name):
    """Of words, many tokens at once and then one; and of visual tokens among them."""
    case = made(name)
    with torch.no_grad():
        wanted = case.model(torch.tensor([IDS])).logits[0].numpy()
    with llama(case.file) as found:
        assert relative(np.concatenate([found.logits(IDS[:8]), found.logits(IDS[8:], 8)]), wanted) <= 1e-3
    reader = gguf.GGUFReader(case.file)
    assert reader.get_field("general.architecture").contents() == ARCHITECTURES.get(name, "llama")
    assert {tensor.tensor_type.name for tensor in reader.tensors} == {"F32"}


@pytest.mark.parametrize("name", ["smolvlm", "llava", "qwen2_vl", "qwen2_5_vl"])
def test_visual_tokens_are_taken_as_embeddings(made, name):
    case = made(name)
    text = case.family.text_model(case.model)
    embeds_TD = np.random.default_rng(0).normal(size=(12, text.embed.weight.shape[1])).astype(np.float32)
    positions_PT = np.arange(12)[None]
    if name.startswith("qwen"):  # an image of 3 x 4 tokens, by time, row and column
        positions_PT = np.stack([np.zeros(12, int), np.repeat(np.arange(3), 4), np.tile(np.arange(4), 3)])
    given = torch.from_numpy(positions_PT[:, None] if len(positions_PT) > 1 else positions_PT)
    with torch.no_grad():
        hidden = text.body(inputs_embeds=torch.from_numpy(embeds_TD)[None], position_ids=given).last_hidden_state
        wanted = text.head(hidden)[0].numpy()
    padded = np.concatenate([positions_PT, np.zeros((1, 12), int)]) if len(positions_PT) > 1 else positions_PT
    with llama(case.file) as found:
        assert relative(found.embed_logits(embeds_TD, padded), wanted) <= 1e-3


def random_texts(count: int) -> list[str]:
    rng = random.Random(7)
    letters = "abcdefghij ABC  019.,;:!?'\"()[]{}<>|_-/\\\n\n\t\réß漢字🛰️"
    words = ["how many", " ships", "Describe", "'ll", " don't", " 2024", "  ", "\n", "\r\n", "image", " the", "3.14"]
    return [
        "".join(rng.choice(words if rng.random() < 0.4 else letters) for _ in range(rng.randint(1, 40)))
        for _ in range(count)
    ]


@pytest.mark.parametrize("name", ["smolvlm", "llava", "qwen2_vl"])
def test_texts_become_the_same_tokens(made, name):
    case = made(name)
    tokenizer = load_tokenizer(case.source.folder, case.source.config)
    words = read_vocabulary(json.loads(tokenizer_json(tokenizer)), case.source.config.text_config.vocab_size)
    with llama(case.file, words_only=True) as found:
        for text in random_texts(2000):
            assert found.tokens(for_llama(words, text)) == tokenizer(text, add_special_tokens=False)["input_ids"], text
        prompt = case.family.chat_prompt(case.source, tokenizer)
        text = prompt.text.replace("{image}", "").replace("{text}", "how many ships?")
        wanted = tokenizer(text, add_special_tokens=prompt.add_special_tokens)["input_ids"]
        assert found.tokens(for_llama(words, text), special=True) == wanted


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", ["llava, wide", "default"])
def test_fewer_bits_compute_what_their_weights_say(made, default, tmp_path, name, kind):
    """llama.cpp rounds activations too, so it is not exact: 5 % of a random model, 3 % of the trained one."""
    case, (ids, features_TD) = (default, caption(default)) if name == "default" else (made(name), (IDS, None))
    found = quantize(case.file, tmp_path / "small.gguf", kind)
    wanted = torch_logits(case.family, case.like(tmp_path / "small.gguf"), ids, features_TD)
    assert relative(llama_logits(tmp_path / "small.gguf", ids, features_TD), wanted) <= (
        0.03 if name == "default" else 0.05
    )
    assert found["bytes"] == (tmp_path / "small.gguf").stat().st_size < case.file.stat().st_size
    stored = inspect(tmp_path / "small.gguf", kind)
    assert not stored.others and set(stored.numbers) <= TYPES[kind]
    own = kind.removesuffix("_M")
    assert stored.numbers[own] > 0.5 * sum(stored.numbers.values())


def caption(case: Made, seed: int = 0) -> tuple[list[int], np.ndarray]:
    """Visual tokens [T, D] of coloured blocks, and the words that the trained decoder says of them."""
    image_HWC = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8).repeat(32, 0).repeat(32, 1)
    tile = cut(image_HWC, (0, 0, 256, 256), (TILE_PX, TILE_PX), RGB_BANDS, U8_RANGE)
    with torch.no_grad():
        features_TD = case.model.language.prefix(tokens_of(case.model.encoder(torch.from_numpy(tile)[None])))[0].numpy()
    ids = [BOS_ID]
    while len(ids) < 12:
        ids.append(int(torch_logits(case.family, case.model, ids, features_TD)[-1].argmax()))
    return ids, features_TD


def test_rows_that_no_block_divides(made, tmp_path):
    """48 numbers are not even a block of 32, 80 of the others neither: all matrices are of another type."""
    case = made("smolvlm")
    with pytest.raises(UsageError, match="100% of the model cannot be Q4_K_M"):
        quantize(case.file, tmp_path / "small.gguf", "Q4_K_M")


def test_what_falls_back_is_told(tmp_path):
    """A K-quant of a model whose feed-forward is wider by 32: that part has other types, by name."""
    case = read(tiny.llava(tmp_path / "c", text=WIDE | {"intermediate_size": 544}), tmp_path / "text.gguf")
    found = quantize(case.file, tmp_path / "small.gguf", "Q4_K_M")
    others = inspect(tmp_path / "small.gguf", "Q4_K_M").others
    assert set(others) == {f"blk.{layer}.ffn_down.weight" for layer in (0, 1)}
    assert found["matrices of other types"] == 2 and 0 < found["share of other types"] < 0.5


def calls(case: Made, seeds: Sequence[int]) -> list[dict[str, np.ndarray]]:
    """What calibration records of the default decoder."""
    found = []
    for seed in seeds:
        ids, features_TD = caption(case, seed)
        words_SD = case.model.language.decoder.embed_tokens.weight.detach().numpy()[ids]
        past = {
            given.name: np.zeros((1, given.shape[1], 0, given.shape[3]), np.float32)
            for given in decoder_plan(case.family, case.source).inputs[1:]
        }
        found.append({"inputs_embeds": np.concatenate([features_TD, words_SD])[None], **past})
    return found


def test_importance_is_the_mean_square_of_inputs(default):
    found = measure_importance(default.family, default.source, default.weights, calls(default, (1, 2)))
    decoder = default.model.language.decoder
    rows, last = [], []
    with torch.no_grad():
        for call in calls(default, (1, 2)):
            embeds = torch.from_numpy(call["inputs_embeds"])
            rows.append(decoder.layers[0].input_layernorm(embeds)[0])
            order = torch.arange(embeds.shape[1])
            hidden, _ = decoder(embeds, order[None], order[None, :] <= order[:, None])
            last.append(decoder.norm(hidden)[0, -1:])
    for name in ("blk.0.attn_q.weight", "blk.0.attn_k.weight", "blk.0.attn_v.weight"):
        np.testing.assert_allclose(found[name], torch.cat(rows).double().square().mean(0), rtol=1e-4)
    np.testing.assert_allclose(found["token_embd.weight"], torch.cat(last).double().square().mean(0), rtol=1e-4)
    assert set(found) == {tensor.name for tensor in gguf.GGUFReader(default.file).tensors if len(tensor.shape) > 1}


@pytest.fixture(scope="module")
def importances(default):
    """Of some images, and of others."""
    seeds = range(4), range(4, 6)
    return [measure_importance(default.family, default.source, default.weights, calls(default, own)) for own in seeds]


@pytest.mark.parametrize("kind", ["Q4_0", "IQ4_XS", "Q4_K_M"])
def test_importance_lowers_the_error_that_matters(default, importances, tmp_path, kind):
    """sum E[x^2] (w - w')^2 of every matrix, by what other images give."""
    importance, other = importances

    def errors(given) -> dict[str, float]:
        quantize(default.file, tmp_path / "small.gguf", kind, given)
        wide = {tensor.name: tensor.data.astype(np.float32) for tensor in gguf.GGUFReader(default.file).tensors}
        return {
            tensor.name: float(
                (other[tensor.name] * (gguf.dequantize(tensor.data, tensor.tensor_type) - wide[tensor.name]) ** 2).sum()
            )
            for tensor in gguf.GGUFReader(tmp_path / "small.gguf").tensors
            if tensor.name in other
        }

    without, weighed = errors(None), errors(importance)
    assert sum(weighed.values()) < 0.97 * sum(without.values())
    assert np.mean([weighed[name] < without[name] for name in without]) > 0.9


def test_half_precision_that_overflows_is_refused(tmp_path):
    entry = Entry("token_embd.weight", MemoryTensor(torch.full((2, 32), 1e5)))
    with pytest.raises(InputError, match="half precision cannot hold"):
        write_file(tmp_path / "text.gguf", "llama", lambda writer: None, [entry], "F16")


def test_models_that_llama_cpp_does_not_know(tmp_path):
    def reason(folder: Path) -> str | None:
        opened = open_source(folder)
        return can_write(family_of(opened.config), Source(folder, opened.config))

    assert reason(tiny.llava(tmp_path / "llava")) is None
    assert "opt" in reason(tiny.blip_2(tmp_path / "blip-2"))
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 1024}
    assert "yarn" in reason(tiny.llava(tmp_path / "yarn", text={"rope_parameters": yarn}))
    assert "gelu" in reason(tiny.llava(tmp_path / "gelu", text={"hidden_act": "gelu"}))


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True, "trim_offsets": True}
WORDS = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}
TOKENIZER = {"model": WORDS, "added_tokens": [], "normalizer": None, "pre_tokenizer": BYTES}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"type": "Unigram"}}, "Unigram"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "not of bytes"),
        ({"pre_tokenizer": {**BYTES, "add_prefix_space": True}}, "not of bytes"),
        ({"pre_tokenizer": {**BYTES, "use_regex": False}}, "cuts texts"),
        ({"normalizer": {"type": "Lowercase"}}, "Lowercase"),
        ({"model": {**WORDS, "ignore_merges": True}}, "whole words"),
    ],
)
def test_tokenizers_that_llama_cpp_does_not_know(change, message):
    assert read_vocabulary(TOKENIZER, 3).pre == "gpt-2"
    with pytest.raises(UsageError, match=message):
        read_vocabulary(TOKENIZER | change, 3)


def test_spaces_before_every_part(made, tmp_path):
    """Llama's tokenizers of old put a space before a text, and again after every special token."""
    case = made("llava")
    parsed = json.loads(tokenizer_json(load_tokenizer(case.source.folder, case.source.config)))
    spaces = [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    parsed |= {"normalizer": {"type": "Sequence", "normalizers": spaces}, "pre_tokenizer": None}
    words = read_vocabulary(parsed, case.source.config.text_config.vocab_size)
    assert words.space == "always" and for_llama(words, "a ship") == "a ship"
    specials = vocabulary.Specials(bos=1, ends=(2,), pad=None, unknown=0, adds_bos=False)
    write_file(tmp_path / "words.gguf", "llama", lambda w: vocabulary.describe(w, words, specials), [], "F32")
    tokenizer = Tokenizer.from_str(json.dumps(parsed))
    with llama(tmp_path / "words.gguf", words_only=True) as found:
        for text in [*random_texts(500), "USER: <image>\nhow many?</s>yes"]:
            assert found.tokens(text) == tokenizer.encode(text, add_special_tokens=False).ids, text


@pytest.mark.parametrize("cut", vocabulary.BYTE_LEVEL_CUTS)
def test_every_way_to_cut_texts(tmp_path, cut):
    """A tokenizer that cuts so, against llama.cpp by the name that the file gives."""
    before = {"": [], "digits": [pre_tokenizers.Digits(individual_digits=True)]}
    steps = before[cut] if cut in before else [pre_tokenizers.Split(Regex(cut), "isolated")]
    made = Tokenizer(models.BPE(ignore_merges=vocabulary.BYTE_LEVEL_CUTS[cut] == vocabulary.WHOLE_WORDS))
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cut in before)
    made.pre_tokenizer = pre_tokenizers.Sequence([*steps, last])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([*random_texts(300), *tiny.SENTENCES], trainer)
    words = read_vocabulary(json.loads(made.to_str()), made.get_vocab_size())
    specials = vocabulary.Specials(bos=None, ends=(0,), pad=None, unknown=None, adds_bos=False)
    write_file(tmp_path / "words.gguf", "llama", lambda w: vocabulary.describe(w, words, specials), [], "F32")
    with llama(tmp_path / "words.gguf", words_only=True) as found:
        for text in random_texts(1000):
            assert found.tokens(text) == made.encode(text).ids, text


def test_words_beyond_the_tokenizer_are_unused():
    words = read_vocabulary(TOKENIZER, 5)
    assert words.tokens == ("a", "b", "ab", "[PAD3]", "[PAD4]")
    assert [kind.name for kind in words.types] == ["NORMAL"] * 3 + ["UNUSED"] * 2
    with pytest.raises(UsageError, match="number 2, the model only 2"):
        read_vocabulary(TOKENIZER, 2)
