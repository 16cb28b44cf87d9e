"""The words that a model learnt: a text with another is refused, since its embedding would mean nothing."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Sequence, Set
from pathlib import Path

from edge_rsvlm.errors import BundleError, UsageError

LETTERS = re.compile(r"[^\W\d_]+")
NEAREST = 3
CUTOFF = 0.6
"""Of difflib's ratio: below it two words have little in common."""


def check_words(texts: Sequence[str], vocabulary: Path | None, *, examples: bool) -> None:
    """UsageError where ``texts`` have words that the file ``vocabulary`` does not; None: any word will do.

    The error names the unknown words and the known ones nearest to them and, where the bundle finds objects by
    ``examples``, how to give one. Words are runs of letters, in lower case: digits and punctuation do not count.
    """
    if vocabulary is None:
        return
    known = read_vocabulary(vocabulary)
    unknown = unknown_words(texts, known)
    if not unknown:
        return
    ordered = sorted(known)
    near = dict.fromkeys(n for word in unknown for n in difflib.get_close_matches(word, ordered, NEAREST, CUTOFF))
    hint = f"the nearest that it knows: {', '.join(near)}" if near else "say it in other words"
    advice = ", or give an example: detect --like IMAGE#x,y,w,h" if examples else ""
    raise UsageError(f"this bundle never learnt {_quoted(unknown)}", fix=f"{hint}{advice}")


def unknown_words(texts: Sequence[str], known: Set[str]) -> list[str]:
    """Each word of ``texts`` that is not known, once."""
    return [word for word in dict.fromkeys(word for text in texts for word in words(text)) if word not in known]


def words(text: str) -> list[str]:
    """The words of a text as a vocabulary has them."""
    return LETTERS.findall(unicodedata.normalize("NFC", text).lower())


def read_vocabulary(path: Path) -> frozenset[str]:
    """The words of a file, one a line; BundleError where it holds anything else."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as exc:
        raise BundleError(f"{path.name} is not UTF-8 ({exc})", fix="make the bundle again") from exc
    if not lines:
        raise BundleError(f"{path.name} has no word", fix="make the bundle again")
    for number, line in enumerate(lines, start=1):
        if words(line) != [line]:
            raise BundleError(
                f"{path.name}, line {number}: '{line}' is no word in lower case", fix="make the bundle again"
            )
    return frozenset(lines)


def _quoted(words: Sequence[str]) -> str:
    return ", ".join(f"'{word}'" for word in words)
