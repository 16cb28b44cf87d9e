"""Tasks as consumers of tiles: one pass over a scene feeds one task, or several that look at it alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

from edge_rsvlm.pipeline.outcome import Outcome
from edge_rsvlm.pipeline.runtime import Pace
from edge_rsvlm.pipeline.stream import TileBatch, View, scene_batches

O_co = TypeVar("O_co", bound=Outcome, covariant=True)


class Consumer(Protocol[O_co]):
    """One task over one input; its results are emitted as they become final."""

    @property
    def outcome(self) -> O_co:
        """Whole when the pass is over."""
        ...

    def feed(self, tiles: TileBatch) -> None:
        """Take the next tiles of the scene."""
        ...

    def finish(self) -> None:
        """Emit what waited for later tiles."""
        ...


def run_over(view: View, pace: Pace, consumers: Sequence[Consumer[Any]]) -> None:
    """Feed the tiles of a view to all ``consumers``, batch by batch, and finish them."""
    seen = Outcome()
    with scene_batches(view, pace, seen) as source:
        for tiles in source:
            for consumer in consumers:
                consumer.feed(tiles)
    for consumer in consumers:
        consumer.finish()
        consumer.outcome.take_account(seen)
