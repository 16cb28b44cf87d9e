"""Orders carried out: tasks run, their results streamed out, and what happened reported. Shared by every such verb."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, TextIO

import click

from edge_rsvlm.cli.common import ExitCode, progress_bar
from edge_rsvlm.cli.orders import Order
from edge_rsvlm.config.inputs import InputSpec
from edge_rsvlm.config.offered import task_of
from edge_rsvlm.errors import BudgetError
from edge_rsvlm.geo import PixelMapper
from edge_rsvlm.pipeline.ask import is_features
from edge_rsvlm.pipeline.outcome import Outcome, Progress
from edge_rsvlm.pipeline.segment import EXPERIMENTAL
from edge_rsvlm.pipeline.session import Session, georeference
from edge_rsvlm.sinks.geojson import GeoJsonWriter
from edge_rsvlm.sinks.records import RecordSpool

Orders = Mapping[int, Order[Any]]
"""By their place among all that were given."""
Lines = dict[int, Callable[[], None]]
"""What writes the JSON line of each."""


class Results:
    """Takes results as they become final and counts them by label."""

    def __init__(self, spool: RecordSpool | None, geojson: GeoJsonWriter | None) -> None:
        self.spool, self._geojson = spool, geojson
        self.count = 0
        self.labels: dict[str, int] = {}

    def emit(self, record: dict[str, Any], geometry: dict[str, Any] | None) -> None:
        self.count += 1
        if "label" in record:
            self.labels[record["label"]] = self.labels.get(record["label"], 0) + 1
        if self.spool:
            self.spool.add(record)
        if self._geojson:
            self._geojson.write(geometry, {k: v for k, v in record.items() if k != "polygon"})


class Delivery:
    """Runs tasks of one session. JSON lines go to ``json_stream``; without one, a line for people to stdout."""

    def __init__(self, session: Session, code: ExitCode, json_stream: TextIO | None) -> None:
        self._session, self._code, self._stream = session, code, json_stream
        self._said_experimental = False

    def deliver(self, *orders: Order[Any]) -> None:
        """Carry out orders for one input; their JSON lines come in this order.

        Tasks of one input spec share a pass over the image, where they fit into memory together.
        """
        with ExitStack() as spools:
            lines: Lines = {}
            for group in self._groups(orders):
                self._together(group, spools, lines)
            for place in sorted(lines):
                lines[place]()

    def _groups(self, orders: Sequence[Order[Any]]) -> list[Orders]:
        """Orders whose tasks look at the image alike, by their first."""
        groups: list[tuple[InputSpec | None, dict[int, Order[Any]]]] = []
        for place, order in enumerate(orders):
            spec = None if order.request is None else task_of(self._session.bundle.manifest, order.verb).input
            alike = next((group for other, group in groups if spec is not None and other == spec), None)
            if alike is None:
                groups.append((spec, {place: order}))
            else:
                alike[place] = order
        return [group for _, group in groups]

    def _together(self, orders: Orders, spools: ExitStack, lines: Lines) -> None:
        name, apart = next(iter(orders.values())).name, False
        with self._code.input(name), progress_bar(name) as progress:
            try:
                self._run(orders, spools, lines, progress)
            except BudgetError:
                if len(orders) == 1:
                    raise
                apart = True
        if apart:
            for place, order in orders.items():
                self._together({place: order}, spools, lines)

    def _run(self, orders: Orders, spools: ExitStack, lines: Lines, progress: Progress | None) -> None:
        """Files appear whole, or not at all when a task fails."""
        with ExitStack() as files:
            results = [self._results(order, spools, files) for order in orders.values()]
            outcomes = self._outcomes(list(orders.values()), results, files, progress)
        for (place, order), found, outcome in zip(orders.items(), results, outcomes, strict=True):
            if found.spool and self._stream:
                tail = {**order.tail(outcome), **outcome.record()}
                lines[place] = partial(found.spool.finish, tail, self._stream)
            else:
                click.echo(f"{order.name}: {order.text(outcome, found.count, found.labels)}")
            self._report(order.name, outcome)

    def _outcomes(
        self, orders: Sequence[Order[Any]], results: Sequence[Results], files: ExitStack, progress: Progress | None
    ) -> list[Outcome]:
        first = orders[0]
        if first.request is None:
            assert first.work is not None and len(orders) == 1
            return [first.work(results[0].emit, files, progress)]
        pairs = zip(orders, results, strict=True)
        requests = [order.request(found.emit, files) for order, found in pairs if order.request is not None]
        return self._session.together(first.image, requests, progress)

    def _results(self, order: Order[Any], spools: ExitStack, files: ExitStack) -> Results:
        spool = spools.enter_context(RecordSpool(order.head, order.list_key)) if self._stream else None
        writer = None
        if order.geojson:
            located = not is_features(order.image) and PixelMapper(georeference(order.image)).located
            writer = files.enter_context(GeoJsonWriter(order.geojson, properties=order.head, located=located))
        return Results(spool, writer)

    def _report(self, name: str, outcome: Outcome) -> None:
        """Warnings, and what was not covered; what is true of the bundle, whatever the input, is said once."""
        for warning in outcome.warnings:
            if warning != EXPERIMENTAL:
                click.echo(f"{name}: {warning}", err=True)
            elif not self._said_experimental:
                click.echo(warning, err=True)
                self._said_experimental = True
        if not outcome.complete:
            self._code.partial(name, outcome.coverage)
