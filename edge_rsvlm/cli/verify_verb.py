from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from edge_rsvlm.cli.common import bundle_options, json_option


@click.command("verify")
@bundle_options
@json_option
def command(bundle: Path | None, allow_unsigned: bool, as_json: bool) -> None:
    """Check a bundle: its hashes, and its golden probe run here. Exit 5 if anything differs."""
    from edge_rsvlm.bundle import load_bundle
    from edge_rsvlm.verify import replay_probe

    loaded = load_bundle(bundle, allow_unsigned=allow_unsigned)
    results = replay_probe(loaded)
    passed = all(result.passed for result in results)
    if as_json:
        checks = {r.output: {"difference": r.difference, "tolerance": r.tolerance} for r in results}
        click.echo(json.dumps({"bundle": loaded.manifest.name, "passed": passed, "files": "match", "probe": checks}))
    else:
        click.echo(
            f"{loaded.manifest.name} version {loaded.manifest.version}: {len(loaded.manifest.files)} files match"
        )
        for result in results:
            verdict = "ok" if result.passed else "DIFFERS"
            click.echo(f"  {verdict:>7}  {result.output}: {result.difference:.2e} (at most {result.tolerance:.0e})")
    if not passed:
        click.echo("error: this machine does not reproduce the bundle's results; do not use it here", err=True)
    sys.exit(0 if passed else 5)
