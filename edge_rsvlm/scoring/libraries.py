"""Libraries that score, imported when first used."""

from __future__ import annotations

import importlib
from typing import Any

from edge_rsvlm.errors import UsageError


def require(*modules: str) -> list[Any]:
    """The named modules; UsageError with the install command when one is missing."""
    try:
        return [importlib.import_module(name) for name in modules]
    except ImportError as exc:
        raise UsageError(f"scoring needs {exc.name}", fix="pip install 'edge-rsvlm[eval]'") from exc


def detection_libraries() -> list[Any]:
    return require("pycocotools.coco", "pycocotools.cocoeval")


def caption_libraries() -> list[Any]:
    return require("pycocoevalcap.cider.cider", "pycocoevalcap.bleu.bleu", "pycocoevalcap.bleu.bleu_scorer")
