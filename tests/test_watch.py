"""The watch: one line per scene, queues, ends and starts, kills, and the verb."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rasterio
from click.testing import CliRunner

import edge_rsvlm.cli
from benchmarks.watch_kills import Kills
from edge_rsvlm.alerts.journal import Journal
from edge_rsvlm.alerts.store import JournalFullError, exclusive
from edge_rsvlm.errors import EdgeRsvlmError, InputError
from edge_rsvlm.pipeline.session import Session
from tests.fakes import fake_engine, write_bundle
from tests.receivers import HttpReceiver
from tests.scenes import UTM, pixels, write
from tests.watching import Bench, compare, scene

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
ROOT = Path(__file__).parents[1]
A, B, C = (8, 8), (24, 16), (40, 32)


@pytest.fixture
def bench(tmp_path):
    (tmp_path / "in").mkdir()
    return Bench(tmp_path / "in")


def named(lines):
    return [os.path.basename(line["image"]) for line in lines]  # noqa: PTH119


def base(path):
    return path and os.path.basename(path)  # noqa: PTH119


# --- one line per scene ---


def test_each_scene_is_compared_with_the_one_before_it_of_its_place(bench):
    first = scene(bench.folder / "a1.tif", [A])
    other = scene(bench.folder / "far.tif", [], east_m=5000)
    later = scene(bench.folder / "b2.tif", [A, B])
    for n, path in enumerate((first, other, later)):
        os.utime(path, (n, n))
    one, two, three = bench.once()
    assert one == {"image": str(first), "before": None, "taken": "1970-01-01T00:00:00.000000Z", "alerts": []}
    assert two["image"] == str(other) and two["before"] is None
    assert (three["image"], three["before"]) == (str(later), str(first))
    assert three["changes"] == len(three["alerts"]) > 0 and three["coverage"] == 1 and three["timing_ms"]["total"] > 0
    assert bench.once() == []
    scene(bench.folder / "c3.tif", [A, B, C], east_m=6)
    (four,) = bench.once()
    assert four["before"] == str(later)
    assert bench.lines() == [one, two, three, four]
    with Journal(bench.journal_path) as journal:
        assert {a.id for a in journal.alerts()} == {*three["alerts"], *four["alerts"]}
        assert journal.tracks(1) == [{"after": "b2.tif"}, {"after": "c3.tif"}]


def test_the_time_in_the_file_goes_before_the_time_of_the_file(bench):
    for n, (name, when) in enumerate((("new", "2024:05:01 10:00:00"), ("old", "2020:05:01 10:00:00"))):
        os.utime(scene(bench.folder / f"{name}.tif", [A], when=when), (n, n))
    assert [base(line["before"]) for line in bench.once()] == [None, None], "the older one came later"
    scene(bench.folder / "mid.tif", [B], when="2022:05:01 10:00:00")
    (line,) = bench.once()
    assert base(line["before"]) == "old.tif" and line["taken"].startswith("2022-05-01")


def test_without_a_crs_names_and_sizes_make_the_place(bench):
    for n, name in enumerate(("north_1.tif", "south_1.tif", "north_2.tif")):
        path = write(bench.folder / name, np.full((3, 48, 64), 40 + n, np.uint8), tiled=False)
        os.utime(path, (n, n))
    assert [base(line["before"]) for line in bench.once()] == [None, None, "north_1.tif"]


def test_too_little_overlap_is_another_place(bench):
    width_m = 64 * 0.5
    for n, east in enumerate((0, width_m * 0.6, width_m * 0.2)):
        os.utime(scene(bench.folder / f"{n}.tif", [A], east_m=east), (n, n))
    assert [base(line["before"]) for line in bench.once()] == [None, None, "1.tif"]


def test_an_unusable_scene_is_one_line_and_the_others_go_on(bench):
    scene(bench.folder / "a.tif", [A])
    (bench.folder / "bad.tif").write_bytes(b"II*\0 no raster")
    lines = bench.once()
    assert sorted(named(lines)) == ["a.tif", "bad.tif"]
    (bad,) = [line for line in lines if "error" in line]
    assert named([bad]) == ["bad.tif"] and len(bench.told.failures) == 1
    assert bench.once() == []
    scene(bench.folder / "bad.tif", [B])
    (again,) = bench.once()
    assert base(again["before"]) == "a.tif", "a new file under the name is a new scene"


def test_the_same_content_is_never_compared_again(bench):
    path = scene(bench.folder / "a.tif", [A])
    bench.once()
    os.utime(path)
    assert bench.once() == [], "touched"
    path = path.rename(bench.folder / "renamed.tif")
    assert bench.once() == []
    shutil.copy(path, bench.folder / "copy.tif")
    assert bench.once() == [{"image": str(bench.folder / "copy.tif"), "same_as": str(path)}]
    scene(bench.folder / "b.tif", [B])
    (line,) = bench.once()
    assert base(line["before"]) == "renamed.tif"


def test_content_that_comes_back_under_its_name_ends_the_looking(bench):
    """The path was taken in with other content in between."""
    path = scene(bench.folder / "a.tif", [A])
    bench.once()
    kept = path.read_bytes()
    scene(bench.folder / "a.tif", [B])
    bench.once()
    path.write_bytes(kept)
    assert bench.once() == [] and bench.once() == []


def test_a_date_that_is_gone_or_replaced_is_not_compared_with(bench):
    for n in range(3):
        os.utime(scene(bench.folder / f"{n}.tif", [(8 * n, 8)]), (n, n))
    bench.once()
    (bench.folder / "2.tif").unlink()
    (bench.folder / "1.tif").write_bytes(b"other")
    scene(bench.folder / "9.tif", [C])
    assert [base(line.get("before")) for line in bench.once() if "before" in line] == ["0.tif"]


def test_a_broken_earlier_date_does_not_hold_up_its_place_for_ever(bench):
    """It opens, so that it was taken in; no comparison with it succeeds. After two failures it is put aside."""
    os.utime(scene(bench.folder / "0.tif", [A]), (0, 0))
    bench.once()

    def broken(before, after, **options):
        if before.name.endswith("0.tif"):
            raise InputError(f"{before.name}: cannot be read", fix="copy it again")
        return compare(before, after, **options)

    bench.compare = broken
    for n in range(1, 5):
        os.utime(scene(bench.folder / f"{n}.tif", [(8 * n, 24)]), (n, n))
    lines = bench.once()
    assert ["error" in line for line in lines] == [True, True, False, False]
    assert [base(line["before"]) for line in lines] == ["0.tif", "0.tif", None, "3.tif"]


def test_only_crops_that_an_alert_names_are_kept(bench):
    for n, squares in enumerate(([], [A])):
        os.utime(scene(bench.folder / f"{n}.tif", squares), (n, n))
    bench.once()
    with Journal(bench.journal_path) as journal:
        named = {crop for found in journal.alerts() for crop in found.crops}
    assert named and {str(p) for p in (bench.journal_path.parent / "crops").rglob("*.*")} == named
    assert len(list((bench.journal_path.parent / "thumbnails").iterdir())) == 2


def test_a_full_disk_leaves_the_scene_for_later(bench, monkeypatch):
    scene(bench.folder / "0.tif", [])
    bench.once()
    scene(bench.folder / "1.tif", [A, B, C])
    commit = Journal.commit

    def full(self, *arguments):
        self.row(f"PRAGMA max_page_count = {self.row('PRAGMA page_count')[0]}")
        self.write("INSERT INTO counters VALUES ('x', 1)")
        self.write("UPDATE counters SET name = ?", "y" * 100_000)

    monkeypatch.setattr(Journal, "commit", full)
    with pytest.raises(JournalFullError):
        bench.once()
    monkeypatch.setattr(Journal, "commit", commit)
    (line,) = bench.once()
    assert named([line]) == ["1.tif"] and line["alerts"]
    assert named(bench.lines()) == ["0.tif", "1.tif"]


# --- queue ---


def fill_queue(bench, names, **settings):
    """Take in without answering; the watch's journal."""
    for n, (name, east) in enumerate(names):
        os.utime(scene(bench.folder / f"{name}.tif", [(8 * (n % 7), 8 + n // 7)], east_m=east), (n, n))
    journal, watch = bench.start(queue=3, **settings)
    watch.intake.take()  # the first look
    watch.intake.take()
    return journal, watch


def waiting(journal):
    return [base(found.path) for found in journal.waiting()]


def test_a_full_queue_drops_the_oldest_that_a_later_one_of_its_place_supersedes(bench):
    places = [("a0", 0), ("b0", 5000), ("a1", 0), ("a2", 0), ("b1", 5000)]
    journal, watch = fill_queue(bench, places, keep_all=False)
    with journal:
        assert waiting(journal) == ["a1.tif", "a2.tif", "b1.tif"] or waiting(journal) == ["a2.tif", "b1.tif"]
        assert waiting(journal)[-2:] == ["a2.tif", "b1.tif"], "the latest of each place is kept"
        watch.teller.tell()
        dropped = {base(line["image"]): line["dropped"] for line in bench.lines()}
    assert dropped == {
        "a0.tif": f"superseded by {bench.folder / 'a1.tif'}",
        "b0.tif": f"superseded by {bench.folder / 'b1.tif'}",
    }


def test_where_nothing_is_superseded_files_wait_in_the_folder(bench):
    journal, watch = fill_queue(bench, [(f"p{n}", n * 5000) for n in range(5)], keep_all=False)
    with journal:
        assert waiting(journal) == ["p0.tif", "p1.tif", "p2.tif"]
        watch.once()
    assert named(bench.lines()) == [f"p{n}.tif" for n in range(5)]


def test_once_drops_nothing(bench):
    journal, watch = fill_queue(bench, [(f"{n}", 0) for n in range(8)])
    with journal:
        watch.once()
    assert [base(line["before"]) for line in bench.lines()] == [None, *(f"{n}.tif" for n in range(7))]


def test_a_late_scene_that_is_superseded_already_is_dropped_itself(bench):
    for n, when in enumerate(("2024:05:04", "2024:05:03", "2024:05:02", "2024:05:01")):
        os.utime(scene(bench.folder / f"{n}.tif", [(8 * n, 8)], when=f"{when} 10:00:00"), (n, n))
    journal, watch = bench.start(queue=1, keep_all=False)
    with journal:
        watch.intake.take()
        watch.intake.take()
        assert waiting(journal) == ["0.tif"]
        watch.teller.tell()
    assert ["dropped" in line for line in bench.lines()] == [True] * 3


# --- ends and starts ---


def test_a_stop_gives_up_the_scene_at_hand_and_the_next_start_does_it(bench):
    for n, squares in enumerate(([], [A])):
        os.utime(scene(bench.folder / f"{n}.tif", squares), (n, n))

    def stopped(before, after, *, progress, **options):
        bench.stop.set()
        return compare(before, after, progress=progress, **options)

    bench.compare = stopped
    assert named(bench.once()) == ["0.tif"]
    bench.compare = compare
    bench.stop.clear()
    assert named(bench.once()) == ["1.tif"]
    assert named(bench.lines()) == ["0.tif", "1.tif"]


@pytest.mark.parametrize("kept", ["nothing", "a part", "all"])
@pytest.mark.parametrize("first", ["", "of another program\n"])
def test_a_line_is_once_in_the_file_wherever_the_process_was_killed(bench, kept, first):
    """Between the append and the mark in the journal lies the moment of the kill."""
    bench.output.write_text(first)
    scene(bench.folder / "0.tif", [])
    journal, watch = bench.start()
    watch.teller.stream = sys.stderr  # where the kill is before
    told = journal.told
    journal.told = None
    with journal, pytest.raises(TypeError):
        watch.once()
    assert told
    text = bench.output.read_text().removeprefix(first)
    assert json.loads(text)["before"] is None
    bench.output.write_text(first + {"nothing": "", "a part": text[:25], "all": text}[kept])
    bench.once()
    assert bench.output.read_text() == first + text
    scene(bench.folder / "1.tif", [A])
    bench.once()
    assert bench.output.read_text().startswith(first + text) and bench.output.read_text().count("\n") == 2 + bool(first)


def test_a_file_of_lines_that_was_rotated_goes_on(bench):
    scene(bench.folder / "0.tif", [])
    bench.once()
    bench.output.rename(bench.folder / "old.jsonl")
    scene(bench.folder / "1.tif", [A])
    bench.once()
    assert named(bench.lines()) == ["1.tif"]


# --- kills ---


def test_kill_dash_nine_at_random_moments_loses_nothing_and_doubles_nothing(tmp_path, needs):
    needs("httpx")
    Kills(tmp_path, kills=8, seed=3).run()


# --- the verb ---


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a verb with the small comparison in place of the model's."""
    from edge_rsvlm.watch import comparing

    monkeypatch.setattr(comparing, "by_model", lambda session, rules: compare)
    monkeypatch.setattr("edge_rsvlm.cli.watch_verb.open_session", lambda *_: None)

    def call(verb, *arguments):
        done = CliRunner().invoke(edge_rsvlm.cli.cli, [verb, *map(str, arguments)])
        if isinstance(done.exception, EdgeRsvlmError):
            return done.exception.exit_code, done.stdout, f"error: {done.exception}"
        if done.exception and not isinstance(done.exception, SystemExit):
            raise done.exception
        return done.exit_code, done.stdout, done.stderr

    return call


SINKS = """version = 1
[[sink]]
type = "geojson"
path = "alerts.geojsonl"
"""


def test_once_answers_delivers_and_leaves(run, bench, tmp_path):
    (tmp_path / "SINKS.toml").write_text(SINKS)
    for n, squares in enumerate(([], [A])):
        os.utime(scene(bench.folder / f"{n}.tif", squares), (n, n))
    code, out, err = run("watch", bench.folder, "--once", "--sinks", tmp_path / "SINKS.toml")
    lines = [json.loads(line) for line in out.splitlines()]
    assert (code, err) == (0, "") and [base(line["before"]) for line in lines] == [None, "0.tif"]
    delivered = [json.loads(line)["id"] for line in (tmp_path / "alerts.geojsonl").read_text().splitlines()]
    assert delivered == lines[1]["alerts"] != []
    assert run("watch", bench.folder, "--once", "--sinks", tmp_path / "SINKS.toml") == (0, "", "")


def test_once_tells_of_bad_scenes_and_of_alerts_that_stay(run, bench, tmp_path):
    (bench.folder / "bad.tif").write_bytes(b"II*\0 no raster")
    code, out, err = run("watch", bench.folder, "--once")
    assert code == 3 and "bad.tif" in err and "error" in json.loads(out)
    (tmp_path / "alerts.geojsonl").mkdir()
    (tmp_path / "SINKS.toml").write_text(SINKS)
    for n, squares in enumerate(([], [A])):
        os.utime(scene(bench.folder / f"{n}.tif", squares), (n, n))
    code, out, err = run("watch", bench.folder, "--once", "--sinks", tmp_path / "SINKS.toml")
    assert code == 3 and "cannot write" in err and "wait in the journal" in err
    code, out, err = run("watch", bench.folder, "--once")
    assert code == 3 and "wait for 'geojson', which --sinks does not name" in err


def test_what_was_refused_is_sent_again_when_asked(run, bench, tmp_path, needs):
    needs("httpx")
    for n, squares in enumerate(([], [A])):
        os.utime(scene(bench.folder / f"{n}.tif", squares), (n, n))
    with HttpReceiver(lambda key: 422) as receiver:
        (tmp_path / "SINKS.toml").write_text(f'version = 1\n[[sink]]\ntype = "webhook"\nurl = "{receiver.url}"\n')
        command = "watch", bench.folder, "--once", "--sinks", tmp_path / "SINKS.toml"
        code, out, err = run(*command)
        refused = json.loads(out.splitlines()[1])["alerts"]
        assert code == 3 and "refused for good" in err and len(receiver.requests) == len(refused) > 0
        receiver.answer = lambda key: 200
        assert run(*command) == (0, "", "") and not receiver.taken
        assert run(*command, "--retry-refused") == (0, "", f"refused deliveries that are sent again: {len(refused)}\n")
        assert receiver.taken == refused
        assert run(*command, "--retry-refused") == (0, "", "refused deliveries that are sent again: 0\n")


def test_a_signal_ends_a_watch_cleanly(bench):
    """As a process of its own, which is at a scene or waits for one."""
    for n, squares in enumerate(([], [A], [B])):
        os.utime(scene(bench.folder / f"{n}.tif", squares), (n, n))
    for number in (signal.SIGTERM, signal.SIGINT):
        command = [sys.executable, "-m", "tests.watching", str(bench.folder), "http://127.0.0.1:9"]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stderr.readline() == "ready\n"
        if number is signal.SIGTERM:
            assert json.loads(process.stdout.readline())["before"] is None
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0 and "Traceback" not in err
    names = named(bench.lines())
    assert names == [f"{n}.tif" for n in range(len(names))] and names
    with exclusive(bench.journal_path):
        pass


def test_wrong_usage_of_a_watch_is_two(run, bench, tmp_path):
    assert run("watch", tmp_path / "nothing")[0] == 2
    assert run("watch", bench.folder, "--sinks", tmp_path / "no.toml")[0] == 2
    assert run("watch", bench.folder, "--every", "2")[0] == 2
    with exclusive((bench.folder / ".edge-rsvlm" / "journal.sqlite").absolute()):
        code, _, err = run("watch", bench.folder, "--once")
    assert code == 2 and "another watch" in err


RULES = """version = 1
[[rule]]
name = "new"
persistence = 2
"""


def test_the_model_and_the_rules_of_the_bundle_are_asked(tmp_path, monkeypatch):
    """What is new has to be seen on two dates: until then the same earlier date is compared with."""
    init = Session.__init__
    monkeypatch.setattr(
        Session, "__init__", lambda self, *a, **k: init(self, *a, **({"engine_factory": fake_engine} | k))
    )
    write_bundle(tmp_path / "bundle")
    (tmp_path / "RULES.toml").write_text(RULES)
    (tmp_path / "in").mkdir()
    found = [(60, 60, 30)]
    for year, squares in ((2020, []), (2021, found), (2022, found), (2023, found)):
        path = write(tmp_path / "in" / f"{year}.tif", pixels(squares, (256, 256)), **UTM)
        with rasterio.open(path, "r+") as out:
            out.update_tags(TIFFTAG_DATETIME=f"{year}:05:01 10:00:00", noise=str(year))
    options = ["--bundle", str(tmp_path / "bundle"), "--allow-unsigned", "--rule", str(tmp_path / "RULES.toml")]
    done = CliRunner().invoke(edge_rsvlm.cli.cli, ["watch", str(tmp_path / "in"), "--once", *options])
    assert done.exit_code == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [base(line["before"]) for line in lines] == [None, "2020.tif", "2020.tif", "2022.tif"]
    assert [len(line["alerts"]) for line in lines] == [0, 0, 1, 0]
    assert lines[1]["pending"] == {"new": 1} and lines[1]["changes"] == 1
    assert lines[2]["coverage"] == 1 and lines[2]["taken"].startswith("2022-05-01")
