"""The order of the downlink: alerts first, the most value per byte, and never more than the budget."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner

import edge_rsvlm.cli
from edge_rsvlm.alerts.journal import Journal
from edge_rsvlm.errors import EdgeRsvlmError
from edge_rsvlm.watch.downlink import HEAD_BYTES, downlink
from tests.made_alerts import alert, put


def crop(journal, name, size):
    path = journal.path.parent / "crops" / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"c" * size)
    return str(path)


@pytest.fixture
def filled(tmp_path):
    """Alerts of several scores and sizes with crops, captions and thumbnails."""
    with Journal(tmp_path / "home" / "j", durable=False) as journal:
        for n in range(12):
            found = alert(
                n, score=(n % 4 + 1) / 4, sentence="w" * (50 * (n % 3)), crops=[crop(journal, f"{n}.webp", 900)]
            )
            put(journal, [found], (), name=f"{n}.tif")
            picture = journal.path.parent / "thumbnails" / f"{n + 1:08d}.jpg"
            picture.parent.mkdir(exist_ok=True)
            picture.write_bytes(b"t" * 700)
        yield journal


def bytes_in(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_passes_never_exceed_the_budget_and_together_send_everything_once(filled, tmp_path):
    sent, kinds, rng = [], [], np.random.default_rng(5)
    for number in range(1, 100):
        budget = int(rng.integers(HEAD_BYTES, 9000))
        folder, this = downlink(filled, tmp_path / "to", budget)
        assert bytes_in(folder) <= budget
        manifest = json.loads((folder / "manifest.json").read_text())
        assert manifest["sent"] == this.sent and manifest["pass"] == number
        sent += [(entry["kind"], entry["name"]) for entry in this.sent]
        kinds.append([entry["kind"] for entry in this.sent])
        listed = [json.loads(line) for line in (tmp_path / "to" / "waiting.jsonl").read_text().splitlines()]
        assert len(listed) == sum(kind["count"] for kind in manifest["waiting"].values())
        assert sum(entry["bytes"] for entry in listed) == sum(kind["bytes"] for kind in manifest["waiting"].values())
        if this.number > 1 and not listed:
            break
    assert len(sent) == len(set(sent)) == 48, "12 of each class"
    order = ("alert", "crop", "caption", "thumbnail")
    assert all(found == sorted(found, key=order.index) for found in kinds)
    first_crop = next(i for i, (kind, _) in enumerate(sent) if kind == "crop")
    assert {name for kind, name in sent[:first_crop] if kind == "alert"}


def test_what_is_sent_is_what_lies_in_the_journal(filled, tmp_path):
    folder, _ = downlink(filled, tmp_path / "to", 1 << 20)
    features = [json.loads(line) for line in (folder / "alerts.geojsonl").read_text().splitlines()]
    assert {f["id"] for f in features} == {found.id for found in filled.alerts()}
    density = [f["properties"]["score"] / len(json.dumps(f, ensure_ascii=False)) for f in features]
    assert density == sorted(density, reverse=True), "the most value per byte first"
    assert len(list((folder / "crops").iterdir())) == len(list((folder / "thumbnails").iterdir())) == 12
    assert (folder / "captions.jsonl").read_text().count("\n") == 12


def test_an_alert_that_does_not_fit_lets_smaller_ones_by_and_its_crop_waits(tmp_path):
    with Journal(tmp_path / "home" / "j", durable=False) as journal:
        large = alert(1, 1.0, sentence="w" * 5000, crops=[crop(journal, "1.webp", 10)])
        put(journal, [large, alert(2, 0.1, crops=[crop(journal, "2.webp", 10)])], ())
        _, this = downlink(journal, tmp_path / "to", 3000)
        assert [(e["kind"], e["name"]) for e in this.sent][:2] == [("alert", alert(2).id), ("crop", "crops/2.webp")]
        assert this.waiting["alert"]["count"] == this.waiting["crop"]["count"] == 1


def test_a_pass_that_was_killed_before_it_was_journalled_is_made_again(filled, tmp_path, monkeypatch):
    write = Journal.write

    def killed(self, sql, *values):
        if sql.startswith("INSERT OR REPLACE INTO sent"):
            raise KeyboardInterrupt
        return write(self, sql, *values)

    monkeypatch.setattr(Journal, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        downlink(filled, tmp_path / "to", 4000)
    monkeypatch.undo()
    before = (tmp_path / "to" / "pass-0001" / "manifest.json").read_text()
    folder, _ = downlink(filled, tmp_path / "to", 4000)
    assert folder.name == "pass-0001" and (folder / "manifest.json").read_text() == before
    assert not list((tmp_path / "to").glob(".*"))


def run(*arguments):
    done = CliRunner().invoke(edge_rsvlm.cli.cli, ["downlink", *map(str, arguments)])
    if isinstance(done.exception, EdgeRsvlmError):
        return done.exception.exit_code, done.stdout, f"error: {done.exception}"
    return done.exit_code, done.stdout, done.stderr


def test_the_verb_says_what_it_sent_and_what_waits(filled, tmp_path):
    code, out, err = run("--journal", filled.path, "--budget", "4KiB", "--to", tmp_path / "to")
    assert (code, err) == (0, "") and "pass-0001" in out and "crops" in out and "wait" in out
    assert run("--journal", filled.path, "--budget", "100", "--to", tmp_path / "to")[0] == 2
    assert run("--journal", tmp_path / "no", "--budget", "4KiB", "--to", tmp_path / "to")[0] == 2
    assert not (tmp_path / "no").exists()
