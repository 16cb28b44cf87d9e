"""Tokenizers of transformers as one ``tokenizer.json`` that the ``tokenizers`` package runs alone.

Folders of every kind are read by transformers itself (tokenizer.json, vocab.txt, vocab.json with merges,
tokenizer.model). SigLIP's is the one that it runs in Python, on sentencepiece; it is rebuilt here. Each result
is compared with the original on ``PROBES`` before it is used.
"""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors
from transformers import AutoTokenizer, PretrainedConfig
from transformers.convert_slow_tokenizer import import_protobuf

from edge_rsvlm.errors import UsageError

FILE = "tokenizer.json"
SPACE = "▁"  # sentencepiece's mark of a word's start
UNIGRAM = 1
CONTROL, USER_DEFINED = 3, 4
UNLIMITED = 1_000_000  # transformers writes 1e30 where a tokenizer has no limit of its own

ADD_FILES = "add the tokenizer files that the model was published with"

PROBES = (
    "a photo of a cat",
    "Two airplanes are parked beside Terminal 3.",
    "  leading, trailing and   inner spaces  ",
    "What is the colour of the roof?\nred\tor grey",
    "it's 42,000 m² – 3.5%",
    "UPPER lower CamelCase snake_case",
    "don't; (brackets) [and] {braces} <tags> #1 @x & so/on",
    "naïve café, Ωmega, İstanbul, ﬁne",
    "飞机停在跑道上。",
    "самолёт на аэродроме",
    "🛩️ over 🌊🌊",
    "",
    "!?",
    "a" * 70 + " " + "harbour with ships " * 12,
)


def load_tokenizer(folder: Path, config: PretrainedConfig | None = None) -> Any:
    """The checkpoint's tokenizer."""
    try:
        found = AutoTokenizer.from_pretrained(folder, config=config, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError) as exc:
        raise UsageError(
            f"{folder}: no tokenizer could be read ({(str(exc).splitlines() or [type(exc).__name__])[0]})",
            fix=ADD_FILES,
        ) from exc
    _check_files(folder, found)
    return found


def _check_files(folder: Path, tokenizer: Any) -> None:
    """Some classes make up an empty vocabulary where its files are absent."""
    names = [name for key, name in tokenizer.vocab_files_names.items() if key != "tokenizer_file"]
    absent = [name for name in names if not (folder / name).is_file()]
    if not (folder / FILE).is_file() and (absent or not names):
        raise UsageError(f"{folder} has neither {FILE} nor {', '.join(absent)}", fix=ADD_FILES)


def tokenizer_json(tokenizer: Any) -> bytes:
    """``tokenizer.json`` with the ids of ``tokenizer`` on every one of PROBES; raises UsageError where they differ."""
    if getattr(tokenizer, "backend_tokenizer", None) is not None:
        made = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    elif type(tokenizer).__name__ == "SiglipTokenizer":
        made = _from_siglip(tokenizer)
    else:
        raise UsageError(
            f"{type(tokenizer).__name__} runs in Python only",
            fix="save the checkpoint with a fast tokenizer (tokenizer.json)",
        )
    made.no_padding()
    made.no_truncation()
    _compare(tokenizer, made)
    text: str = made.to_str()
    return text.encode()


def tokenizer_fields(tokenizer: Any, longest: int | None = None, pad_to: int | None = None) -> dict[str, Any]:
    """The manifest's Tokenizer: special tokens added, texts cut at ``longest`` or the tokenizer's own limit."""
    limits = [limit for limit in (tokenizer.model_max_length, longest, pad_to) if limit and limit < UNLIMITED]
    return {
        "file": FILE,
        "add_special_tokens": True,
        "max_length": int(min(limits)) if limits else None,
        "pad_to": pad_to,
        "pad_id": tokenizer.pad_token_id or 0,
    }


def _compare(tokenizer: Any, made: Tokenizer) -> None:
    for text in PROBES:
        for special in (True, False):
            want = list(tokenizer(text, add_special_tokens=special)["input_ids"])
            got = made.encode(text, add_special_tokens=special).ids
            if got != want:
                raise UsageError(
                    f"the tokenizer could not be carried over: {text!r} gives {got[:12]} instead of {want[:12]}",
                    fix="save the checkpoint with a fast tokenizer (tokenizer.json) that gives the same ids",
                )


def _from_siglip(tokenizer: Any) -> Tokenizer:
    """Transformers' SiglipTokenizer: lower case, no punctuation, single spaces, then a sentencepiece unigram model."""
    proto = import_protobuf().ModelProto()
    proto.ParseFromString(tokenizer.sp_model.serialized_model_proto())
    if proto.trainer_spec.model_type != UNIGRAM:
        raise UsageError(
            "spiece.model is not a unigram model", fix="save the checkpoint with a fast tokenizer (tokenizer.json)"
        )
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    made = Tokenizer(models.Unigram(pieces, unk_id=proto.trainer_spec.unk_id, byte_fallback=False))
    made.normalizer = _siglip_normalizer(tokenizer.do_lower_case, proto.normalizer_spec)
    made.decoder = decoders.Metaspace(replacement=SPACE, prepend_scheme="always")
    made.post_processor = processors.TemplateProcessing(
        single=f"$A {tokenizer.eos_token}", special_tokens=[(tokenizer.eos_token, tokenizer.eos_token_id)]
    )
    made.add_tokens(
        [
            AddedToken(piece.piece, normalized=False, special=piece.type == CONTROL)
            for piece in proto.pieces
            if piece.type in (CONTROL, USER_DEFINED)
        ]
    )
    made.add_tokens([token for _, token in sorted(tokenizer.added_tokens_decoder.items())])
    return made


def _siglip_normalizer(lower: bool, spec: Any) -> Any:
    """What happens to a text before it is cut into pieces; the model's own character map is in ``spec``."""
    first = [normalizers.Lowercase()] if lower else []
    canonical = [
        normalizers.Replace(SPACE, " "),
        normalizers.Replace(Regex(f"[{_escaped(string.punctuation)}]"), ""),
        normalizers.Replace(Regex(r"\s+"), " "),
        normalizers.Strip(left=False, right=True),
        normalizers.Prepend(SPACE),
    ]
    mapped = [normalizers.Precompiled(spec.precompiled_charsmap)] if spec.precompiled_charsmap else []
    marked = [normalizers.Replace(Regex(" +"), SPACE), normalizers.Replace(Regex(f"{SPACE}+$"), "")]
    return normalizers.Sequence([*first, *canonical, *mapped, *marked])


def _escaped(characters: str) -> str:
    return "".join(f"\\{character}" for character in characters)
