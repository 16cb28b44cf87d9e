from __future__ import annotations

from pathlib import Path

import click


@click.command("downlink")
@click.option(
    "--journal",
    required=True,
    type=click.Path(path_type=Path),
    help="Of a watch, such as DIR/.edge-rsvlm/journal.sqlite.",
)
@click.option("--budget", required=True, metavar="SIZE", help="Most bytes of this pass, its manifest included.")
@click.option("--to", required=True, type=click.Path(path_type=Path), help="Folder for the folder of each pass.")
def command(journal: Path, budget: str, to: Path) -> None:
    """Pick what a thin link sends down first.

    Alerts come before crops, crops before captions (a scene's result line), these before thumbnails; within each, the
    most value per byte. Writes one folder per pass, with a manifest.json, and waiting.jsonl beside it. The next pass
    goes on from there.
    """
    from edge_rsvlm.alerts.journal import Journal
    from edge_rsvlm.config.units import format_bytes, parse_bytes
    from edge_rsvlm.errors import UsageError
    from edge_rsvlm.watch.downlink import downlink

    if not journal.is_file():
        raise UsageError(f"there is no journal {journal}", fix="name the journal of a watch")
    with Journal(journal.absolute()) as kept:
        folder, done = downlink(kept, to, parse_bytes(budget))
    waits = [f"{kind['count']} {name}s" for name, kind in done.waiting.items() if kind["count"]]
    rest = f"; {', '.join(waits)} wait" if waits else "; nothing waits"
    click.echo(f"{folder}: {len(done.sent)} items, {format_bytes(done.sent_bytes)} of {budget}{rest}")
