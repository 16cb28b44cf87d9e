from __future__ import annotations

import json
from typing import Any

import click

from edge_rsvlm.cli.common import json_option


@click.command("doctor")
@json_option
def command(as_json: bool) -> None:
    """Show what works on this machine: kernels, engines, raster formats."""
    from edge_rsvlm.doctor import examine

    facts = examine()
    if as_json:
        click.echo(json.dumps(facts))
        return
    for topic, fact in facts.items():
        click.echo(f"{topic:>22}  {_text(fact)}")


def _text(fact: Any) -> str:
    if isinstance(fact, dict):
        return "; ".join(f"{key}: {_text(value)}" for key, value in fact.items())
    return ", ".join(map(str, fact)) if isinstance(fact, list) else str(fact)
