from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_rsvlm.cli.common import ExitCode, make_limits, open_session, run_options

if TYPE_CHECKING:
    from edge_rsvlm.watch.courier import Route

DRAIN_S, FINISH_S = 60.0, 5.0
"""What is waited for deliveries at the end of --once, and after a signal."""


@click.command("watch")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--rule", "rules", type=click.Path(path_type=Path), metavar="RULES.toml", help="Which changes are worth an alert."
)
@click.option("--sinks", type=click.Path(path_type=Path), metavar="SINKS.toml", help="Who is told of alerts.")
@click.option("--output", type=click.Path(path_type=Path), help="File to which each line is appended, exactly once.")
@click.option(
    "--journal",
    type=click.Path(path_type=Path),
    help="Where is kept what was done.  [default: DIR/.edge-rsvlm/journal.sqlite]",
)
@click.option(
    "--journal-size", default="1GiB", show_default=True, metavar="SIZE", help="What it may grow to, with crops."
)
@click.option("--every", default="2s", show_default=True, metavar="TIME", help="How often DIR is looked at.")
@click.option("--marker", is_flag=True, help="A file is whole when FILE.done lies beside it, and not before.")
@click.option(
    "--queue", default=64, show_default=True, type=click.IntRange(1, 10_000),
    help="Scenes that may wait; beyond it, those are dropped that a later one of the same place supersedes.",
)  # fmt: skip
@click.option("--retry-refused", is_flag=True, help="First send again what receivers refused for good.")
@click.option("--once", is_flag=True, help="Do what is there and leave; nothing is dropped.")
@run_options
def command(
    folder: Path, rules: Path | None, sinks: Path | None, output: Path | None, journal: Path | None, journal_size: str,
    every: str, marker: bool, queue: int, retry_refused: bool, once: bool, bundle: Path | None, allow_unsigned: bool,
    **limits: Any,
) -> None:  # fmt: skip
    """Compare each scene that appears in DIR with the one before it, and deliver alerts.

    One JSON line per scene on stdout. What was done is kept in a journal, so that a watch that was killed goes on where
    it was. Scenes are of one place when half of the later footprint is covered by the earlier one; without a CRS, when
    their sizes and their names without digits agree. Ends on SIGTERM and SIGINT.
    """
    from edge_rsvlm.alerts import outbox
    from edge_rsvlm.alerts.journal import Journal
    from edge_rsvlm.alerts.store import JournalFullError, exclusive
    from edge_rsvlm.config.rules import load_rules
    from edge_rsvlm.config.units import parse_bytes, parse_seconds
    from edge_rsvlm.errors import InputError, UsageError
    from edge_rsvlm.watch.assemble import Settings, make_watch
    from edge_rsvlm.watch.comparing import by_model

    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder", fix="name a folder that scenes are put into")
    place = (journal or folder / ".edge-rsvlm" / "journal.sqlite").absolute()
    every_s, limit_bytes = parse_seconds(every), parse_bytes(journal_size)
    wanted, routes, code = load_rules(rules) if rules else None, _routes(sinks), ExitCode()
    reports, settings = _Reports(code), Settings(folder, output, queue, limit_bytes, marker, keep_all=once)
    with ExitStack() as stack:
        stack.enter_context(exclusive(place))
        kept = stack.enter_context(Journal(place))
        session = open_session(bundle, allow_unsigned, make_limits(**limits), ("change",))
        stop = stack.enter_context(until_signal())
        watch = make_watch(kept, settings, by_model(session, wanted), routes, stop, sys.stdout, reports)
        if retry_refused:
            reports.say(f"refused deliveries that are sent again: {outbox.retry_refused(kept)}")
        watch.couriers.start()
        try:
            watch.once() if once else watch.run(every_s)
        except (InputError, JournalFullError) as exc:
            reports.trouble(exc)
        watch.couriers.finish(DRAIN_S if once else FINISH_S, drain=once and not stop.is_set())
        reports.deliveries(watch.undelivered(), watch.couriers.refused)
    if once:
        code.leave()


class _Reports:
    """What happened, on stderr and in the exit code."""

    def __init__(self, code: ExitCode) -> None:
        self._code = code

    def say(self, text: str) -> None:
        click.echo(text, err=True)

    def failed(self, name: str, exc: Exception) -> None:
        with self._code.input(name):
            raise exc

    def partial(self, name: str, coverage: float) -> None:
        self._code.partial(name, coverage)

    def trouble(self, exc: Exception) -> None:
        click.echo(f"error: {exc}", err=True)
        self._code.add(3)

    def deliveries(self, waiting: int, refused: int) -> None:
        """At the end: what did not leave."""
        if waiting:
            click.echo(f"{waiting} deliveries wait in the journal for the next start", err=True)
        if waiting or refused:
            self._code.add(3)


def _routes(sinks: Path | None) -> dict[str, Route]:
    from edge_rsvlm.config.watch import load_sinks
    from edge_rsvlm.sinks.alerts import alert_sink
    from edge_rsvlm.watch.courier import Route

    specs = load_sinks(sinks) if sinks else ()
    return {spec.key: Route(alert_sink(spec), spec.order) for spec in specs}


@contextmanager
def until_signal() -> Iterator[threading.Event]:
    """Set by SIGTERM or SIGINT."""
    stop = threading.Event()
    old = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
