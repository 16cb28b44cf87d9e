"""Decoding of predictions, on sessions whose answers are known."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from edge_rsvlm.config.manifest import CaptionTask
from edge_rsvlm.engines.fake import FakeSession
from edge_rsvlm.tasks.caption import Captioner, CaptionSessions, summarise
from edge_rsvlm.tasks.detect import Detector, peaks
from tests.fakes import INPUT, MEMORY, parsed


def test_peaks_are_local_maxima_including_borders_and_plateaus():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 6, (2, 9, 11)).astype(np.float32) / 5
    expected = np.zeros(scores.shape, bool)
    for k, r, c in itertools.product(*map(range, scores.shape)):
        around = scores[k, max(r - 1, 0) : r + 2, max(c - 1, 0) : c + 2]
        expected[k, r, c] = scores[k, r, c] >= 0.4 and scores[k, r, c] >= around.max()
    np.testing.assert_array_equal(peaks(scores, 0.4), expected)


def test_boxes_are_distances_from_cell_centres():
    scores = np.zeros((1, 2, 8, 8), np.float32)
    ltrb = np.zeros((1, 4, 8, 8), np.float32)
    scores[0, 1, 2, 5], ltrb[0, :, 2, 5] = 0.8, (1, 2, 3, 4)
    scores[0, 0, 6, 1], ltrb[0, :, 6, 1] = 0.9, (5, 5, 5, 5)
    head = FakeSession(lambda inputs: {"scores": scores, "ltrb": ltrb})
    (boxes,) = Detector(parsed().tasks.detect, head)({"c1": np.zeros((1, 1, 32, 32), np.float32)})
    np.testing.assert_allclose(boxes.xyxy_N4, [[1, 21, 11, 31], [21, 8, 25, 14]])
    assert boxes.labels_N.tolist() == [0, 1]
    assert boxes.scores_N == pytest.approx([0.9, 0.8])


VOCABULARY = ["<bos>", "<eos>", "a", "b", "c", "d"]


def captioner(tmp_path, log_next, beams, max_tokens=6, length_penalty=1.0):
    """A decoder whose next-token log-probabilities are ``log_next(previous tokens)``; its keys carry the history."""
    path = tmp_path / "tokenizer.json"
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="a"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(path))
    spec = CaptionTask(
        input=INPUT, prefix="p", embed="e", decoder="d", encoder_outputs=["c5"], tokenizer="t", bos_id=0, eos_id=1,
        layers=1, heads=1, head_dim=1, max_tokens=max_tokens, beams=beams, length_penalty=length_penalty, memory=MEMORY,
    )  # fmt: skip

    def decode(inputs):
        history = np.concatenate([inputs["past_keys"][0, :, 0, :, 0], inputs["embeds"][:, :, 0]], axis=1)
        logits = np.array([log_next(tuple(int(t) for t in row if t > 0)) for row in history], np.float32)
        keys = history[None, :, None, :, None].astype(np.float32)
        return {"logits": logits, "keys": keys, "values": keys}

    sessions = CaptionSessions(
        FakeSession(lambda inputs: {"prefix": np.zeros((len(inputs["c5"]), 2, 1), np.float32)}),
        FakeSession(lambda inputs: {"embeds": inputs["tokens"][..., None].astype(np.float32)}),
        FakeSession(decode),
    )
    return Captioner(spec, sessions, path)


def table(history):
    """A made-up language in which greedy search is lured away from the likeliest sentence."""
    rows = {
        (): [0, 0, 0.5, 0.4, 0.1, 0],
        (2,): [0, 0.34, 0, 0.33, 0, 0.33],
        (3,): [0, 0.9, 0, 0, 0.1, 0],
    }
    return np.log(np.array(rows.get(history, [0, 1, 0, 0, 0, 0])) + 1e-9)


def test_beam_search_finds_what_greedy_misses(tmp_path):
    image = {"c5": np.zeros((1, 1), np.float32)}
    assert captioner(tmp_path, table, beams=1)(image) == ["a"]
    assert captioner(tmp_path, table, beams=3)(image) == ["b"]


def test_wide_beam_search_is_exhaustive(tmp_path):
    rng = np.random.default_rng(5)
    memo = {}

    def log_next(history):
        if history not in memo:
            memo[history] = np.append(-np.inf, np.log(rng.dirichlet(np.ones(5))))
        return memo[history]

    def mean_log(words):
        sentence = (*words, 1)
        return sum(log_next(sentence[:i])[t] for i, t in enumerate(sentence)) / len(sentence)

    longest = 3
    sentences = [s for n in range(longest + 1) for s in itertools.product(range(2, 6), repeat=n)]
    best = max(sentences, key=mean_log)
    # Sentences that were cut at the last step are not finished; here the best one is.
    wide = captioner(tmp_path, log_next, beams=500, max_tokens=longest + 1)
    found = wide({"c5": np.zeros((2, 1), np.float32)})
    assert found == [" ".join(VOCABULARY[t] for t in best)] * 2


def test_summary_leads_with_what_most_of_the_scene_agrees_on():
    fields, sea = "there is a piece of farmland", "the blue sea with some waves"
    assert summarise([fields], [1]) == fields
    assert summarise([fields, sea, fields], [1, 1, 1]) == f"{fields}; elsewhere, {sea}"
    assert summarise([fields, sea, fields], [10, 1, 10]) == fields
    assert summarise([], []) == ""
