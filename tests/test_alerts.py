"""Rules applied to changes: what is told, what waits, what is held back, and what is remembered from date to date."""

from __future__ import annotations

import json
import random

import pytest

from edge_rsvlm.alerts import tracks as tracks_module
from edge_rsvlm.alerts.ids import alert_id, change_id
from edge_rsvlm.alerts.passes import RulePass, Scene
from edge_rsvlm.alerts.places import overlaps_at_all, place_of, touches
from edge_rsvlm.alerts.times import instant, written
from edge_rsvlm.alerts.tracks import MOST_MISSES, Track, Tracks
from edge_rsvlm.config.rules import Rule, Rules
from edge_rsvlm.errors import UsageError

EXTENT = (0.0, 0.0, 10.0, 10.0)


def square(x, y, side=1.0):
    ring = [[x, y], [x + side, y], [x + side, y + side], [x, y + side], [x, y]]
    return {"type": "Polygon", "coordinates": [ring]}


def change(number, score=0.5, **changed):
    return {
        "id": f"change-{number}",
        "score": score,
        "area_m2": 1000.0,
        "area_px": 100,
        "polygon": square(number, 0),
        "from": "trees",
        "to": "bare soil",
        "sentence": f"Change {number}.",
        **changed,
    }


def rule(name="rule", **options):
    return Rule.model_validate({"name": name, **options})


def run(rules, changes, *, tracks=None, when="2024-05-01T00:00:00Z", complete=True, located=True, extent=EXTENT):
    """``changes`` are (record, geometry)."""
    scene = Scene(when, located, extent, {"before": "a.tif", "after": "b.tif"})
    one_pass = RulePass(rules, Tracks() if tracks is None else tracks, scene)
    for record, geometry in changes:
        one_pass.feed(record, geometry)
    return one_pass.finish(complete=complete)


def day(number):
    return f"2024-05-{number:02d}T00:00:00Z"


# --- what a rule asks for -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "changed", "met"),
    [
        ({}, {}, True),
        ({"from": ["trees"]}, {}, True),
        ({"from": ["water", "trees"], "to": ["bare soil"]}, {}, True),
        ({"from": ["trees"], "to": ["sealed ground"]}, {}, False),
        ({"to": ["bare soil"]}, {"to": "unknown"}, False),
        ({"query": "soil"}, {}, True),
        ({"query": "Trees, soil"}, {}, True),
        ({"query": "vegetation lost"}, {}, False),
        ({"query": "vegetation lost"}, {"spectral": {"meaning": "vegetation lost"}}, True),
        ({"query": "vegetation lost"}, {"spectral": {"meaning": "vegetation gained"}}, False),
        ({"query": "water"}, {"spectral": {"meaning": None}}, False),
        ({"min_score": 0.5}, {}, True),
        ({"min_score": 0.51}, {}, False),
        ({"min_area": 1000}, {}, True),
        ({"min_area": 1001}, {}, False),
        ({"min_area": 1001, "min_area_px": 1}, {}, False),  # square metres count where they are known
        ({"min_area": 1}, {"area_m2": None}, False),
        ({"min_area": 1, "min_area_px": 100}, {"area_m2": None}, True),
        ({"min_area_px": 101}, {"area_m2": None}, False),
        ({"min_area_px": 101}, {}, True),
    ],
)
def test_a_rule_is_met_when_all_it_asks_is_so(options, changed, met):
    found = run(Rules((rule(**options),)), [(change(1, **changed), square(1, 1))])
    assert len(found.alerts) == met


def test_an_alert_carries_its_evidence():
    record = change(1, crops=["a.webp", "b.webp"])
    (alert,) = run(Rules((rule("forest"),)), [(record, square(1, 1))]).alerts
    assert (alert.rule, alert.score, alert.sentence, alert.time) == ("forest", 0.5, "Change 1.", day(1))
    assert alert.record == {"before": "a.tif", "after": "b.tif", **record}
    assert alert.geometry == square(1, 1) and alert.crops == ("a.webp", "b.webp")
    (elsewhere,) = run(Rules((rule("forest"),)), [(record, square(1, 1))], located=False).alerts
    assert elsewhere.geometry is None


def test_each_rule_tells_for_itself():
    found = run(Rules((rule("one"), rule("two"), rule("no", min_score=0.9))), [(change(1), square(1, 1))])
    assert sorted(alert.rule for alert in found.alerts) == ["one", "two"]
    assert len({alert.id for alert in found.alerts}) == 2


