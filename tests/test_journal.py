"""The journal: all of a scene or nothing, full disks, versions, locks, and what is forgotten to stay small."""

from __future__ import annotations

import multiprocessing
import sqlite3
from dataclasses import replace

import pytest

from edge_rsvlm.alerts.entries import Result
from edge_rsvlm.alerts.journal import Journal
from edge_rsvlm.alerts.retention import DROPPED, crop_folder, keep_within, thumbnail_path, used_bytes
from edge_rsvlm.alerts.store import JournalFullError, exclusive
from edge_rsvlm.errors import UsageError
from tests.made_alerts import HOSTILE, TWO, alert, put, seen


@pytest.fixture
def journal(tmp_path):
    with Journal(tmp_path / "new" / "j.sqlite", durable=False) as opened:
        yield opened


def counts(journal):
    return {
        table: journal.row(f"SELECT count(*) FROM {table}")[0]
        for table in ("scenes", "lines", "alerts", "deliveries", "tracks")
    }


def state(journal, name):
    return journal.row("SELECT state FROM scenes WHERE path = ?", str(name))[0]


# --- a scene's result ---


def test_a_result_is_kept_with_all_that_belongs_to_it(journal, tmp_path):
    given = [alert(1, 0.9, sentence=HOSTILE), alert(2, 0.2, TWO), alert(3, geometry=None)]
    scene = put(journal, given, ("one", "two"), tracks=[{"rule": "r", "place": [1, 2, 3, 4]}])
    assert state(journal, "b.tif") == "done"
    assert counts(journal) == {"scenes": 1, "lines": 1, "alerts": 3, "deliveries": 6, "tracks": 1}
    with Journal(tmp_path / "new" / "j.sqlite") as again:
        assert list(again.alerts()) == given
        assert again.tracks(scene.place) == [{"rule": "r", "place": [1, 2, 3, 4]}]
        assert not list(again.waiting())


class Cut(Exception):
    """What ends a commit somewhere in its middle."""


@pytest.mark.parametrize("at", range(1, 11))
def test_nothing_is_kept_of_a_result_that_was_cut_anywhere(journal, monkeypatch, at):
    """Whichever statement fails, the scene is as it was."""
    journal.admit(seen("b.tif"), taken="2024", alike="x")
    scene, before, write, calls = next(journal.waiting()), counts(journal), Journal.write, []

    def cut(self, sql, *values):
        calls.append(sql)
        if len(calls) == at:
            raise Cut
        return write(self, sql, *values)

    monkeypatch.setattr(Journal, "write", cut)
    with pytest.raises(Cut):
        journal.commit(scene, Result("done", {}, [alert(1), alert(2)], [{}, {}], compared=scene.seq), ("one", "two"))
    monkeypatch.undo()
    assert counts(journal) == before and state(journal, "b.tif") == "waiting"
    journal.commit(scene, Result("done", {}, [alert(1), alert(2)], [{}, {}]), ("one", "two"))
    assert counts(journal) == {"scenes": 1, "lines": 1, "alerts": 2, "deliveries": 4, "tracks": 2}


def test_an_alert_that_is_known_is_not_queued_again(journal):
    put(journal, [alert(1)])
    journal.write("UPDATE deliveries SET state = 'done'")
    put(journal, [alert(1), alert(2)], name="c.tif")
    assert list(journal.rows("SELECT alert, state FROM deliveries ORDER BY alert")) == [
        (alert(1).id, "done"),
        (alert(2).id, "waiting"),
    ]


def test_tracks_are_of_their_place_and_stay_when_a_scene_failed(journal):
    one, two = put(journal, [], name="a.tif", tracks=[{"n": 1}]), put(journal, [], name="b.tif", tracks=[{"n": 2}])
    journal.admit(seen("c.tif"), taken="2024", alike="x", place=one.place)
    journal.commit(next(journal.waiting()), Result("failed", {}), ())
    assert journal.tracks(one.place) == [{"n": 1}] and journal.tracks(two.place) == [{"n": 2}]


# --- full disks ---


def test_a_full_disk_is_said_and_the_scene_can_be_done_later(journal):
    journal.admit(seen("b.tif"), taken="2024", alike="x")
    scene, before = next(journal.waiting()), counts(journal)
    pages = journal.row("PRAGMA page_count")[0]
    journal.row(f"PRAGMA max_page_count = {pages + 4}")
    large = [alert(n, sentence="x" * 2000) for n in range(50)]
    with pytest.raises(JournalFullError, match=r"full.*make room") as caught:
        journal.commit(scene, Result("done", {}, large, [{}]), ("s",))
    assert caught.value.exit_code == 3
    assert counts(journal) == before and state(journal, "b.tif") == "waiting"
    journal.row("PRAGMA max_page_count = 1000000")
    journal.commit(scene, Result("done", {}, large, [{}]), ("s",))
    assert counts(journal)["deliveries"] == 50


