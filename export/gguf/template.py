"""The prompt of a GGUF file: its own chat template, expanded to a string with ``{image}`` and ``{text}``.

libmtmd writes what a model has around an image, so that what the template writes for one is left out.
"""

from __future__ import annotations

from typing import Any

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

from edge_rsvlm.errors import UsageError
from edge_rsvlm.export.families.chat import IMAGE, MARK, TEXT

IMAGE_MARK = "IMAGEGOESHERE"


def expand(template: str, specials: dict[str, str], where: str) -> str:
    """``template`` for one turn of the user, an image and then a text, and the opening of the answer.

    ``specials`` are its variables (bos_token, eos_token). UsageError for a template that does not write the text once.
    """
    prompt = _typed(template, specials) or _plain(template, specials)
    if prompt is None:
        raise UsageError(
            f"{where}: the chat template does not write an image and the text of a question once each",
            fix="use a file with the chat template that the model was published with",
        )
    return prompt


def _typed(template: str, specials: dict[str, str]) -> str | None:
    """By a template that knows of images: what it writes for one is what is there with it, and not without it."""
    text = {"type": "text", "text": MARK}
    without, given = (_render(template, specials, content) for content in ([text], [{"type": "image"}, text]))
    if without is None or given is None or without == given or given.count(MARK) != 1:
        return None
    pairs = enumerate(zip(without, given, strict=False))
    begins = next((n for n, (left, right) in pairs if left != right), len(without))
    same, (between, found, rest) = given[:begins], given[begins:].partition(MARK)
    image = between.strip()
    if not found or not image:
        return None
    before, after = between.split(image)
    return f"{same}{before}{IMAGE}{after}{TEXT}{rest}"


def _plain(template: str, specials: dict[str, str]) -> str | None:
    """By a template that knows only text, in which llama.cpp writes the image itself."""
    given = _render(template, specials, f"{IMAGE_MARK}\n{MARK}")
    if given is None or given.count(MARK) != 1 or given.count(IMAGE_MARK) != 1:
        return None
    return given.replace(IMAGE_MARK, IMAGE).replace(MARK, TEXT)


def _render(template: str, specials: dict[str, str], content: Any) -> str | None:
    """In transformers' sandbox, since anybody may have written the template."""
    turn = [{"role": "user", "content": content}]
    try:
        (rendered,), _ = render_jinja_template([turn], chat_template=template, add_generation_prompt=True, **specials)
    except (jinja2.TemplateError, TypeError, KeyError, ValueError, AttributeError):
        return None
    return str(rendered)
