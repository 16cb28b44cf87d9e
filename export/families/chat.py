"""Prompts: a checkpoint's own chat template, expanded at export to a string with ``{image}`` and ``{text}``.

One turn of the user, an image and then a text, and the opening of the answer. The runtime fills in the two and encodes
the whole; it knows no template language.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from edge_rsvlm.errors import UsageError

IMAGE, TEXT = "{image}", "{text}"
MARK = "QUESTIONGOESHERE"
"""Stands for the text while a template is rendered: what templates trim or escape is not in it."""


@dataclass(frozen=True)
class Prompt:
    """``text`` with one ``{image}`` and one ``{text}``, and whether the tokenizer still has to add BOS and the like."""

    text: str
    add_special_tokens: bool


def read_template(folder: Path, tokenizer: Any) -> str | None:
    """The chat template of the processor, else the tokenizer's, in the order in which transformers looks for it."""
    for candidate in (
        _json_key(folder / "processor_config.json"),
        _json_key(folder / "chat_template.json"),
        _text(folder / "chat_template.jinja"),
        getattr(tokenizer, "chat_template", None),
    ):
        template = candidate.get("default") if isinstance(candidate, dict) else candidate
        if template:
            return str(template)
    return None


def expand(folder: Path, tokenizer: Any, image_token: str, otherwise: str) -> Prompt:
    """The prompt of a checkpoint; ``otherwise`` is its family's, where it has no template.

    Raises UsageError for a template that does not write the image and the text once each.
    """
    template = read_template(folder, tokenizer)
    prompt = otherwise if template is None else _expand_template(folder, tokenizer, template, image_token)
    return Prompt(prompt, adds_special_tokens(tokenizer, prompt))


def adds_special_tokens(tokenizer: Any, prompt: str) -> bool:
    """A template that writes BOS itself leaves nothing to add (as in ProcessorMixin.apply_chat_template)."""
    return tokenizer.bos_token is None or not prompt.startswith(tokenizer.bos_token)


def render(tokenizer: Any, template: str, content: Any) -> str:
    """One turn of the user and the opening of the answer, by transformers."""
    rendered: str = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], chat_template=template, tokenize=False, add_generation_prompt=True
    )
    return rendered


def contents(image_token: str, text: str) -> tuple[Any, str]:
    """The user's turn for templates that know of images, and for those that know only text."""
    return [{"type": "image"}, {"type": "text", "text": text}], f"{image_token}\n{text}"


def render_turn(folder: Path, tokenizer: Any, template: str, image_token: str, text: str) -> str:
    """``text`` and an image by whichever of ``contents`` this template takes."""
    for content in contents(image_token, text):
        try:
            rendered = render(tokenizer, template, content)
        except (jinja2.TemplateError, TypeError, KeyError):
            continue
        if rendered.count(text) == 1 and rendered.count(image_token) == 1:
            return rendered
    raise UsageError(
        f"{folder}: the chat template does not write one {image_token} and the text of a question",
        fix="use the chat template that the model was published with",
    )


def _expand_template(folder: Path, tokenizer: Any, template: str, image_token: str) -> str:
    rendered = render_turn(folder, tokenizer, template, image_token, MARK)
    return rendered.replace(image_token, IMAGE).replace(MARK, TEXT)


def _json_key(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")).get("chat_template") if path.is_file() else None


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None
