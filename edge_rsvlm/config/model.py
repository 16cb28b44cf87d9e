"""The base of every config model: frozen, and strict about keys it does not know."""

from __future__ import annotations

import difflib
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from edge_rsvlm.errors import EdgeRsvlmError

M = TypeVar("M", bound="Model")


class Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def parse(model: type[M], data: Any, what: str, error: type[EdgeRsvlmError]) -> M:
    """``data`` as ``model``; raises ``error`` naming the first wrong key of ``what`` and the nearest known one."""
    try:
        return model.model_validate(data)
    except ValidationError as exc:
        first = exc.errors()[0]
        path = ".".join(str(part) for part in first["loc"]) or "document"
        raise error(f"{what}: '{path}': {first['msg'].lower()}", fix=_advice(model, first)) from exc


def _advice(model: type[BaseModel], problem: Any) -> str:
    if problem["type"] != "extra_forbidden":
        return "correct this value"
    known = _known_keys(model, problem["loc"][:-1])
    near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1)
    return f"did you mean '{near[0]}'?" if near else f"known keys here: {', '.join(known)}"


def _known_keys(model: type[BaseModel], path: tuple[Any, ...]) -> list[str]:
    """Field names of the model that ``path`` leads to, as far as it can be followed."""
    for part in path:
        field = model.model_fields.get(str(part))
        if field is None:
            continue  # an index of a list, or a key of a mapping
        candidates = [field.annotation, *getattr(field.annotation, "__args__", ())]
        nested = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        if not nested:
            return []
        model = nested[0]
    return list(model.model_fields)
