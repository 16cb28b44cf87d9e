"""A watch with a small deterministic comparison in place of the model, in this process or as one of its own."""

from __future__ import annotations

import hashlib
import io
import json
import sys
import threading
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import rasterio

from edge_rsvlm.alerts import outbox
from edge_rsvlm.alerts.journal import Journal
from edge_rsvlm.alerts.store import exclusive
from edge_rsvlm.errors import InputError
from edge_rsvlm.types import Alert
from edge_rsvlm.watch.assemble import Settings, make_watch
from edge_rsvlm.watch.comparing import Compared
from edge_rsvlm.watch.courier import Route
from tests.scenes import UTM, write

SIZE = (64, 48)


def scene(path, squares=(), east_m=0.0, size=SIZE, when=None, number=0, **profile):
    """A raster with bright squares, moved east; written beside its place and renamed.

    Each ``number`` makes another content.
    """
    image = np.full((3, size[1], size[0]), 40, np.uint8)
    for col, row in squares:
        image[:, row : row + 6, col : col + 6] = 220
    image[1:, -1, -1] = divmod(number, 256)
    transform = rasterio.Affine(0.5, 0, UTM["transform"].c + east_m, 0, -0.5, UTM["transform"].f)
    partial = path.with_name(f".{path.name}")
    write(partial, image, tiled=False, **({"crs": UTM["crs"], "transform": transform} | profile))
    if when:
        with rasterio.open(partial, "r+") as out:
            out.update_tags(TIFFTAG_DATETIME=when)
    partial.rename(path)
    return path


def compare(before, after, *, tracks, when, crops, progress):
    """An alert for each whole 8 x 8 block that changed; its id is of the two names and the block."""
    images = []
    for source in (before, after):
        try:
            with rasterio.open(source.path) as dataset:
                images.append(dataset.read(1).astype(int))
        except rasterio.RasterioIOError as exc:
            raise InputError(f"{source.name}: cannot be read", fix="copy it again") from exc
    rows = images[0].shape[0] // 8
    alerts = []
    for row in range(rows):
        progress(row, rows)
        for col in range(images[0].shape[1] // 8):
            block = np.s_[row * 8 : row * 8 + 8, col * 8 : col * 8 + 8]
            change = np.abs(images[1][block] - images[0][block]).mean() / 255
            if change > 0.05:
                alerts.append(_alert(before, after, when, col, row, round(float(change), 4), crops))
    record = {"changed_fraction": len(alerts) / 48, "changes": len(alerts), "coverage": 1.0, "timing_ms": {}}
    return Compared(record, alerts, [*tracks, {"after": Path(after.name).name}])


def _alert(before, after, when, col, row, score, crops):
    names = [Path(source.name).name for source in (before, after)]
    id = hashlib.sha256(f"{names} {col} {row}".encode()).hexdigest()[:32]
    crops.mkdir(parents=True, exist_ok=True)
    files = [crops / f"{id}.jpg", crops / f"{id} not named.jpg"]
    for file in files:
        file.write_bytes(b"picture" * (10 + col))
    lon, lat = 15 + col / 1000, 47.8 + row / 1000
    ring = [[lon, lat], [lon + 1e-3, lat], [lon + 1e-3, lat + 1e-3], [lon, lat + 1e-3], [lon, lat]]
    geometry = {"type": "Polygon", "coordinates": [ring]}
    record = {"before": names[0], "after": names[1], "area_px": 64}
    return Alert(id, "any", when, score, f"block {col} {row} of {names[1]}", geometry, record, (str(files[0]),))


class Told:
    """What a watch reports beside its lines."""

    def __init__(self):
        self.said, self.failures, self.partials, self.troubles = [], [], [], []

    def say(self, text):
        self.said.append(text)

    def failed(self, name, exc):
        self.failures.append((name, str(exc)))

    def partial(self, name, coverage):
        self.partials.append((name, coverage))

    def trouble(self, exc):
        self.troubles.append(str(exc))


class Bench:
    """A folder and its watches, each as a new process would begin one; without threads that deliver."""

    def __init__(self, folder, **settings):
        self.folder, self.told, self.stop = folder, Told(), threading.Event()
        self.journal_path = folder / ".edge-rsvlm" / "journal.sqlite"
        self.output = folder / "lines.jsonl"
        self.settings = {"quiet_s": 0.0, "output": self.output, "keep_all": True, **settings}
        self.compare = compare
        self.streams = []

    def start(self, sinks=("s",), **settings):
        """(journal, watch); the sinks take nothing."""
        journal = Journal(self.journal_path, durable=False)
        self.streams.append(io.StringIO())
        routes = dict.fromkeys(sinks, Route(None))
        wanted = Settings(self.folder, **{**self.settings, **settings})
        return journal, make_watch(journal, wanted, self.compare, routes, self.stop, self.streams[-1], self.told)

    def once(self, **settings):
        """One run over what is there; the new lines."""
        journal, watch = self.start(**settings)
        with journal:
            watch.once()
        return [json.loads(line) for line in self.streams[-1].getvalue().splitlines()]

    def lines(self):
        return [json.loads(line) for line in self.output.read_text().splitlines()]


def run(folder, url, every_s, stream, signals=False, ready=lambda: None):
    """A watch with a webhook that runs until it is killed, or ends on ``signals`` as the verb does."""
    from edge_rsvlm.cli.watch_verb import until_signal
    from edge_rsvlm.sinks.webhook import Webhook

    folder = Path(folder)
    path = folder / ".edge-rsvlm" / "journal.sqlite"
    told = Told()
    told.say = told.trouble = lambda text: print(text, file=sys.stderr)
    told.failed = lambda name, exc: print(name, exc, file=sys.stderr)
    settings = Settings(folder, folder / "lines.jsonl", quiet_s=0.02, keep_all=True)
    signalled = until_signal() if signals else nullcontext(threading.Event())
    with exclusive(path), Journal(path) as journal, signalled as stop:
        routes = {"hook": Route(Webhook(url, timeout_s=5))}
        watch = make_watch(journal, settings, compare, routes, stop, stream, told)
        watch.couriers.start()
        ready()
        watch.run(every_s)
        watch.couriers.finish(5, drain=False)


def be_killed(folder, url, every_s, connection):
    """For a process that is killed: says over ``connection`` that it works. It does not wait for minutes."""
    outbox.FIRST_WAIT_S, outbox.LONGEST_WAIT_S = 0.02, 0.1
    run(folder, url, every_s, io.StringIO(), ready=lambda: connection.send("ready"))


if __name__ == "__main__":
    run(
        sys.argv[1],
        sys.argv[2],
        0.01,
        sys.stdout,
        signals=True,
        ready=lambda: print("ready", file=sys.stderr, flush=True),
    )
