"""The outbox: everything arrives, in order, whatever the link and the clocks do, and in little memory."""

from __future__ import annotations

import random
import tracemalloc

import pytest

from edge_rsvlm.alerts import outbox as outboxes
from edge_rsvlm.alerts.journal import Journal
from edge_rsvlm.alerts.outbox import LONGEST_WAIT_S, PATIENCE, Outbox, SteadyClock, backoff_s
from edge_rsvlm.errors import DeliveryError
from tests.made_alerts import alert, put


class Link:
    """A receiver with a link that fails as it is told: ``up``, and alerts that it refuses or fails at each time."""

    def __init__(self):
        self.up = True
        self.refused, self.poison = set(), set()
        self.got, self.tries = [], []

    def send(self, alert):
        n = int(alert.id, 16)
        self.tries.append(n)
        if n in self.refused:
            raise DeliveryError("no", fix="no", retry=False)
        if not self.up or n in self.poison:
            raise DeliveryError("the link is cut", fix="wait", retry=True)
        self.got.append(n)


class Counter(Link):
    """Keeps nothing but the last alert, which must come after the one before it."""

    last = -1

    def send(self, alert):
        if not self.up:
            raise DeliveryError("the link is cut", fix="wait", retry=True)
        assert int(alert.id, 16) == self.last + 1, "each once, in order"
        self.last += 1


class Clock:
    def __init__(self, now=1000.0):
        self.now = now

    def __call__(self):
        return self.now


@pytest.fixture
def journal(tmp_path):
    with Journal(tmp_path / "j", durable=False) as opened:
        yield opened


def outbox(journal, link, clock=None, **options):
    return Outbox(journal, "s", link, clock=clock or Clock(), draw=lambda: 0.0, **options)


def states(journal):
    return [row[0] for row in journal.rows("SELECT state FROM deliveries ORDER BY arrival")]


def run(box, clock, until):
    """Deliver for so many seconds of the clock."""
    end = clock.now + until
    while clock.now < end:
        wait_s = box.deliver()
        clock.now += max(wait_s, 1e-3) if wait_s is not None else until


def test_alerts_go_in_order_and_are_marked(journal):
    put(journal, [alert(n, score=n % 3) for n in range(6)])
    link = Link()
    assert outbox(journal, link).deliver() is None
    assert link.got == [0, 1, 2, 3, 4, 5] and states(journal) == ["done"] * 6
    assert outbox(journal, link).deliver() is None and len(link.got) == 6


def test_by_score_the_best_go_first_and_equals_by_age(journal):
    put(journal, [alert(n, score=n % 3) for n in range(6)])
    link = Link()
    outbox(journal, link, order="score").deliver()
    assert link.got == [2, 5, 1, 4, 0, 3]


def test_a_refusal_for_good_is_marked_with_its_reason_and_the_others_go_on(journal):
    put(journal, [alert(n) for n in range(4)])
    link, told = Link(), []
    link.refused = {1}
    outbox(journal, link, refused=lambda id, why: told.append((id, why))).deliver()
    assert link.got == [0, 2, 3] and states(journal) == ["done", "failed", "done", "done"]
    assert told == [(alert(1).id, "no; no")]
    assert journal.row("SELECT error FROM deliveries WHERE alert = ?", alert(1).id) == ("no; no",)
    outbox(journal, link).deliver()
    assert link.tries.count(1) == 1, "never again"


def test_waits_double_up_to_their_cap_and_are_jittered_down_by_a_half_at_most():
    waits = [backoff_s(n, lambda: 0.0) for n in range(1, 12)]
    assert waits == [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300]
    assert backoff_s(10_000, lambda: 0.0) == LONGEST_WAIT_S
    drawn = [backoff_s(5, random.Random(1).random) for _ in range(1)] + [backoff_s(5, lambda: 0.999)]
    assert all(8 <= wait <= 16 for wait in drawn)


