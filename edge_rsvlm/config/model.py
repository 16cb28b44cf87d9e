"""The base of every config model: frozen, and strict about keys it does not know."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError

from edge_rsvlm.errors import EdgeRsvlmError

M = TypeVar("M", bound="Model")
Keys = tuple[str | int, ...]
LONGEST_SHOWN = 80
_QUOTE = "'"


class Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def parse(
    model: type[M], data: Any, what: str, error: type[EdgeRsvlmError], where: Callable[[Keys], str] = lambda _: ""
) -> M:
    """``data`` as ``model``; raises ``error`` naming the first wrong key of ``what`` and the nearest known one.

    ``where`` says of keys, from the document down, where they stand: it comes after ``what``.
    """
    try:
        return model.model_validate(data)
    except ValidationError as exc:
        message, fix = next(_mistakes(model, exc))
        keys = exc.errors(include_url=False, include_input=False)[0]["loc"]
        raise error(f"{what}{where(keys)}: {message}", fix=fix) from exc


def mistakes(model: type[Model], data: Any, most: int) -> list[tuple[str, str]]:
    """What keeps ``data`` from being a ``model``, as (message, fix): at most ``most``, none where it is one."""
    try:
        model.model_validate(data)
    except ValidationError as exc:
        return [found for found, _ in zip(_mistakes(model, exc), range(most), strict=False)]
    return []


def printable(text: object) -> str:
    """Foreign text that is safe to print: short, on one line, without control codes or broken characters."""
    shown = str(text)
    if len(shown) > LONGEST_SHOWN:
        shown = f"{shown[:LONGEST_SHOWN]}..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in shown)


def _mistakes(model: type[BaseModel], exc: ValidationError) -> Iterator[tuple[str, str]]:
    for problem in exc.errors(include_url=False, include_input=False):
        path = ".".join(printable(part) for part in problem["loc"]) or "document"
        yield f"'{path}': {_message(problem)}", _advice(model, problem)


def _message(problem: Any) -> str:
    if problem["type"] == "union_tag_invalid":
        return f"no known {problem['ctx']['discriminator'].strip(_QUOTE)} is '{printable(problem['ctx']['tag'])}'"
    if problem["type"] == "union_tag_not_found":
        return f"it has no {problem['ctx']['discriminator'].strip(_QUOTE)}"
    text: str = problem["msg"]
    return text[:1].lower() + text[1:]


def _advice(model: type[BaseModel], problem: Any) -> str:
    if problem["type"] == "union_tag_invalid":
        known = [tag.strip().strip(_QUOTE) for tag in problem["ctx"]["expected_tags"].split(",")]
        return _nearest(problem["ctx"]["tag"], known, "known ones")
    if problem["type"] == "extra_forbidden":
        return _nearest(problem["loc"][-1], _known_keys(model, problem["loc"][:-1]), "known keys here")
    return "add it" if problem["type"] in ("missing", "union_tag_not_found") else "correct this value"


def _nearest(wrong: object, known: list[str], label: str) -> str:
    # Cut first: the comparison is quadratic in the length of a key, which a stranger chose.
    near = difflib.get_close_matches(str(wrong)[:LONGEST_SHOWN], known, n=1)
    return f"did you mean '{near[0]}'?" if near else f"{label}: {', '.join(known)}"


def _known_keys(model: type[BaseModel], path: tuple[Any, ...]) -> list[str]:
    """Field names of the model that ``path`` leads to."""
    here: list[Any] = [model]
    for part in path:
        here = [below for annotation in here for below in _step(annotation, part)]
    models = [leaf for annotation in here for leaf in _leaves(annotation) if _is_model(leaf)]
    fields = [(name, field) for found in models for name, field in found.model_fields.items()]
    return list(dict.fromkeys(field.alias or name for name, field in fields))


def _step(annotation: Any, part: Any) -> Iterator[Any]:
    """Annotations one step below ``annotation``: a field, an item, or the member of a union that a tag names."""
    for leaf in _leaves(annotation):
        if _is_model(leaf):
            if part in leaf.model_fields:
                yield leaf.model_fields[part].annotation
            elif any(part in get_args(field.annotation) for field in _tags(leaf)):
                yield leaf
        elif get_origin(leaf) in (dict, Mapping):
            yield get_args(leaf)[1]
        elif get_origin(leaf) in (tuple, list):
            yield get_args(leaf)[0]


def _leaves(annotation: Any) -> Iterator[Any]:
    """The members of unions, without their ``Annotated``."""
    if get_origin(annotation) is Annotated:
        yield from _leaves(get_args(annotation)[0])
    elif get_origin(annotation) in (dict, Mapping, tuple, list, Literal) or not get_args(annotation):
        yield annotation
    else:
        for member in get_args(annotation):
            yield from _leaves(member)


def _tags(model: type[BaseModel]) -> list[Any]:
    return [field for field in model.model_fields.values() if get_origin(field.annotation) is Literal]


def _is_model(leaf: Any) -> bool:
    # Python 3.10 calls dict[str, int] an instance of type.
    return isinstance(leaf, type) and get_origin(leaf) is None and issubclass(leaf, BaseModel)
