"""Tokenizers as llama.cpp runs them: byte-level BPE ("gpt2") and Llama's sentencepiece BPE ("llama").

llama.cpp cuts texts before BPE by rules that it has a name for; a tokenizer that cuts otherwise is refused. The
``tokenizers`` package's own ``tokenizer.json`` is what both are read from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import gguf
from gguf import TokenType

from edge_rsvlm.errors import UsageError
from edge_rsvlm.export.families.chat import IMAGE

BYTE_LEVEL_CUTS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": (
        "qwen2"
    ),
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)"
    r"|\s+": "llama-bpe",
    "digits": "smollm",
    "": "gpt-2",
}
"""``tokenizer.ggml.pre`` by the expression that cuts; ``digits`` and nothing stand for ByteLevel's own expression,
after single digits were cut off or not."""
WHOLE_WORDS = "llama-bpe"
"""Takes a word that is a token as it is, whatever the merges make of it."""
SPECIAL = (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)
COMPOSING = ("NFC",)
"""Normalizers that change no text but one of decomposed letters, which llama.cpp leaves as they are."""
Space = Literal["never", "first", "always"]
"""Where a space is put that no one wrote: before a prompt, or before every part of it between special tokens."""
NEVER_MERGED = -1e9
FIX = "llama.cpp knows the tokenizers of Llama, Qwen2, SmolLM and GPT-2; with others use an onnx target"


@dataclass(frozen=True)
class Vocabulary:
    """``tokens`` by number; ``merges`` of byte-level BPE in their order, or ``scores`` of sentencepiece."""

    model: str
    pre: str
    tokens: tuple[str, ...]
    types: tuple[TokenType, ...]
    merges: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    space: Space = "never"


@dataclass(frozen=True)
class Specials:
    """Numbers of the tokens that mean something, and what is added to a prompt."""

    bos: int | None
    ends: tuple[int, ...]
    pad: int | None
    unknown: int | None
    adds_bos: bool
    chat_template: str | None = None


def read_vocabulary(tokenizer: dict[str, Any], size: int) -> Vocabulary:
    """Of a parsed ``tokenizer.json``, filled up with unused tokens to ``size``; UsageError for one of another kind."""
    model = tokenizer["model"]
    if model["type"] != "BPE":
        raise UsageError(f"llama.cpp does not know this tokenizer ({model['type']})", fix=FIX)
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    tokens, types = _tokens(tokenizer, size)
    if model.get("byte_fallback"):
        return Vocabulary("llama", "default", tokens, types, scores=_scores(tokens, merges), space=_space(tokenizer))
    pre = _cuts(tokenizer)
    odd = [step["type"] for step in _steps(tokenizer["normalizer"]) if step["type"] not in COMPOSING]
    if odd or model.get("ignore_merges", False) != (pre == WHOLE_WORDS):
        what = f"rewrites texts by {odd[0]}" if odd else "takes whole words otherwise"
        raise UsageError(f"llama.cpp does not know this tokenizer (it {what})", fix=FIX)
    return Vocabulary("gpt2", pre, tokens, types, merges=tuple(" ".join(pair) for pair in merges))


def _tokens(tokenizer: dict[str, Any], size: int) -> tuple[tuple[str, ...], tuple[TokenType, ...]]:
    words = {number: word for word, number in tokenizer["model"]["vocab"].items()}
    added = {entry["id"]: entry for entry in tokenizer["added_tokens"]}
    if (most := max([*words, *added])) >= size:
        raise UsageError(
            f"the tokenizer has a token of the number {most}, the model only {size} words",
            fix="use the tokenizer files that the model was published with",
        )
    unknown = tokenizer["model"].get("unk_token")
    found = []
    for number in range(size):
        if number in added:
            entry = added[number]
            kind = TokenType.CONTROL if entry["special"] else TokenType.USER_DEFINED
            found.append((entry["content"], TokenType.UNKNOWN if entry["content"] == unknown else kind))
        elif number in words:
            word = words[number]
            byte = tokenizer["model"].get("byte_fallback") and len(word) == 6 and word.startswith("<0x")
            found.append((word, TokenType.BYTE if byte else TokenType.NORMAL))
        else:
            found.append((f"[PAD{number}]", TokenType.UNUSED))
    return tuple(word for word, _ in found), tuple(kind for _, kind in found)


def _scores(tokens: Sequence[str], merges: Sequence[Sequence[str]]) -> tuple[float, ...]:
    """llama.cpp merges the pair whose union scores highest, tokenizers the pair that is listed first."""
    rank: dict[str, int] = {}
    for place, pair in enumerate(merges):
        rank.setdefault("".join(pair), place)
    return tuple(-float(rank[token]) if token in rank else NEVER_MERGED for token in tokens)


def _space(tokenizer: dict[str, Any]) -> Space:
    for step in [*_steps(tokenizer["normalizer"]), *_steps(tokenizer["pre_tokenizer"])]:
        if step["type"] == "Prepend":
            return "always"
        if step["type"] == "Metaspace":
            return step["prepend_scheme"]
    return "never"


def for_llama(words: Vocabulary, prompt: str) -> str:
    """The prompt that llama.cpp reads as the same tokens: it knows spaces before every part or none, not before the
    first alone. Nothing goes before a special token or an image."""
    special = tuple(token for token, kind in zip(words.tokens, words.types, strict=True) if kind in SPECIAL)
    if words.space != "first" or prompt.startswith((" ", "▁", IMAGE, *special)):
        return prompt
    return f" {prompt}"


def _cuts(tokenizer: dict[str, Any]) -> str:
    """``tokenizer.ggml.pre``."""
    steps = _steps(tokenizer["pre_tokenizer"])
    if not steps or steps[-1]["type"] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        raise UsageError("llama.cpp does not know this tokenizer (BPE, not of bytes)", fix=FIX)
    before = [_expression(step) for step in steps[:-1]]
    key, own = "".join(before), steps[-1]["use_regex"]
    if len(before) > 1 or key not in BYTE_LEVEL_CUTS or own != (key in ("", "digits")):
        raise UsageError(f"llama.cpp does not know how this tokenizer cuts texts ({key or 'not'})", fix=FIX)
    return BYTE_LEVEL_CUTS[key]


def _expression(step: dict[str, Any]) -> str:
    if step == {"type": "Digits", "individual_digits": True}:
        return "digits"
    if step["type"] != "Split" or step["behavior"] != "Isolated" or step["invert"]:
        return f"a step {step['type']}"
    return str(step["pattern"].get("Regex", "a string"))


def _steps(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    if part is None:
        return []
    inner = part.get("pretokenizers") or part.get("normalizers")
    return list(inner) if part["type"] == "Sequence" and inner else [part]


def describe(writer: gguf.GGUFWriter, words: Vocabulary, specials: Specials) -> None:
    """The ``tokenizer.*`` fields. Ends beyond the first are "end of turn" and "end of message" to llama.cpp."""
    writer.add_tokenizer_model(words.model)
    writer.add_tokenizer_pre(words.pre)
    writer.add_token_list(list(words.tokens))
    writer.add_token_types(list(words.types))
    if words.model == "llama":
        writer.add_token_scores(list(words.scores))
        writer.add_add_space_prefix(words.space == "always")
    else:
        writer.add_token_merges(list(words.merges))
    ends = (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id)
    others = (writer.add_bos_token_id, writer.add_pad_token_id, writer.add_unk_token_id)
    numbers = (specials.bos, specials.pad, specials.unknown)
    for add, number in [*zip(ends, specials.ends, strict=False), *zip(others, numbers, strict=True)]:
        if number is not None:
            add(number)
    writer.add_add_bos_token(specials.adds_bos)
    writer.add_add_eos_token(False)
    if specials.chat_template:
        writer.add_chat_template(specials.chat_template)
