from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_rsvlm.cli.common import allow_older, bundle_options, json_option

if TYPE_CHECKING:
    from edge_rsvlm.verify import ProbeResult, Report


@click.command("verify")
@bundle_options
@json_option
def command(bundle: Path | None, allow_unsigned: bool, as_json: bool) -> None:
    """Check a bundle: signature, version, every file, and its golden probe run here.

    Lists everything that is wrong, and leaves with exit code 5 if anything is.
    """
    from edge_rsvlm.bundle import Rules
    from edge_rsvlm.verify import verify

    report = verify(bundle, Rules(allow_unsigned, allow_older()))
    if as_json:
        click.echo(json.dumps(_record(report)))
    else:
        _show(report)
    if not report.passed:
        count = len(report.problems)
        click.echo(f"error: {count} problem{'s' if count > 1 else ''} found; do not use this bundle", err=True)
    sys.exit(0 if report.passed else 5)


def _record(report: Report) -> dict[str, Any]:
    manifest = report.manifest
    return {
        "bundle": manifest.name if manifest else None,
        "version": manifest.version if manifest else None,
        "trusted_by": report.trusted_by,
        "passed": report.passed,
        "problems": [vars(problem) for problem in report.problems],
        "probe": [_probe_record(result) for result in report.probe],
    }


def _probe_record(result: ProbeResult) -> dict[str, Any]:
    """JSON has no infinity: null is a difference that no number tells."""
    number = result.difference if math.isfinite(result.difference) else None
    return {**vars(result), "difference": number, "passed": result.passed}


def _show(report: Report) -> None:
    from edge_rsvlm.config.model import printable

    manifest = report.manifest
    if manifest:
        trust = f"trusted by {report.trusted_by}" if report.trusted_by else "trusted by nobody"
        click.echo(f"{printable(manifest.name)} version {manifest.version}, {trust}, {len(manifest.files)} files")
    for result in report.probe:
        verdict = "ok" if result.passed else "DIFFERS"
        text = f"{printable(result.graph)}: {printable(result.output)}"
        click.echo(f"{verdict:>8}  {text}: {result.difference:.2e} (at most {result.tolerance:.0e})")
    for problem in report.problems:
        click.echo(f"{'WRONG':>8}  {problem}")
    if manifest and not report.problems:
        probed = {result.graph for result in report.probe}
        for graph in manifest.graphs.keys() - probed:
            click.echo(f"{'not run':>8}  {printable(graph)}: the bundle has no golden probe of it")
