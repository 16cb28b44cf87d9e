"""The text model of a checkpoint as a GGUF file, for families whose text model llama.cpp knows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from edge_rsvlm.errors import UsageError
from edge_rsvlm.export.default.data.captions import BOS_ID, EOS_ID
from edge_rsvlm.export.default.family import Default
from edge_rsvlm.export.default.stages import language
from edge_rsvlm.export.families import chat
from edge_rsvlm.export.families.base import Family, Source
from edge_rsvlm.export.families.generation import GenerativeFamily
from edge_rsvlm.export.families.tokenizers import load_tokenizer, tokenizer_json
from edge_rsvlm.export.gguf import text, vocabulary
from edge_rsvlm.export.gguf.files import Precision, write_file
from edge_rsvlm.export.gguf.vocabulary import Specials

if TYPE_CHECKING:
    import gguf

    from edge_rsvlm.export.graphs.external_data import Progress
    from edge_rsvlm.export.steps.merge_lora import ModelWeights


def can_write(family: Family, source: Source) -> str | None:
    """Why the text model cannot be written for llama.cpp; None: it can. Weights are not read."""
    if reason := text.refusal(family, source):
        return reason
    try:
        words, _ = _words(family, source)
        vocabulary.read_vocabulary(words, max(words["model"]["vocab"].values()) + 1 + len(words["added_tokens"]))
    except UsageError as error:
        return str(error)
    return None


def write_text_model(
    family: Family, source: Source, weights: ModelWeights, path: Path, precision: Precision,
    progress: Progress | None = None,
) -> dict[str, float | int | str]:  # fmt: skip
    """Write ``path``; the metrics say its architecture, its bytes, and how far it computes as transformers does.

    UsageError for a model or tokenizer that llama.cpp does not know.
    """
    parts = text.text_parts(family, source, weights.tensors, weights.config)
    tokenizer, specials = _words(family, source)
    words = vocabulary.read_vocabulary(tokenizer, parts.config.vocab_size)

    def describe(writer: gguf.GGUFWriter) -> None:
        text.describe(parts, writer)
        vocabulary.describe(writer, words, specials)

    tensors = list(text.entries(parts, weights.tensors))
    write_file(path, parts.architecture.name, describe, tensors, precision, progress)
    return {
        "architecture": parts.architecture.name, "bytes": path.stat().st_size, "tensors": len(tensors),
        "context_tokens": parts.context_tokens, "cache bytes per token": parts.cache_bytes_per_token,
    }  # fmt: skip


def llama_prompt(family: Family, source: Source, prompt: str) -> str:
    """The prompt that llama.cpp reads as the tokens that the tokenizer makes of ``prompt``."""
    words, _ = _words(family, source)
    return vocabulary.for_llama(vocabulary.read_vocabulary(words, source.config.text_config.vocab_size), prompt)


def _words(family: Family, source: Source) -> tuple[dict[str, Any], Specials]:
    """The parsed tokenizer.json, and what its special tokens are."""
    if isinstance(family, Default):
        file = source.folder / language.NAME / language.TOKENIZER_NAME
        # llama.cpp is given tokens, never a text that it would have to write in lower case first.
        words = json.loads(file.read_text(encoding="utf-8")) | {"normalizer": None}
        return words, Specials(BOS_ID, (EOS_ID,), None, None, adds_bos=False)
    assert isinstance(family, GenerativeFamily)
    tokenizer = load_tokenizer(source.folder, source.config)
    parsed = json.loads(tokenizer_json(tokenizer))
    prompt = family.chat_prompt(source, tokenizer)
    bos = tokenizer.bos_token_id
    encoded = Tokenizer.from_str(json.dumps(parsed)).encode("a").ids
    specials = Specials(
        bos,
        family.eos_ids(source, tokenizer),
        tokenizer.pad_token_id,
        tokenizer.unk_token_id,
        # A prompt that writes BOS itself must not get a second one.
        adds_bos=prompt.add_special_tokens and bos is not None and encoded[0] == bos,
        chat_template=chat.read_template(source.folder, tokenizer),
    )
    return parsed, specials
