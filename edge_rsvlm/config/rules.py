"""``RULES.toml``: which changes are worth an alert.

version = 1
budget = 20                  # most alerts of one pass, highest score first; what was held back is counted

[[rule]]
name = "forest loss"
from = ["trees"]             # what it was and what it is, as changes name it; left out: anything
to = ["bare soil", "sealed ground"]   # also grass, water, sand and unknown
query = "vegetation lost"    # words that must all stand in from, to, or what the spectrum says
area = "reserve.geojson"     # polygons that the change must touch; relative to this file
min_area = "500 m2"          # or a number of square metres, or "2 ha"
min_area_px = 40             # instead, for scenes that have no place on Earth
min_score = 0.4
persistence = 2              # seen at the same place on so many dates
cooldown = "7d"              # no second alert of the same place within
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from edge_rsvlm.config.areas import Area, read_area
from edge_rsvlm.config.cover import COVER, MEANINGS, UNKNOWN
from edge_rsvlm.config.lines import line_of
from edge_rsvlm.config.model import Model
from edge_rsvlm.config.toml import load_toml
from edge_rsvlm.config.units import parse_area, parse_seconds
from edge_rsvlm.errors import UsageError

MOST_DATES = 100
BUDGET, MOST_BUDGET = 100, 1000
"""Alerts of one pass are held until it ends, so that there must be an end to them."""
CLASSES = (*COVER, UNKNOWN)
WORDS = frozenset(word for text in (*CLASSES, *MEANINGS) for word in text.split())


def _square_metres(value: Any) -> Any:
    return _quantity(parse_area, value) if isinstance(value, str) else value


def _seconds(value: Any) -> Any:
    if isinstance(value, str):
        return _quantity(parse_seconds, value)
    raise PydanticCustomError("quantity", 'a time has a unit, like "12h" or "7d"')


def _quantity(parse: Any, text: str) -> float:
    """Errors as pydantic wants them, so that they come with the place."""
    try:
        found: float = parse(text)
    except UsageError as exc:
        raise PydanticCustomError("quantity", "{said}", {"said": str(exc)}) from exc
    return found


def _class(text: str) -> str:
    if text not in CLASSES:
        raise PydanticCustomError("class", "no change names '{text}': {known}", {"text": text, "known": _all(CLASSES)})
    return text


def _query(text: str) -> str:
    strange = [word for word in query_words(text) if word not in WORDS]
    if strange or not query_words(text):
        said = {"words": strange[0] if strange else "", "known": _all((*CLASSES, *MEANINGS))}
        raise PydanticCustomError("query", "no change is told with '{words}': {known}", said)
    return text


def query_words(text: str) -> tuple[str, ...]:
    """The words of a query, as labels have them."""
    return tuple(re.findall(r"[^\W\d_]+", text.lower()))


def _all(words: tuple[str, ...]) -> str:
    return ", ".join(words)


Classes = tuple[Annotated[str, BeforeValidator(lambda v: _class(v) if isinstance(v, str) else v)], ...]


class Rule(Model):
    """One ``[[rule]]``. Areas are in square metres and times in seconds."""

    name: str = Field(min_length=1, max_length=80)
    from_: Classes = Field(default=(), alias="from")
    to: Classes = ()
    query: Annotated[str, BeforeValidator(lambda v: _query(v) if isinstance(v, str) else v)] | None = None
    area: str | None = None
    min_area: Annotated[float, BeforeValidator(_square_metres), Field(gt=0)] | None = None
    min_area_px: int | None = Field(default=None, ge=1)
    min_score: float = Field(default=0.0, ge=0, le=1)
    persistence: int = Field(default=1, ge=1, le=MOST_DATES)
    cooldown: Annotated[float, BeforeValidator(_seconds)] = 0.0

    @property
    def labelled(self) -> bool:
        """Whether it asks what the ground was or is."""
        return bool(self.from_ or self.to)

    @property
    def remembers(self) -> bool:
        """Whether it depends on what was seen before."""
        return self.persistence > 1 or self.cooldown > 0


class RulesFile(Model):
    version: Literal[1]
    budget: int = Field(default=BUDGET, ge=1, le=MOST_BUDGET)
    rule: tuple[Rule, ...] = Field(min_length=1)


@dataclass(frozen=True)
class Rules:
    """Rules ready to be applied: ``areas`` are those that they name, read, by the name they have there."""

    rules: tuple[Rule, ...]
    budget: int = BUDGET
    areas: Mapping[str, Area] = field(default_factory=dict)

    def area(self, rule: Rule) -> Area | None:
        """The area of interest of a rule, if it has one."""
        return None if rule.area is None else self.areas[rule.area]


def load_rules(path: Path) -> Rules:
    """Read and check a file and the areas that it names; UsageError names the line of the first mistake."""
    found = load_toml(RulesFile, path, "rules")
    names: set[str] = set()
    areas: dict[str, Area] = {}
    for place, rule in enumerate(found.rule):
        if rule.name in names:
            problem = f"a rule before it is called '{rule.name}' too"
            raise UsageError(f"{_at(path, place, 'name')}: {problem}", fix="give each rule a name of its own")
        names.add(rule.name)
        if rule.area is not None and rule.area not in areas:
            try:
                areas[rule.area] = read_area(path.parent / rule.area)
            except UsageError as exc:
                said = str(exc).removesuffix(f"; {exc.fix}")
                raise UsageError(f"{_at(path, place, 'area')}: {said}", fix=exc.fix) from exc
    return Rules(found.rule, found.budget, areas)


def _at(path: Path, place: int, key: str) -> str:
    return f"rules {path}, line {line_of(path.read_text(encoding='utf-8'), ('rule', place, key))}"
