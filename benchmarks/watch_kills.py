"""Kills a watch with SIGKILL again and again, before a receiver that fails at random, and counts what arrived.

    python -m benchmarks.watch_kills --kills 200

Every alert must arrive, each under one id, and the file of result lines must hold each scene once. The comparison is a
small deterministic one: what is tried is the journal and the outbox. The receiver fails a third of the requests, half
of those after it took the alert, so that it gets repeats, as it does over any real link.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import tempfile
import time
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.receivers import HttpReceiver
from tests.watching import be_killed, compare, scene

SCENES_PER_KILL = 3
DONE_WITHIN_S = 600
STARTS_UP_S, WORKS_S, MOMENT_S = 0.3, 5.0, 0.1
MOST_REQUESTS = 30


class Kills:
    """``run`` raises AssertionError when anything is lost, doubled, or under two ids."""

    def __init__(self, folder: Path, kills: int, seed: int) -> None:
        self._folder = folder / "in"
        self._folder.mkdir()
        self._kills, self._random = kills, random.Random(seed)
        self._scenes: list[Path] = []
        self._taken: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()
        self._flaky = True
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["tests.watching", "edge_rsvlm.sinks.webhook", "httpx"])

    def run(self) -> None:
        with HttpReceiver(self._answer) as receiver:
            for _ in range(self._kills):
                self._kill(receiver)
            self._flaky = False
            self._finish(receiver)
        self._check(receiver)

    def _answer(self, key: str) -> int:
        """Taken, failed, or taken and failed."""
        chance = self._random.random() if self._flaky else 1.0
        if chance >= 1 / 6:
            self._taken[key] += 1
        return 200 if chance >= 1 / 3 else 503

    def _add_scene(self) -> None:
        """Each differs from the one before it in a few blocks."""
        n = len(self._scenes)
        squares = [(self._random.randrange(7) * 8, self._random.randrange(5) * 8) for _ in range(3)]
        hidden = self._folder / f".{n:05d}.making.tif"
        scene(hidden, squares, number=n)
        os.utime(hidden, (1000 + n, 1000 + n))
        self._scenes.append(hidden.rename(self._folder / f"{n:05d}.tif"))

    def _start(self, receiver: HttpReceiver) -> tuple[Any, Connection]:
        """A watch, and what says that it is at work. It is forked from a server that has imported everything."""
        here, there = self._context.Pipe(duplex=False)
        arguments = (self._folder, receiver.url, 0.01, there)
        process = self._context.Process(target=be_killed, args=arguments, daemon=True)
        process.start()
        there.close()
        return process, here

    def _kill(self, receiver: HttpReceiver) -> None:
        """Most at work, some while it starts."""
        for _ in range(SCENES_PER_KILL):
            self._add_scene()
        process, connection = self._start(receiver)
        if self._random.random() < 0.1:
            time.sleep(self._random.uniform(0, STARTS_UP_S))
        else:
            assert connection.recv() == "ready"
            self._let_work(receiver)
        lines = self._lines()
        self.counts["kills with scenes unanswered"] += len(lines) < len(self._scenes)
        self.counts["kills with alerts undelivered"] += not {id for line in lines for id in line["alerts"]} <= set(
            self._taken
        )
        assert process.is_alive(), "it ended by itself"
        process.kill()
        process.join()
        connection.close()

    def _let_work(self, receiver: HttpReceiver) -> None:
        """Until some alerts were sent, and a moment longer: at any step of the work."""
        enough = len(receiver.requests) + self._random.randrange(MOST_REQUESTS)
        until = time.monotonic() + WORKS_S
        while len(receiver.requests) < enough and time.monotonic() < until:
            time.sleep(0.002)
        time.sleep(self._random.uniform(0, MOMENT_S))

    def _lines(self) -> list[dict[str, Any]]:
        """Whole lines of the output so far."""
        output = self._folder / "lines.jsonl"
        text = output.read_text() if output.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def _finish(self, receiver: HttpReceiver) -> None:
        expected, until = self._expected(), time.monotonic() + DONE_WITHIN_S
        process, _ = self._start(receiver)
        while not set(expected) <= set(self._taken) or len(self._lines()) < len(self._scenes):
            assert process.is_alive() and time.monotonic() < until, "the watch does not come to its end"
            time.sleep(0.05)
        process.kill()
        process.join()

    def _expected(self) -> dict[str, str]:
        """Alerts by id, with what they say: each scene against the one before it."""
        from edge_rsvlm.raster.inputs import Source

        found = {}
        with tempfile.TemporaryDirectory() as crops:
            for before, after in zip(self._scenes, self._scenes[1:], strict=False):
                sources = Source(str(before), str(before)), Source(str(after), str(after))
                done = compare(*sources, tracks=[], when="2024", crops=Path(crops), progress=lambda *_: None)
                found |= {alert.id: alert.sentence for alert in done.alerts}
        return found

    def _check(self, receiver: HttpReceiver) -> None:
        expected = self._expected()
        said = {(f["id"], f["properties"]["sentence"]) for f in receiver.features()}
        assert set(self._taken) == set(expected), f"lost or not due: {set(self._taken) ^ set(expected)}"
        assert said == set(expected.items()), "each under one id"
        names = [Path(line["image"]).name for line in self._lines()]
        assert names == [path.name for path in self._scenes], "one line per scene, in order"
        befores = [line["before"] and Path(line["before"]).name for line in self._lines()]
        assert befores == [None, *names[:-1]]
        told = [id for line in self._lines() for id in line["alerts"]]
        assert sorted(told) == sorted(expected)
        self.counts.update(
            kills=self._kills, scenes=len(names), alerts=len(expected), requests=len(receiver.requests),
            repeats=sum(self._taken.values()) - len(self._taken),
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        kills = Kills(Path(folder), options.kills, options.seed)
        kills.run()
    for name, count in kills.counts.items():
        print(f"{name}: {count}")
    print(f"nothing lost, nothing under two ids, in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
