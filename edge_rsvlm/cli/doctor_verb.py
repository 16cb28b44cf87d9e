from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from edge_rsvlm.cli.common import allow_older, bundle_options, json_option


@click.command("doctor")
@bundle_options
@json_option
def command(bundle: Path | None, allow_unsigned: bool, as_json: bool) -> None:
    """Show what works on this machine, and where a bundle runs on it."""
    from edge_rsvlm.bundle import load_bundle
    from edge_rsvlm.doctor import examine

    facts = examine(load_bundle(bundle, allow_unsigned=allow_unsigned, allow_older=allow_older()))
    if as_json:
        click.echo(json.dumps(facts))
        return
    for topic, fact in facts.items():
        click.echo(f"{topic:>22}  {_text(fact)}")


def _text(fact: Any) -> str:
    if isinstance(fact, dict):
        return "; ".join(f"{key}: {_text(value)}" for key, value in fact.items())
    return ", ".join(map(str, fact)) if isinstance(fact, list) else str(fact)