# --- versions, other files, locks ---


def test_a_newer_journal_is_refused_with_the_fix(journal):
    journal.row("PRAGMA user_version = 99")
    with pytest.raises(UsageError, match=r"version 99.*install the newer edge-rsvlm"):
        Journal(journal.path)


def test_other_files_are_refused_and_left_alone(tmp_path):
    text = tmp_path / "text"
    text.write_text("no database at all, but long enough to be one" * 20)
    with pytest.raises(UsageError, match="not a whole journal"):
        Journal(text)
    other = tmp_path / "other"
    with sqlite3.connect(other) as database:
        database.execute("CREATE TABLE mine (x)")
    with pytest.raises(UsageError, match="another database"):
        Journal(other)
    assert sqlite3.connect(other).execute("SELECT name FROM sqlite_master").fetchall() == [("mine",)]


def test_commits_of_a_durable_journal_are_synced_and_all_are_logged_ahead(tmp_path):
    with Journal(tmp_path / "j") as durable, Journal(tmp_path / "j", durable=False) as quick:
        assert (durable.row("PRAGMA synchronous"), quick.row("PRAGMA synchronous")) == ((2,), (1,))
        assert durable.row("PRAGMA journal_mode") == ("wal",)


def _hold(path, held, release):
    with exclusive(path):
        held.set()
        release.wait()


def test_a_second_watch_is_refused_until_the_first_is_gone_however_it_went(tmp_path):
    path = tmp_path / "j"
    with exclusive(path), pytest.raises(UsageError, match=r"another watch.*stop it"), exclusive(path):
        pass
    context = multiprocessing.get_context("spawn")
    held, release = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(path, held, release))
    process.start()
    assert held.wait(60)
    with pytest.raises(UsageError), exclusive(path):
        pass
    process.kill()
    process.join()
    with exclusive(path):
        pass


# --- earlier dates ---


def scenes_of(journal, *takens, place=None):
    for n, taken in enumerate(takens):
        journal.admit(seen(f"{taken} {n}.tif"), taken=taken, alike="x", place=place)
        scene = next(journal.waiting())
        place = scene.place
        yield scene
        journal.commit(scene, Result("done", {}), ())


def test_the_earlier_date_is_the_latest_that_was_taken_before_in_whatever_order_they_came(journal):
    for scene in scenes_of(journal, "2020", "2023", "2021", "2021"):
        found = [earlier.taken for earlier in journal.earlier(scene)]
        expected = {1: [], 2: ["2020"], 3: ["2020"], 4: ["2021", "2020"]}
        assert found == expected[scene.seq]


def test_while_changes_are_pending_the_same_earlier_date_comes_first(journal):
    one, *_ = scenes_of(journal, "2020", "2021")
    journal.admit(seen("2022.tif"), taken="2022", alike="x", place=one.place)
    journal.commit(next(journal.waiting()), Result("done", {}, compared=one.seq, keeps=True), ())
    journal.admit(seen("2023.tif"), taken="2023", alike="x", place=one.place)
    third = next(journal.waiting())
    assert [s.taken for s in journal.earlier(third)] == ["2020", "2022", "2021"]
    journal.commit(third, Result("done", {}, compared=one.seq), ())
    journal.admit(seen("2024.tif"), taken="2024", alike="x", place=one.place)
    assert [s.taken for s in journal.earlier(next(journal.waiting()))] == ["2023", "2022", "2021", "2020"]


def test_an_earlier_date_with_which_nothing_can_be_compared_is_put_aside(journal):
    one, *_ = scenes_of(journal, "2020")
    for n, strikes in enumerate((1, 2)):
        journal.admit(seen(f"bad {n}.tif"), taken=f"202{n + 1}", alike="x", place=one.place)
        scene = next(journal.waiting())
        assert [s.seq for s in journal.earlier(scene)] == [one.seq]
        journal.commit(scene, Result("failed", {}, blames=one.seq), ())
        assert journal.row("SELECT strikes FROM scenes WHERE seq = 1") == (strikes,)
    journal.admit(seen("next.tif"), taken="2025", alike="x", place=one.place)
    assert list(journal.earlier(next(journal.waiting()))) == []


# --- what is forgotten ---


def fill(journal, settled, waiting):
    """Delivered alerts and others, with result lines; each alert about 4 KB."""
    for n in range(settled + waiting):
        put(journal, [alert(n, score=(n * 7 % 100) / 100, sentence="x" * 4000)], name=f"{n}.tif")
        if n < settled:
            journal.write("UPDATE deliveries SET state = 'done' WHERE alert = ?", alert(n).id)
    journal.write("UPDATE lines SET told = 1")


