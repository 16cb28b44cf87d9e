from __future__ import annotations

import json

import click

from edge_rsvlm.cli.common import json_option


@click.command("profiles")
@click.argument("name", required=False)
@json_option
def command(name: str | None, as_json: bool) -> None:
    """List the devices whose facts are known, or show the facts of NAME."""
    from edge_rsvlm import profiles

    chosen = [name] if name else profiles.names()
    facts = {profile: profiles.load(profile) for profile in chosen}
    if as_json:
        click.echo(json.dumps(facts))
    elif name:
        for key, value in facts[name].items():
            click.echo(f"{key:>22}  {value}")
    else:
        for profile, fact in facts.items():
            run = "executed" if fact["executed"] else "never executed there"
            click.echo(f"{profile:>22}  {fact['description']} ({run})")
