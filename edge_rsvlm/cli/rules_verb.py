from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from edge_rsvlm.config.rules import Rule, Rules

WIDTH = 100
UNITS = ((86400, "day"), (3600, "hour"), (60, "minute"), (1, "second"))


@click.group("rules")
def command() -> None:
    """Check the rules that turn changes into alerts."""


@command.command("check")
@click.argument("file", type=click.Path(path_type=Path))
def check(file: Path) -> None:
    """Say in plain words what each rule of FILE asks for. A mistake is named with its line, and exits with 2."""
    from edge_rsvlm.config.rules import load_rules

    rules = load_rules(file)
    paragraphs = [_explained(rule, rules) for rule in rules.rules]
    budget = f"At most {rules.budget} alerts of one comparison are told, highest score first; the others are counted."
    click.echo("\n\n".join(textwrap.fill(text, WIDTH) for text in [*paragraphs, budget]))


def _explained(rule: Rule, rules: Rules) -> str:
    said = [f"{rule.name}: a change{_classes(rule)} is told{_where(rule, rules)}{_least(rule)}."]
    if rule.min_area is not None or rule.area is not None:
        said.append(_unlocated(rule))
    if rule.persistence > 1:
        said.append(f"It must be seen at the same place on {rule.persistence} dates before it is told.")
    if rule.cooldown:
        said.append(f"The same place is not told again within {_time(rule.cooldown)}.")
    else:
        said.append("The same place is told on every date on which the change is seen.")
    return " ".join(said)


def _classes(rule: Rule) -> str:
    parts = [f"from {' or '.join(rule.from_)}"] if rule.from_ else []
    parts += [f"to {' or '.join(rule.to)}"] if rule.to else []
    if rule.query is not None:
        parts.append(f"whose labels or spectrum say '{rule.query}'")
    return f" {' '.join(parts)}" if parts else " of any kind"


def _where(rule: Rule, rules: Rules) -> str:
    area = rules.area(rule)
    if area is None:
        return ""
    return f" where it touches {rule.area} ({len(area)} polygon{'' if len(area) == 1 else 's'})"


def _least(rule: Rule) -> str:
    least = [f"it is {rule.min_area:,.10g} m2 or larger"] if rule.min_area is not None else []
    least += [f"its score is {rule.min_score:g} or higher"] if rule.min_score else []
    return f" when {' and '.join(least)}" if least else ""


def _unlocated(rule: Rule) -> str:
    """What holds for scenes that have no place on Earth."""
    if rule.area is not None:
        return "In a scene without coordinates it is never told, since nobody knows whether it touches the area."
    if rule.min_area_px is not None:
        return f"In a scene without coordinates {rule.min_area_px:,} pixels count instead."
    return "In a scene without coordinates it is never told: min_area_px would say how many pixels count there."


def _time(seconds: float) -> str:
    size, unit = next(((size, unit) for size, unit in UNITS if seconds >= size and seconds % size == 0), UNITS[-1])
    count = seconds / size
    return f"{count:g} {unit}{'' if count == 1 else 's'}"