def test_a_cut_link_is_tried_with_growing_waits_and_nothing_overtakes(journal):
    put(journal, [alert(n) for n in range(3)])
    link, clock = Link(), Clock()
    link.up = False
    box = outbox(journal, link, clock)
    waits = []
    for _ in range(4):
        waits.append(box.deliver())
        assert box.deliver() == waits[-1], "not before its time"
        clock.now += waits[-1]
    assert waits == [1, 2, 4, 8] and link.tries == [0, 0, 0, 0]
    link.up = True
    assert box.deliver() is None and link.got == [0, 1, 2]


def test_a_link_cut_for_days_with_a_thousand_alerts_brings_all_in_order_in_flat_memory(journal):
    """Memory is measured for 100 and for 1,000 alerts that wait: it does not depend on how many."""
    peaks, link, clock = [], Counter(), Clock()
    for first, last in ((0, 100), (100, 1100)):
        link.up = False
        for n in range(first, last):
            put(journal, [alert(n, sentence="x" * 2000)], name=f"{n}.tif")
        box = outbox(journal, link, clock)
        tracemalloc.start()
        run(box, clock, 3 * 86_400)
        assert link.last == first - 1
        link.up = True
        run(box, clock, 2 * LONGEST_WAIT_S)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert link.last == 1099, "all of them"
    assert states(journal) == ["done"] * 1100
    assert peaks[1] < peaks[0] + 20_000, peaks


def test_an_alert_that_the_sink_cannot_take_stands_aside_when_the_next_is_taken(journal):
    put(journal, [alert(n) for n in range(5)])
    link, clock = Link(), Clock()
    link.poison = {1}
    box = outbox(journal, link, clock)
    run(box, clock, 60)
    assert link.got == [0, 2, 3, 4]
    assert PATIENCE <= link.tries.count(1) <= PATIENCE + 3 and states(journal)[1] == "waiting"
    link.poison = set()
    run(box, clock, 2 * LONGEST_WAIT_S)
    assert link.got == [0, 2, 3, 4, 1]


def test_sinks_do_not_wait_for_each_other(journal):
    put(journal, [alert(n) for n in range(3)], ("s", "t"))
    cut, good = Link(), Link()
    cut.up = False
    outbox(journal, cut).deliver()
    Outbox(journal, "t", good).deliver()
    assert good.got == [0, 1, 2] and cut.got == []


# --- clocks ---


@pytest.mark.parametrize("jump_s", [-10 * 365 * 86_400, -3600, 3600, 10 * 365 * 86_400])
def test_a_wall_clock_that_jumped_between_two_runs_never_makes_it_wait_longer_than_a_backoff(journal, jump_s):
    put(journal, [alert(n) for n in range(3)])
    link, clock = Link(), Clock(2e9)
    link.up = False
    box = outbox(journal, link, clock)
    run(box, clock, 3600)
    link.up = True
    later = Clock(clock.now + jump_s)
    box = outbox(journal, link, later)
    held_s = box.deliver() or 0.0
    assert held_s <= LONGEST_WAIT_S
    later.now += held_s
    box.deliver()
    assert link.got == [0, 1, 2]


def test_an_alert_that_stood_aside_is_tried_within_a_backoff_after_a_jump(journal):
    put(journal, [alert(n) for n in range(3)])
    link, clock = Link(), Clock(2e9)
    link.poison = {0}
    run(outbox(journal, link, clock), clock, 600)
    link.poison = set()
    later = Clock(1e6)
    box = outbox(journal, link, later)
    assert 0 < box.deliver() <= LONGEST_WAIT_S
    later.now += LONGEST_WAIT_S
    box.deliver()
    assert link.got == [1, 2, 0]


def test_within_a_process_the_wall_clock_moves_nothing(monkeypatch):
    clock = SteadyClock()
    before = clock.now()
    monkeypatch.setattr(outboxes.time, "time", lambda: 0.0)
    assert before <= clock.now() < before + 60


def test_an_alert_that_was_dropped_to_make_room_is_passed_over(journal):
    put(journal, [alert(n) for n in range(3)])
    journal.write("DELETE FROM alerts WHERE id = ?", alert(1).id)
    link = Link()
    journal.write("DELETE FROM deliveries WHERE alert = ?", alert(1).id)
    assert outbox(journal, link).deliver() is None and link.got == [0, 2]