# --- areas of interest ----------------------------------------------------------------------------------------------

AREA = ((((2.0, 2.0), (6.0, 2.0), (6.0, 6.0), (2.0, 6.0), (2.0, 2.0)),
         ((3.0, 3.0), (5.0, 3.0), (5.0, 5.0), (3.0, 5.0), (3.0, 3.0))),)  # fmt: skip
"""A square with a hole."""


@pytest.mark.parametrize(
    ("geometry", "inside"),
    [
        (square(2.2, 2.2, 0.5), True),
        (square(0, 0, 1), False),
        (square(3.5, 3.5, 1), False),  # within the hole
        (square(2.9, 3.5, 0.5), True),  # over the hole's edge
        (square(0, 0, 9), True),  # around everything
        (square(1, 3, 1.5), True),  # across the edge without a corner inside or around
        (square(6, 6, 1), True),  # corner to corner
        (square(6.01, 6.01, 1), False),
        ({"type": "MultiPolygon", "coordinates": [square(0, 0)["coordinates"], square(5.5, 5.5)["coordinates"]]}, True),
    ],
)
def test_a_change_touches_an_area(geometry, inside):
    assert touches(geometry, AREA) == inside
    rules = Rules((rule(area="a.geojson"),), areas={"a.geojson": AREA})
    assert len(run(rules, [(change(1), geometry)]).alerts) == inside


def test_a_scene_without_a_place_meets_no_area():
    rules = Rules((rule(area="a.geojson"),), areas={"a.geojson": AREA})
    assert not run(rules, [(change(1), square(2.2, 2.2))], located=False).alerts
    assert not run(rules, [(change(1), None)]).alerts


def test_a_cross_meets_a_cross_without_a_corner_inside():
    tall, wide = square(4, 0, 1), square(0, 4, 1)
    tall["coordinates"][0] = [[4, 0], [5, 0], [5, 9], [4, 9], [4, 0]]
    wide["coordinates"][0] = [[0, 4], [9, 4], [9, 5], [0, 5], [0, 4]]
    assert touches(tall, (tuple(tuple(map(tuple, r)) for r in wide["coordinates"]),))


# --- the budget -----------------------------------------------------------------------------------------------------


