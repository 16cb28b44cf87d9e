"""Texts as a text encoder takes them."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing

from edge_rsvlm.config import inputs
from edge_rsvlm.errors import BundleError, UsageError
from edge_rsvlm.tasks.text import Texts

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "a", "plane", "on", "the", "apron"]


@pytest.fixture
def file(tmp_path):
    """A tokenizer.json that brings settings of its own, which the manifest overrules."""
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    tokenizer.enable_padding(length=12, pad_id=3, direction="left")
    tokenizer.enable_truncation(3)
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def encode(file, *texts, **spec):
    return Texts(inputs.Tokenizer(file="t", **{"add_special_tokens": True, **spec}), file).encode(texts)


def test_shorter_texts_are_padded_on_the_right(file):
    found = encode(file, "a plane on the apron", "a ship")
    assert found["input_ids"].tolist() == [[1, 4, 5, 6, 7, 8, 2], [1, 4, 3, 2, 0, 0, 0]]
    assert found["attention_mask"].tolist() == [[1] * 7, [1, 1, 1, 1, 0, 0, 0]]
    assert found["token_type_ids"].tolist() == [[0] * 7] * 2
    assert {values.dtype for values in found.values()} == {np.dtype(np.int64)}


def test_long_texts_are_cut_and_keep_their_special_tokens(file):
    assert encode(file, "a plane on the apron", max_length=4)["input_ids"].tolist() == [[1, 4, 5, 2]]


def test_a_fixed_length_pads_and_cuts(file):
    found = encode(file, "a", "a plane on the apron", pad_to=5, pad_id=2)
    assert found["input_ids"].tolist() == [[1, 4, 2, 2, 2], [1, 4, 5, 6, 2]]
    assert found["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1] * 5]


def test_without_special_tokens(file):
    assert encode(file, "a plane", add_special_tokens=False)["input_ids"].tolist() == [[4, 5]]


def test_bytes_of_another_encoding_are_refused(file):
    with pytest.raises(UsageError, match="UTF-8"):
        encode(file, "a", b"caf\xe9".decode("utf-8", "surrogateescape"))


def test_a_broken_tokenizer_is_a_broken_bundle(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(BundleError, match=r"tokenizer\.json is no tokenizer"):
        encode(tmp_path / "tokenizer.json", "a")
