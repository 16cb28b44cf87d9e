"""Text from images, by made-up languages whose likeliest sentences are known."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from edge_rsvlm.config.task_specs import BoxFormat, GenerateTask, VisualTokens
from edge_rsvlm.engines.fake import FakeSession
from edge_rsvlm.errors import BundleError, UsageError
from edge_rsvlm.tasks.decoder import OnnxLanguage
from edge_rsvlm.tasks.generate import Generator, Sampling, Vision, parse_boxes
from edge_rsvlm.tasks.prompt import Layout, mrope_positions, write_image
from edge_rsvlm.tasks.search import Stop, beam_search, greedy, sample
from tests.test_tasks import INPUT, MEMORY

VOCABULARY = ["<bos>", "<eos>", "a", "b", "c", "d", "<img>", "<box>", "\n", "<row_1_col_1>", "<row_1_col_2>", "what?"]
SPECIAL = ("<bos>", "<eos>", "<img>", "<box>")
BOS, EOS, A, B, IMG, BOX, WHAT = (VOCABULARY.index(w) for w in ("<bos>", "<eos>", "a", "b", "<img>", "<box>", "what?"))
WORDS = 6  # <bos> <eos> a b c d: what the made-up languages speak
CACHES = ("past_key_values.0.key", "past_key_values.0.value")


@dataclass
class Image:
    """Made by ``image(7, 8)``: an image of two tiles, whose visual tokens are 7 and 8."""

    pixels_KCHW: np.ndarray
    rows: int = 1
    cols: int = 1


def image(*values, rows=1, cols=1, hw=(8, 8)):
    pixels = np.array(values, np.float32)[:, None, None, None] * np.ones((1, 3, *hw), np.float32)
    return Image(pixels, rows, cols)


@pytest.fixture
def make(tmp_path):
    """A generator whose decoder scores the next token by ``log_next(history)``: numbers of words, and of visual tokens.

    Its keys carry the history; every call's inputs are appended to ``seen``.
    """

    def build(log_next, *, tokens_per_tile=2, roles=(), seen=None, answers=1, **spec):
        tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="a"))
        tokenizer.pre_tokenizer = WhitespaceSplit()
        tokenizer.add_special_tokens([AddedToken(word, special=True) for word in SPECIAL])
        tokenizer.add_tokens(["\n", "<row_1_col_1>", "<row_1_col_2>"])
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        task = GenerateTask(**{
            "kind": "generate", "input": INPUT, "encoder": "e", "encoder_outputs": ("features",), "project": None,
            "decoder": {
                "kind": "onnx", "embed": "m", "graph": "d", "cache": {"layers": 1, "heads": 1, "head_dim": 1}
            }, "tokenizer": {"file": "t", "add_special_tokens": False},
            "visual": {"token": None}, "prompt": "{image}<bos>{text}", "positions": "sequence",
            "eos_ids": (EOS,), "max_tokens": 6, "beams": 1,
            "length_penalty": 1.0, "memory": MEMORY, **spec,
        })  # fmt: skip

        def encode(inputs):
            tiles = inputs["tiles"][:, :1, :1, 0] * 100
            return {"features": np.repeat(tiles[..., None], tokens_per_tile, axis=1)[:, :, 0]}

        def decode(inputs):
            if seen is not None:
                seen.append(inputs)
            assert inputs[CACHES[0]].dtype == np.float32
            history = np.concatenate([inputs[CACHES[0]][:, 0, :, 0], inputs["inputs_embeds"][:, :, 0]], axis=1)
            logits = np.array([log_next(tuple(int(t) for t in row)) for row in history], np.float32)
            cache = history[:, None, :, None]
            # Logits of every token read, as graphs that others made give them; only the last may matter.
            every = np.concatenate([np.full((len(logits), 2, logits.shape[1]), 99.0, np.float32), logits[:, None]], 1)
            return {"logits": every, "present.0.key": cache, "present.0.value": cache}

        embed = FakeSession(lambda inputs: {"inputs_embeds": inputs["input_ids"][..., None].astype(np.float32)})
        language = OnnxLanguage(task.decoder, embed, FakeSession(decode), frozenset(roles))
        return Generator(task, Vision(FakeSession(encode), None), language, tmp_path / "tokenizer.json")

    return build


def words_said(history):
    """The words after the last <bos>."""
    return history[len(history) - history[::-1].index(BOS) :]


def language(seed, sharpness=1.0):
    """Random next-word distributions, each history its own."""

    def log_next(history):
        rng = np.random.default_rng([seed, *history])
        return np.append(-np.inf, np.log(rng.dirichlet(np.full(WORDS - 1, sharpness)) + 1e-9))

    return log_next


def lure(history):
    """Greedy search is lured away from the likeliest sentence."""
    rows = {(): [0, 0, 0.5, 0.4, 0.1, 0], (A,): [0, 0.34, 0, 0.33, 0, 0.33], (B,): [0, 0.9, 0, 0, 0.1, 0]}
    return np.log(np.array(rows.get(words_said(history), [0, 1, 0, 0, 0, 0])) + 1e-9)


def recite(*tokens):
    """Says these tokens, then the first of them again and again."""

    def log_next(history):
        said = len(words_said(history))
        return np.log(np.eye(len(VOCABULARY))[tokens[said] if said < len(tokens) else tokens[0]] + 1e-9)

    return log_next


# Search


def test_beam_search_finds_what_greedy_misses(make):
    assert make(lure, beams=1)([image(1)], "") == ["a"]
    assert make(lure, beams=3)([image(1)], "") == ["b"]


def test_wide_beam_search_is_exhaustive(make):
    log_next = language(5)

    def mean_log(words):
        sentence = (*words, EOS)
        return sum(log_next((100, 100, BOS, *sentence[:i]))[t] for i, t in enumerate(sentence)) / len(sentence)

    longest = 3
    sentences = [s for n in range(longest + 1) for s in itertools.product(range(2, WORDS), repeat=n)]
    best = max(sentences, key=mean_log)
    # Sentences that were cut at the last step are not finished; here the best one is.
    wide = make(log_next, beams=500, max_tokens=longest + 1)
    assert wide([image(1)] * 2, "") == [" ".join(VOCABULARY[t] for t in best)] * 2


def table_language(rows, vocabulary, seed):
    """Logits by the last two tokens, and ``advance`` over a batch whose rows remember theirs."""
    table = np.random.default_rng(seed).normal(size=(rows, vocabulary, vocabulary, vocabulary)).astype(np.float32) * 2
    state = {"rows": np.arange(rows), "last": np.zeros((rows, 2), np.int64)}

    def advance(tokens_M, rows_M):
        state["rows"] = state["rows"][rows_M]
        state["last"] = np.stack([state["last"][rows_M, 1], tokens_M], axis=1)
        return table[state["rows"], state["last"][:, 0], state["last"][:, 1]]

    return table[:, 0, 0], advance


@pytest.mark.parametrize("seed", range(20))
def test_greedy_is_beam_search_of_one(seed):
    stop = Stop((1, 3), 12)
    alone = greedy(*table_language(4, 7, seed), stop)
    beam = beam_search(*table_language(4, 7, seed), stop, beams=1, length_penalty=1.0)
    for ours, theirs in zip(alone, beam, strict=True):
        end = np.flatnonzero(np.isin(ours, stop.eos_ids)).min(initial=len(ours)) + 1
        np.testing.assert_array_equal(ours[:end], theirs[:end])


def test_of_equal_tokens_the_first_is_taken():
    stop = Stop((4,), 3)
    same = np.zeros((2, 5), np.float32)
    assert [t.tolist() for t in greedy(same, lambda tokens, rows: same, stop)] == [[0, 0, 0]] * 2
    found = beam_search(same, lambda t, rows: np.zeros((len(t), 5), np.float32), stop, beams=2, length_penalty=1.0)
    assert [t.tolist() for t in found] == [[0, 0, 0]] * 2


@pytest.mark.parametrize("beams", [1, 3])
def test_a_batch_answers_as_its_images_do_alone(make, beams):
    generator = make(language(9), beams=beams, max_tokens=5)
    images = [image(n, hw=(8, 8 + 8 * (n % 2))) for n in range(7)]  # of two sizes
    together = generator(images, "what?")
    assert together == [generator([one], "what?")[0] for one in images]
    assert len(set(together)) > 3
    assert generator([], "what?") == []


def test_a_length_penalty_prefers_long_or_short(make):
    def log_next(history):
        rows = {(): [0, 0.4, 0.6, 0, 0, 0], (A,): [0, 0.5, 0.5, 0, 0, 0]}
        return np.log(np.array(rows.get(words_said(history), [0, 1, 0, 0, 0, 0])) + 1e-9)

    # "" 0.4; "a" 0.3 in 2 tokens; "a a" 0.3 in 3 tokens
    assert make(log_next, beams=4, length_penalty=0.0)([image(1)], "") == [""]
    assert make(log_next, beams=4, length_penalty=1.0)([image(1)], "") == ["a a"]


# Ends


def test_any_end_token_ends_and_the_rest_is_not_said(make):
    say = recite(A, B, EOS, A)
    assert make(say)([image(1)], "") == ["a b"]
    assert make(say, eos_ids=(BOX, B))([image(1)], "") == ["a"]
    assert make(recite(EOS))([image(1)], "") == [""]


def test_what_never_ends_is_cut(make):
    seen = []
    assert make(recite(A), max_tokens=4, seen=seen)([image(1)], "") == ["a a a a"]
    assert len(seen) == 4, "the token after the last is not computed"
    assert make(recite(A), max_tokens=4)([image(1)], "", Sampling(0.0, max_tokens=2)) == ["a a"]
    with pytest.raises(UsageError, match="at most 4"):
        make(recite(A), max_tokens=4)([image(1)], "", Sampling(0.0, max_tokens=5))


def test_a_finished_image_waits_for_the_others(make):
    def log_next(history):
        return np.eye(WORDS)[EOS if len(words_said(history)) >= history[0] // 100 else A] * 50

    assert make(log_next)([image(3), image(0), image(1)], "") == ["a a a", "", "a"]


def test_special_tokens_are_not_said_but_marks_of_boxes_are(make):
    say = recite(BOX, A, IMG, BOX, EOS)
    assert make(say)([image(1)], "") == ["a"]
    assert make(say, boxes={"open": "<box>", "close": "<box>"})([image(1)], "") == ["<box> a <box>"]


def test_no_numbers_is_an_error(make):
    with pytest.raises(BundleError, match="NaN"):
        make(lambda history: np.full(WORDS, np.nan))([image(1)], "")


# Sampling


def test_a_seed_gives_one_answer_whatever_else_is_in_the_batch(make):
    generator = make(language(1), max_tokens=6)
    images = [image(n) for n in range(5)]
    first = generator(images, "", Sampling(1.0, seed=3))
    assert first == [generator([one], "", Sampling(1.0, seed=3))[0] for one in images]
    others = [generator(images, "", Sampling(1.0, seed=seed)) for seed in range(4, 8)]
    assert all(other != first for other in others)


def drawn(logits, draws=4000, **options):
    same = np.tile(np.array(logits, np.float32), (1, 1))
    tokens = sample(same, lambda t, rows: same, Stop((99,), draws), Sampling(**options))
    counts = Counter(tokens[0].tolist())
    return np.array([counts[v] for v in range(len(logits))]) / draws


def test_tokens_are_drawn_as_often_as_they_are_likely():
    probability = np.array([0.5, 0.05, 0.3, 0.15])
    np.testing.assert_allclose(drawn(np.log(probability), temperature=1.0), probability, atol=0.03)
    hot = probability**0.5 / (probability**0.5).sum()
    np.testing.assert_allclose(drawn(np.log(probability), temperature=2.0), hot, atol=0.03)
    cold = drawn(np.log(probability), temperature=0.01)
    assert cold.tolist() == [1, 0, 0, 0]


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    probability = np.array([0.5, 0.05, 0.3, 0.15])
    found = drawn(np.log(probability), temperature=1.0, top_p=0.7)
    np.testing.assert_allclose(found, [0.625, 0, 0.375, 0], atol=0.03)
    assert drawn(np.log(probability), temperature=1.0, top_p=1e-9).tolist() == [1, 0, 0, 0]


def test_temperature_0_is_the_own_search(make):
    assert make(lure, beams=3)([image(1)], "", Sampling(0.0)) == ["b"]


@pytest.mark.parametrize(
    "options",
    [{"temperature": -1.0}, {"temperature": math.nan}, {"temperature": 1.0, "top_p": 0.0},
     {"temperature": 1.0, "top_p": 1.1}, {"temperature": 1.0, "seed": -1}, {"temperature": 1.0, "max_tokens": 0}],
)  # fmt: skip
def test_impossible_sampling_is_refused(options):
    with pytest.raises(UsageError):
        Sampling(**options)


# Prompts

INLINE = {"token": "<img>", "per_tile": 2}
SPLIT = INLINE | {
    "single": "<box>{tokens}<box>",
    "tile": "<row_{row}_col_{col}>{tokens}",
    "row_end": "\n",
    "overview": "<bos>{tokens}",
}


def test_visual_tokens_stand_where_the_prompt_has_them(make):
    seen = []
    generator = make(recite(EOS), visual=INLINE, prompt="<bos> a {image} {text}", seen=seen)
    assert generator.prompt(image(1), "what?") == "<bos> a <img><img> what?"
    generator([image(3), image(4)], "what?")
    assert seen[0]["inputs_embeds"][..., 0].tolist() == [[BOS, A, 300, 300, WHAT], [BOS, A, 400, 400, WHAT]]


def test_without_a_visual_token_the_image_comes_first(make):
    seen = []
    make(recite(EOS), seen=seen)([image(3)], "what?")
    assert seen[0]["inputs_embeds"][0, :, 0].tolist() == [300, 300, BOS, WHAT]


def test_a_split_image_is_written_tile_by_tile_and_overview_last(make):
    seen = []
    generator = make(recite(EOS), visual=SPLIT, prompt="{image}{text}", seen=seen)
    split = image(3, 4, 5, rows=1, cols=2)
    assert generator.prompt(split, "") == "<row_1_col_1><img><img><row_1_col_2><img><img>\n<bos><img><img>"
    generator([split], "")
    assert seen[0]["inputs_embeds"][0, :, 0].tolist() == [9, 300, 300, 10, 400, 400, 8, BOS, 500, 500]
    assert generator.prompt(image(3), "") == "<box><img><img><box>"


def test_the_grid_of_a_split_is_written_row_by_row():
    visual = VisualTokens(token="*", per_tile=1, tile="({row}{col}{tokens})", row_end="/", overview="[{tokens}]")
    assert write_image(visual, Layout(7, 3, 2, (8, 8))) == "(11*)(12*)/(21*)(22*)/(31*)(32*)/[*]"
    with pytest.raises(BundleError, match="3 x 2 tiles and 6 images"):
        write_image(visual, Layout(6, 3, 2, (8, 8)))


def test_an_image_may_have_as_many_tokens_as_its_size_needs():
    visual = VisualTokens(token="*", unit_px=4, single="<{tokens}>")
    assert write_image(visual, Layout(1, 1, 1, (8, 12))) == "<******>"
    with pytest.raises(BundleError, match="unit_px"):
        write_image(VisualTokens(token="*"), Layout(1, 1, 1, (8, 12)))


def test_placeholders_in_a_question_are_words(make):
    generator = make(recite(EOS), visual=INLINE, prompt="{image} {text}")
    assert generator.prompt(image(1), "{image} {text} {tokens}") == "<img><img> {image} {text} {tokens}"


@pytest.mark.parametrize("text", ["is this an <img> ?", b"caf\xe9".decode("utf-8", "surrogateescape")])
def test_questions_that_would_break_the_prompt_are_refused(make, text):
    with pytest.raises(UsageError):
        make(recite(EOS), visual=INLINE)([image(1)], text)


def test_a_prompt_longer_than_the_model_reads_is_refused(make):
    short = make(recite(EOS), tokenizer={"file": "t", "add_special_tokens": False, "max_length": 3})
    assert short([image(1)], "a b") == [""]
    with pytest.raises(UsageError, match="shorter"):
        short([image(1)], "a b c")


def test_a_manifest_that_miscounts_visual_tokens_is_broken(make):
    with pytest.raises(BundleError, match="2 visual tokens for 3 places"):
        make(recite(EOS), visual={"token": "<img>", "per_tile": 3})([image(1)], "")
    with pytest.raises(BundleError, match="no token '<nope>'"):
        make(recite(EOS), visual={"token": "<nope>", "per_tile": 3})


def test_a_projection_turns_features_into_visual_tokens(make):
    seen = []
    generator = make(recite(EOS), encoder_outputs=("features",), project="p", seen=seen)
    project = FakeSession(lambda inputs: {"features": inputs["features"] + 5})
    generator._vision = Vision(generator._vision.encoder, project)
    generator([image(1)], "")
    assert seen[0]["inputs_embeds"][0, :, 0].tolist() == [105, 105, BOS]


# What the decoder is fed


def test_positions_and_mask_only_where_the_graph_lists_them(make):
    seen = []
    make(recite(A, EOS), seen=seen)([image(1)], "")
    assert {"position_ids", "attention_mask"}.isdisjoint(seen[0])
    seen = []
    make(recite(A, B, EOS), roles=("position_ids", "attention_mask"), seen=seen)([image(1)] * 2, "")
    assert [call["position_ids"].tolist() for call in seen] == [[[0, 1, 2]] * 2, [[3]] * 2, [[4]] * 2]
    assert [call["attention_mask"].shape for call in seen] == [(2, 3), (2, 4), (2, 5)]
    assert all((call["attention_mask"] == 1).all() for call in seen)
    assert seen[0]["position_ids"].dtype == seen[0]["attention_mask"].dtype == np.int64


def test_mrope_positions_by_hand(make):
    seen = []
    generator = make(
        recite(A, B, EOS), tokens_per_tile=6, visual={"token": "<img>", "unit_px": 4}, prompt="a {image}{text}<bos>",
        positions="mrope", roles=("position_ids",), seen=seen,
    )  # fmt: skip
    generator([image(1, hw=(8, 12))] * 2, "what?")
    time_row_col = [[0, 1, 1, 1, 1, 1, 1, 4, 5], [0, 1, 1, 1, 2, 2, 2, 4, 5], [0, 1, 2, 3, 1, 2, 3, 4, 5]]
    assert seen[0]["position_ids"].shape == (3, 2, 9)
    for sequence in range(2):
        assert seen[0]["position_ids"][:, sequence].tolist() == time_row_col
    assert [call["position_ids"].tolist() for call in seen[1:]] == [[[[6], [6]]] * 3, [[[7], [7]]] * 3]


def test_mrope_positions_equal_transformers(needs):
    needs("transformers")
    import torch
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel

    vision = SimpleNamespace(spatial_merge_size=2)
    model = SimpleNamespace(config=SimpleNamespace(vision_config=vision))
    model.get_vision_position_ids = lambda *args, **kw: Qwen2VLModel.get_vision_position_ids(model, *args, **kw)
    for before, height, width, after in [(3, 2, 5, 4), (0, 4, 1, 1), (7, 3, 3, 0)]:
        visual_S = np.array([False] * before + [True] * (height * width) + [False] * after)
        expected, _ = Qwen2VLModel.get_rope_index(
            model, torch.zeros(1, len(visual_S), dtype=torch.long), torch.from_numpy(visual_S)[None].int(),
            torch.tensor([[1, 2 * height, 2 * width]]),
        )  # fmt: skip
        np.testing.assert_array_equal(mrope_positions(visual_S, (height, width)), expected[:, 0])


# Boxes in answers

GEOCHAT = BoxFormat(open="{", close="}", scale=100)


def test_boxes_as_models_write_them():
    said = "two ships {<10><20><30><40>|<90>} and {<0><0><100><50.5>|<0>}"
    assert parse_boxes(said, GEOCHAT, (7, 9)) == [(0.1, 0.2, 0.3, 0.4), (0, 0, 1, 0.505)]
    qwen = BoxFormat(open="<|box_start|>", close="<|box_end|>", scale=1000)
    assert parse_boxes("<|box_start|>(100,200),(300,400)<|box_end|>", qwen, (7, 9)) == [(0.1, 0.2, 0.3, 0.4)]
    pixels = BoxFormat(open="[", close="]")
    said = json.dumps([{"bbox_2d": [56, 25, 28, 50], "label": "ship"}])
    assert parse_boxes(said, pixels, (100, 112)) == [(0.25, 0.25, 0.5, 0.5)]


def test_what_is_no_box():
    for said in ("", "{", "}{", "{1 2 3}", "{}", "1 2 3 4", "{1 2 1 4}", "{-5 1 0 9}", "{110 0 120 9}", "{a b c d}"):
        assert parse_boxes(said, GEOCHAT, (10, 10)) == [], said
    assert parse_boxes("{-5 -1 200 .5e9}", GEOCHAT, (10, 10)) == [(0, 0, 1, 0.005)]
    assert parse_boxes("{10-20-30-40}", GEOCHAT, (10, 10)) == [(0.1, 0.2, 0.3, 0.4)]
    assert parse_boxes("{" + "9" * 400 + " 1 2 3}", GEOCHAT, (10, 10)) == []


def test_one_mark_may_open_and_close():
    form = BoxFormat(open="|", close="|", scale=10)
    assert parse_boxes("see |1 2 3 4| or |5 6 7 8|", form, (1, 1)) == [(0.1, 0.2, 0.3, 0.4), (0.5, 0.6, 0.7, 0.8)]


@given(st.text(alphabet="{}[]<>|0123456789.- ,e\n\u0663x", max_size=80), st.sampled_from([None, 1.0, 1000.0]))
def test_any_string_gives_boxes_inside_the_image_or_none(said, scale):
    for x0, y0, x1, y1 in parse_boxes(said, BoxFormat(open="{", close="}", scale=scale), (10, 20)):
        assert 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1


@pytest.mark.parametrize("said", ["}" * 10**5, "{" * 10**5, "{}" * 10**5, "{" + "1" * 10**5 + "}", "{" + "1." * 10**5])
def test_long_strings_take_no_long_time(said):
    started = time.perf_counter()
    parse_boxes(said, GEOCHAT, (10, 10))
    assert time.perf_counter() - started < 2
