"""Texts -> the integer inputs of a text encoder.

Letters: N texts, T tokens of the longest (or of the model's fixed length).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_rsvlm.config import inputs
from edge_rsvlm.errors import BundleError, UsageError


def load_tokenizer(file: Path) -> Any:
    """The tokenizer of a ``tokenizer.json``, without padding and truncation of its own; BundleError if it is none."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as exc:
        raise BundleError(f"{file.name} is no tokenizer: {exc}", fix="make the bundle again") from exc
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def check_text(text: str) -> None:
    """UsageError for a text that is not valid Unicode, as bytes of another encoding on a command line become."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as exc:
        raise UsageError(f"{text!r} is not valid Unicode", fix="give the text in UTF-8") from exc


class Texts:
    """The tokenizer of a text encoder: pads to the right, cuts long texts but keeps their special tokens."""

    def __init__(self, spec: inputs.Tokenizer, file: Path) -> None:
        self._add_special_tokens = spec.add_special_tokens
        self._tokenizer = load_tokenizer(file)
        self._tokenizer.enable_padding(pad_id=spec.pad_id, length=spec.pad_to)
        lengths = [length for length in (spec.max_length, spec.pad_to) if length is not None]
        if lengths:
            self._tokenizer.enable_truncation(min(lengths))

    def encode(self, texts: Sequence[str]) -> dict[str, NDArray[np.int64]]:
        """``input_ids``, ``attention_mask`` and ``token_type_ids``, each [N, T]."""
        for text in texts:
            check_text(text)
        encoded = self._tokenizer.encode_batch(list(texts), add_special_tokens=self._add_special_tokens)
        return {
            "input_ids": np.array([e.ids for e in encoded], np.int64),
            "attention_mask": np.array([e.attention_mask for e in encoded], np.int64),
            "token_type_ids": np.array([e.type_ids for e in encoded], np.int64),
        }