def kept(journal):
    return {int(found.id, 16) for found in journal.alerts()}


def test_under_its_size_nothing_is_forgotten(journal):
    fill(journal, 50, 10)
    assert keep_within(journal, 10 << 20) == 0 and kept(journal) == set(range(60))


def test_settled_alerts_go_first_the_oldest_before_others(journal):
    fill(journal, 200, 50)
    limit = int(used_bytes(journal) * 1.1)
    assert keep_within(journal, limit) == 0
    left = kept(journal)
    assert set(range(200, 250)) <= left, "none that waits"
    settled = left - set(range(200, 250))
    assert 0 < len(settled) < 200 and settled == set(range(min(settled), 200)), "the oldest went"
    assert used_bytes(journal) <= limit * 0.75
    assert journal.counter(DROPPED) == 0


def test_waiting_alerts_are_dropped_at_the_hard_cap_the_lowest_score_first_and_counted(journal):
    fill(journal, 20, 400)
    limit = used_bytes(journal) // 2
    dropped = keep_within(journal, limit)
    left = kept(journal)
    assert used_bytes(journal) <= limit and dropped > 0
    assert journal.counter(DROPPED) == dropped == 400 - len(left)
    gone = set(range(20, 420)) - left
    score = lambda n: (n * 7 % 100) / 100  # noqa: E731
    assert max(map(score, gone)) <= min(map(score, left))
    assert {row[0] for row in journal.rows("SELECT alert FROM deliveries")} == {alert(n).id for n in left}


def test_what_is_waiting_for_one_sink_is_not_settled_and_what_was_sent_down_is(journal):
    put(journal, [alert(n, sentence="x" * 40_000) for n in range(3)], ("one", "two"))
    journal.write("UPDATE deliveries SET state = 'done' WHERE sink = 'one'")
    journal.write("UPDATE deliveries SET state = 'failed' WHERE sink = 'two' AND alert = ?", alert(1).id)
    keep_within(journal, int(used_bytes(journal) * 1.01))
    assert kept(journal) == {0, 2}
    put(journal, [alert(9, sentence="x" * 40_000)], (), name="c.tif")
    journal.write("INSERT INTO sent VALUES ('alert', ?, 1, 1)", alert(9).id)
    keep_within(journal, int(used_bytes(journal) * 1.01))
    assert kept(journal) == {0, 2}


def test_evidence_counts_and_goes_with_its_alert_and_no_other_file_does(journal, tmp_path):
    folder = crop_folder(journal.path, 1)
    folder.mkdir(parents=True)
    mine, shared, foreign = folder / "a.webp", folder / "b.webp", tmp_path / "holiday.jpg"
    for path in (mine, shared, foreign):
        path.write_bytes(b"x" * 300_000)
    journal.admit(seen("b.tif"), taken="2024", alike="x")
    alerts = [alert(1, crops=(str(mine), str(shared), str(foreign))), alert(2, crops=(str(shared),))]
    journal.commit(next(journal.waiting()), Result("done", {}, alerts), ("s",))
    assert used_bytes(journal) > 1_200_000
    journal.write("UPDATE deliveries SET state = 'done' WHERE alert = ?", alert(1).id)
    keep_within(journal, used_bytes(journal))
    assert (mine.exists(), shared.exists(), foreign.exists()) == (False, True, True)


def test_lines_go_with_their_thumbnails_and_scenes_only_when_their_file_is_gone(journal, tmp_path):
    here = tmp_path / "here.tif"
    here.touch()
    for name in (here, tmp_path / "gone.tif"):
        journal.admit(seen(name), taken="2024", alike="x")
        scene = next(journal.waiting())
        picture = thumbnail_path(journal.path, scene.seq)
        picture.parent.mkdir(exist_ok=True)
        picture.write_bytes(b"x" * 500_000)
        journal.commit(scene, Result("done", {}, thumbnail=picture.read_bytes()), ())
    assert keep_within(journal, 100_000) == 0
    assert picture.exists(), "lines that were not told stay"
    journal.write("UPDATE lines SET told = 1")
    keep_within(journal, 100_000)
    assert not picture.exists() and counts(journal)["lines"] == 0
    assert [row[0] for row in journal.rows("SELECT path FROM scenes")] == [str(here)]


def test_numbers_of_numpy_are_numbers_and_nan_is_refused(journal):
    import numpy as np

    put(journal, [replace(alert(1), record={"n": np.int64(3), "share": np.float32(0.5)})])
    assert next(journal.alerts()).record == {"n": 3, "share": 0.5}
    with pytest.raises(ValueError, match="JSON"):
        put(journal, [replace(alert(2), record={"n": float("nan")})], name="c.tif")
