"""What a journal forgets so that it stays under its size.

Above three quarters of its size it forgets what is settled, oldest first: alerts that every sink took or refused, or
that were sent down, with their crops; then result lines that were told; then scenes whose file is gone. At its full
size, alerts that still wait are dropped, the lowest score first, and counted. Crops and thumbnails count as its bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from edge_rsvlm.alerts.entries import alert_of
from edge_rsvlm.alerts.journal import Journal

SOFT_SHARE = 0.75
AT_ONCE = 64
CROPS, THUMBNAILS = "crops", "thumbnails"
"""Folders beside the journal: evidence of alerts, and a picture of every scene."""
DROPPED = "alerts_dropped"
_SETTLED = """SELECT id FROM alerts WHERE NOT EXISTS
    (SELECT 1 FROM deliveries WHERE alert = id AND state = 'waiting')
    AND (EXISTS (SELECT 1 FROM deliveries WHERE alert = id)
        OR EXISTS (SELECT 1 FROM sent WHERE kind = 'alert' AND name = id))
    ORDER BY arrival LIMIT ?"""


def crop_folder(journal: Path, seq: int) -> Path:
    """Where crops of the alerts of a scene are kept."""
    return journal.parent / CROPS / f"{seq:08d}"


def thumbnail_path(journal: Path, seq: int) -> Path:
    return journal.parent / THUMBNAILS / f"{seq:08d}.jpg"


def evidence_name(journal: Path, path: Path) -> str:
    """A crop or thumbnail by its path from the journal's folder."""
    home = journal.parent.resolve()
    return str(path.resolve().relative_to(home)) if home in path.resolve().parents else str(path)


def used_bytes(journal: Journal) -> int:
    """Of the journal with its crops and thumbnails."""
    sql = "SELECT (SELECT coalesce(sum(file_bytes), 0) FROM alerts) + (SELECT coalesce(sum(file_bytes), 0) FROM lines)"
    found = journal.row(sql)
    assert found
    return journal.database.used_bytes + int(found[0])


def keep_within(journal: Journal, limit_bytes: int) -> int:
    """Make room; how many undelivered alerts had to be dropped for it."""
    soft_bytes = limit_bytes * SOFT_SHARE
    for forget in (_forget_settled, _forget_lines, _forget_scenes):
        _until(journal, soft_bytes, forget)
    return _until(journal, limit_bytes, _drop_lowest)


def _until(journal: Journal, most_bytes: float, forget: Callable[[Journal], int]) -> int:
    forgotten = 0
    while used_bytes(journal) > most_bytes:
        with journal.database.transaction():
            count = forget(journal)
        if not count:
            break
        forgotten += count
    return forgotten


def _forget_settled(journal: Journal) -> int:
    return _remove(journal, [id for (id,) in journal.rows(_SETTLED, AT_ONCE)])


def _drop_lowest(journal: Journal) -> int:
    ids = [id for (id,) in journal.rows("SELECT id FROM alerts ORDER BY score, arrival LIMIT ?", AT_ONCE)]
    journal.count(DROPPED, len(ids))
    return _remove(journal, ids)


def _remove(journal: Journal, ids: list[str]) -> int:
    """Alerts with all that belongs to them."""
    for id in ids:
        found = journal.row("SELECT json, scene FROM alerts WHERE id = ?", id)
        if found is None:
            continue
        journal.write("DELETE FROM deliveries WHERE alert = ?", id)
        journal.write("DELETE FROM sent WHERE kind = 'alert' AND name = ?", id)
        journal.write("DELETE FROM alerts WHERE id = ?", id)
        others = journal.rows("SELECT json FROM alerts WHERE scene = ?", found[1])
        shared = {crop for (text,) in others for crop in alert_of(text).crops}
        for crop in set(alert_of(found[0]).crops) - shared:
            _remove_file(journal, "crop", Path(crop))
    return len(ids)


def _forget_lines(journal: Journal) -> int:
    told = list(journal.rows("SELECT n, scene FROM lines WHERE told = 1 ORDER BY n LIMIT ?", AT_ONCE))
    for n, scene in told:
        journal.write("DELETE FROM lines WHERE n = ?", n)
        journal.write("DELETE FROM sent WHERE kind = 'caption' AND name = ?", str(n))
        _remove_file(journal, "thumbnail", thumbnail_path(journal.path, scene))
    return len(told)


def _remove_file(journal: Journal, kind: str, path: Path) -> None:
    """Never one that is not in the journal's own folders."""
    folders = {(journal.path.parent / folder).resolve() for folder in (CROPS, THUMBNAILS)}
    journal.write("DELETE FROM sent WHERE kind = ? AND name = ?", kind, evidence_name(journal.path, path))
    if folders & set(path.resolve().parents):
        path.unlink(missing_ok=True)


def _forget_scenes(journal: Journal) -> int:
    """Those whose file is still there would be taken for new ones."""
    gone = []
    for seq, path in journal.rows("SELECT seq, path FROM scenes WHERE state != 'waiting' ORDER BY seq"):
        if not Path(path).exists():
            gone.append(seq)
        if len(gone) == AT_ONCE:
            break
    for seq in gone:
        journal.write("DELETE FROM scenes WHERE seq = ?", seq)
    return len(gone)
