"""New files become waiting scenes of the journal, at most so many at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edge_rsvlm.alerts.entries import Scene, Seen
from edge_rsvlm.alerts.journal import Journal
from edge_rsvlm.errors import InputError
from edge_rsvlm.watch.facts import Facts, facts, file_time, seen
from edge_rsvlm.watch.folder import File, Folder
from edge_rsvlm.watch.places import SAME_PLACE, share_covered

Line = dict[str, Any]
UNREAD = "unread"
"""The identity of content that could not be read."""


@dataclass
class Intake:
    """Takes in whole files of ``folder``, the oldest first, until ``most`` scenes wait.

    When more come and ``drops``, the scene that has waited longest is dropped of those that a later waiting one
    supersedes: the same place, taken later. The latest of each place is never dropped: where nothing is superseded, or
    not ``drops``, new files stay in the folder until there is room.

    ``shown`` is a path as the user knows it; ``unusable`` is told of files that cannot be read.
    """

    folder: Folder
    journal: Journal
    most: int
    drops: bool
    shown: Callable[[str], str]
    unusable: Callable[[str, InputError], None]
    _left: dict[File, tuple[Seen, Facts]] = field(default_factory=dict)
    """Files that were looked at and left in the folder for now."""

    def take(self) -> bool:
        """Whether anything new was taken in, or answered at once."""
        left, self._left = self._left, {}
        changed = False
        for file in self.folder.look(self._known):
            if not self.drops and self.journal.waiting_count() >= self.most:
                break
            found = left.get(file) or self._looked_at(file)
            if found is None or self._admit(*found):
                changed = True
            else:
                self._left[file] = found
        return changed

    def _known(self, file: File) -> bool:
        return self.journal.knows(str(file.path), file.size, file.mtime_ns)

    def _looked_at(self, file: File) -> tuple[Seen, Facts] | None:
        """None for what needs no comparison: what was answered before, and what cannot be used."""
        try:
            found = seen(file)
        except InputError as exc:
            self._refuse(Seen(str(file.path), file.size, file.mtime_ns, UNREAD), exc)
            return None
        if self._answered_before(found):
            return None
        try:
            return found, facts(file)
        except InputError as exc:
            self._refuse(found, exc)
            return None

    def _refuse(self, broken: Seen, why: InputError) -> None:
        name = self.shown(broken.path)
        line = {"image": name, "error": str(why)}
        self.journal.answer_at_once(broken, "failed", line, file_time(broken.mtime_ns))
        self.unusable(name, why)

    def _answered_before(self, found: Seen) -> bool:
        """The same content: touched, renamed, or copied. Only a copy is a new file that gets a line."""
        other = self.journal.same_content(found.identity)
        if other is None:
            return False
        if other == found.path or not Path(other).exists():
            self.journal.rename(found)
        else:
            line = {"image": self.shown(found.path), "same_as": self.shown(other)}
            self.journal.answer_at_once(found, "done", line, file_time(found.mtime_ns))
        return True

    def _admit(self, found: Seen, what: Facts) -> bool:
        """Whether there was room, or was made."""
        place = self._place(what)
        drops: list[tuple[Scene, Line]] = []
        if self.journal.waiting_count() >= self.most:
            new = Scene(1 << 62, found, place or -1, what.taken, what.footprint, what.alike)
            victim = self._superseded([*self.journal.waiting(), new])
            if victim is None:
                return False
            scene, by = victim
            line = {"image": self.shown(scene.path), "dropped": f"superseded by {self.shown(by.path)}"}
            if scene is new:
                self.journal.answer_at_once(found, "dropped", line, what.taken)
                return True
            drops = [(scene, line)]
        self.journal.admit(
            found, taken=what.taken, footprint=what.footprint, alike=what.alike, place=place, drops=drops
        )
        return True

    def _place(self, what: Facts) -> int | None:
        """That of the latest scene that covers enough of this one."""
        if what.footprint is None:
            found = self.journal.neighbours(None, what.alike)
            return next((scene.place for scene in found), None)
        latitudes = [lat for _, lat in what.footprint]
        for scene in self.journal.neighbours((min(latitudes), max(latitudes)), None):
            if scene.footprint and share_covered(scene.footprint, what.footprint) >= SAME_PLACE:
                return scene.place
        return None

    @staticmethod
    def _superseded(scenes: list[Scene]) -> tuple[Scene, Scene] | None:
        """The first scene that another one supersedes, and that one."""
        for scene in scenes:
            for other in scenes:
                if supersedes(other, scene):
                    return scene, other
        return None


def supersedes(later: Scene, scene: Scene) -> bool:
    """Whether ``later`` shows what ``scene`` shows, and was taken after it."""
    if later.place != scene.place or (later.taken, later.seq) <= (scene.taken, scene.seq):
        return False
    return covers(later, scene)


def covers(other: Scene, scene: Scene) -> bool:
    """Whether enough of ``scene`` lies in ``other``, for scenes of one place."""
    if other.footprint is None or scene.footprint is None:
        return other.alike == scene.alike
    return share_covered(other.footprint, scene.footprint) >= SAME_PLACE
