"""What can be known to fail before the work starts: where an export would write."""

from __future__ import annotations

import os
from pathlib import Path

from edge_rsvlm.config.manifest import MANIFEST_NAME
from edge_rsvlm.errors import UsageError
from edge_rsvlm.export.recipe import Recipe


def check_places(recipe: Recipe) -> None:
    """UsageError where the bundle would replace something else, or cannot be written."""
    out, checkpoint = recipe.out, recipe.checkpoint.resolve()
    for path in (out, recipe.work_folder):
        if checkpoint in (path.resolve(), *path.resolve().parents):
            raise UsageError(f"{path} lies in the checkpoint, which is only read", fix="name a place outside of it")
        _check_writable(path)
    if out.exists() and not _may_replace(out):
        raise UsageError(f"{out} is there, and is no bundle that could be replaced", fix="name another --out")


def _may_replace(out: Path) -> bool:
    return out.is_dir() and ((out / MANIFEST_NAME).is_file() or not any(out.iterdir()))


def _check_writable(path: Path) -> None:
    """The nearest folder that is there takes new ones."""
    nearest = next(parent for parent in path.absolute().parents if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise UsageError(f"{path} cannot be made: {nearest} takes no new files", fix="name another place")
