"""Config files in TOML."""

from __future__ import annotations

import sys
from pathlib import Path

from edge_rsvlm.config.lines import line_of
from edge_rsvlm.config.model import M, parse
from edge_rsvlm.errors import UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def load_toml(model: type[M], path: Path, what: str) -> M:
    """The file as ``model``; UsageError names the wrong key or line, or that ``what`` cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
        data = tomllib.loads(text)
    except OSError as exc:
        raise UsageError(f"cannot read {path}: {exc.strerror}", fix=f"name an existing {what}") from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise UsageError(f"{path} is not TOML: {exc}", fix="correct that line") from exc
    # Written out, though code may leave it out: a file outlives the version that it was written for.
    where = lambda keys: f", line {line_of(text, keys)}"  # noqa: E731
    return parse(model, {"version": 0, **data}, f"{what} {path}", UsageError, where)