def test_the_budget_keeps_the_best_in_any_order():
    changes = [(change(n, score=n / 100), square(n % 10, n // 10, 0.5)) for n in range(40)]
    rules = Rules((rule(),), budget=3)
    found = run(rules, changes)
    assert [alert.score for alert in found.alerts] == [0.39, 0.38, 0.37] and found.held_back == 37
    random.Random(1).shuffle(changes)
    assert run(rules, changes).alerts == found.alerts


def test_ties_end_the_same_in_any_order():
    changes = [(change(n), square(n, 0, 0.5)) for n in range(9)]
    rules = Rules((rule(),), budget=4)
    assert run(rules, changes).alerts == run(rules, changes[::-1]).alerts


def test_what_was_held_back_has_no_cool_down():
    rules = Rules((rule(cooldown="7d"),), budget=1)
    changes = [(change(1, score=0.9), square(1, 1)), (change(2, score=0.8), square(5, 5))]
    first = run(rules, changes, when=day(1))
    second = run(rules, changes, when=day(2), tracks=first.tracks)
    assert [alert.sentence for alert in first.alerts] == ["Change 1."] and first.held_back == 1
    assert [alert.sentence for alert in second.alerts] == ["Change 2."] and second.silenced == 1


# --- persistence and cool-down --------------------------------------------------------------------------------------


def passes(rules, seen, **options):
    """Verdicts of days on each of which a square was seen at a place, or nothing."""
    tracks, found = Tracks(), []
    for number, place in seen:
        changes = [] if place is None else [(change(1), square(*place))]
        found.append(run(rules, changes, when=day(number), tracks=tracks, **options))
        tracks = Tracks.of(json.loads(json.dumps(found[-1].tracks.rows())))  # as a journal keeps them
    return found


def test_what_persists_is_told_from_the_nth_date_on():
    found = passes(Rules((rule(persistence=3),)), [(1, (1, 1)), (2, (1.1, 1)), (3, (1, 1.1)), (4, (1, 1))])
    assert [len(each.alerts) for each in found] == [0, 0, 1, 1]
    assert [each.pending for each in found] == [{"rule": 1}, {"rule": 1}, {}, {}]
    (track,) = found[2].tracks.tracks
    assert (track.first_seen, track.last_seen, track.last_alerted) == (day(1), day(3), day(3))
    assert track.dates == (day(1), day(2), day(3)) and track.place == (1.0, 1.1, 2.0, 2.1)


def test_another_place_does_not_persist():
    found = passes(Rules((rule(persistence=2),)), [(1, (1, 1)), (2, (1.8, 1)), (3, (4, 4))])
    assert not any(each.alerts for each in found) and len(found[-1].tracks.tracks) == 3


def test_one_date_counts_once():
    found = passes(Rules((rule(persistence=2),)), [(1, (1, 1)), (1, (1, 1)), (2, (1, 1))])
    assert [len(each.alerts) for each in found] == [0, 0, 1]


def test_dates_may_come_in_any_order():
    found = passes(Rules((rule(persistence=3),)), [(5, (1, 1)), (3, (1, 1)), (4, (1, 1))])
    (track,) = found[-1].tracks.tracks
    assert len(found[-1].alerts) == 1 and (track.first_seen, track.last_seen) == (day(3), day(5))


def test_a_place_that_is_not_seen_again_is_forgotten():
    missing = [(2 + n, None) for n in range(MOST_MISSES)]
    found = passes(Rules((rule(persistence=2),)), [(1, (1, 1)), *missing, (9, (1, 1))])
    assert [len(each.tracks.tracks) for each in found] == [1] * MOST_MISSES + [0, 1]
    assert not found[-1].alerts
    fewer = passes(Rules((rule(persistence=2),)), [(1, (1, 1)), *missing[1:], (9, (1, 1))])
    assert fewer[-1].alerts  # a cloud or two


@pytest.mark.parametrize("blind", [{"complete": False}, {"extent": (5.0, 5.0, 9.0, 9.0)}])
def test_where_nobody_looked_nothing_is_missing(blind):
    rules = Rules((rule(persistence=2),))
    tracks = run(rules, [(change(1), square(1, 1))], when=day(1)).tracks
    for number in range(2, 12):
        tracks = run(rules, [], when=day(number), tracks=tracks, **blind).tracks
    assert run(rules, [(change(1), square(1, 1))], when=day(12), tracks=tracks).alerts


def test_a_cool_down_counts_by_the_times_of_scenes():
    found = passes(Rules((rule(cooldown="3d"),)), [(1, (1, 1)), (2, (1, 1)), (3, (1, 1)), (4, (1, 1)), (5, (1, 1))])
    assert [len(each.alerts) for each in found] == [1, 0, 0, 1, 0]
    assert [each.silenced for each in found] == [0, 1, 1, 0, 1]


def test_a_cool_down_outlives_what_is_not_seen():
    missing = [(2 + n, None) for n in range(MOST_MISSES)]
    found = passes(Rules((rule(cooldown="9d"),)), [(1, (1, 1)), *missing, (9, (1, 1)), (10, (1, 1))])
    assert [len(each.alerts) for each in found] == [1, 0, 0, 0, 0, 1]


def test_a_scene_of_before_is_within_the_cool_down_too():
    found = passes(Rules((rule(cooldown="3d"),)), [(5, (1, 1)), (4, (1, 1)), (1, (1, 1))])
    assert [len(each.alerts) for each in found] == [1, 0, 1]


def test_parts_of_a_place_are_one_place():
    """A region that falls apart on the second date is told in its parts, and is not new."""
    rules = Rules((rule(cooldown="3d"),))
    tracks = run(rules, [(change(1), square(1, 1, 2))], when=day(1)).tracks
    parts = [(change(2), square(1, 1, 1.4)), (change(3), square(1.6, 1.6, 1.4))]
    found = run(rules, parts, when=day(2), tracks=tracks)
    assert found.silenced == 2 and not found.alerts and len(found.tracks.tracks) == 1
    assert found.tracks.tracks[0].place == (1.0, 1.0, 3.0, 3.0)


def test_pixels_and_degrees_are_different_places():
    rules = Rules((rule(persistence=2),))
    tracks = run(rules, [(change(1), square(1, 1))], when=day(1), located=False).tracks
    found = run(rules, [(change(1), square(1, 1))], when=day(2), tracks=tracks)
    assert not found.alerts and len(found.tracks.tracks) == 2


def test_tracks_of_rules_that_are_gone_are_dropped():
    tracks = run(Rules((rule("old", persistence=2),)), [(change(1), square(1, 1))]).tracks
    assert not run(Rules((rule("new", persistence=2),)), [], tracks=tracks).tracks.tracks
    assert not run(Rules((rule(),)), [(change(1), square(1, 1))]).tracks.tracks  # it needs no memory


def test_tracks_given_are_not_changed():
    rules = Rules((rule(persistence=2),))
    before = run(rules, [(change(1), square(1, 1))], when=day(1)).tracks
    rows = json.dumps(before.rows())
    assert run(rules, [(change(1), square(1, 1))], when=day(2), tracks=before).alerts
    assert json.dumps(before.rows()) == rows


def test_memory_has_an_end(monkeypatch):
    for module in ("tracks", "passes"):
        monkeypatch.setattr(f"edge_rsvlm.alerts.{module}.MOST_TRACKS", 5)
    assert tracks_module.MOST_TRACKS == 5
    rules = Rules((rule(persistence=2),))
    first = run(rules, [(change(n), square(n, 0)) for n in range(8)], when=day(1))
    assert len(first.tracks.tracks) == 5 and first.pending == {"rule": 8}
    assert first.warnings == ["3 places beyond 5 are not remembered: make the rules narrower"]
    second = run(rules, [(change(n), square(n, 5)) for n in range(3)], when=day(2), tracks=first.tracks)
    assert len(second.tracks.tracks) == 5
    assert sorted(t.last_seen for t in second.tracks.tracks) == [day(1)] * 2 + [day(2)] * 3


def test_rows_are_plain_and_come_back():
    track = Track("r", (1.0, 2.0, 3.0, 4.0), True, day(1), day(2), (day(1), day(2)), day(2), 1)
    rows = json.loads(json.dumps(Tracks((track,)).rows()))
    assert Tracks.of(rows).tracks == (track,)
    for bad in ([{"rule": "r"}], [{**rows[0], "extra": 1}], [{**rows[0], "place": [1, 2]}]):
        with pytest.raises(UsageError, match="row of tracks"):
            Tracks.of(bad)


# --- ids, places and times ------------------------------------------------------------------------------------------


def test_ids_are_the_same_on_any_machine():
    """Written down: receivers drop repeats by them."""
    one = change_id(("a.tif", 10, 4, 3, 0.5), ("b.tif", 10, 4, 3, 0.5), square(1.0, 2.0))
    assert one == "4774750e14893513" and alert_id("forest", one) == "a05f1ab36d37e9f03a24118a771fc5f4"
    others = [
        change_id(("a.tif", 11, 4, 3, 0.5), ("b.tif", 10, 4, 3, 0.5), square(1.0, 2.0)),
        change_id(("a.tif", 10, 4, 3, 0.5), ("c.tif", 10, 4, 3, 0.5), square(1.0, 2.0)),
        change_id(("a.tif", 10, 4, 3, 0.5), ("b.tif", 10, 4, 3, 0.5), square(1.0, 3.0)),
    ]
    assert len({one, *others}) == 4 and alert_id("fire", one) != alert_id("forest", one)


def test_a_place_across_the_antimeridian_is_small():
    west, east = square(179.5, 0, 0.5)["coordinates"], square(-180, 0, 0.5)["coordinates"]
    assert place_of({"type": "MultiPolygon", "coordinates": [west, east]}) == (179.5, 0.0, 180.5, 0.5)
    pixels = {"type": "MultiPolygon", "coordinates": [square(0, 0)["coordinates"], square(500, 0)["coordinates"]]}
    assert place_of(pixels) == (0.0, 0.0, 501.0, 1.0)


def test_boxes_that_share_an_edge_share_nothing():
    assert overlaps_at_all((0, 0, 2, 2), (1, 1, 3, 3)) and not overlaps_at_all((0, 0, 1, 1), (1, 0, 2, 1))


@pytest.mark.parametrize(
    ("text", "time"),
    [
        ("2024-05-01T10:00:00Z", "2024-05-01T10:00:00Z"),
        ("2024-05-01T10:00:00.250000Z", "2024-05-01T10:00:00Z"),
        ("2024-05-01T10:00:00+02:00", "2024-05-01T08:00:00Z"),
        ("2024-05-01T10:00:00", "2024-05-01T10:00:00Z"),
        ("2024-05-01", "2024-05-01T12:00:00Z"),
        ("2024", "2024-07-02T00:00:00Z"),
    ],
)
def test_times_of_scenes(text, time):
    assert written(instant(text)) == time


@pytest.mark.parametrize("text", ["", "yesterday", "2024-13-01", "20"])
def test_what_is_no_time_is_refused(text):
    with pytest.raises(UsageError, match="2024-05-01T10:00:00Z"):
        instant(text)
