"""Two dates of a place -> changes with their evidence, and alerts where rules say so: the same for every caller."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from edge_rsvlm.alerts.ids import Identity, change_id
from edge_rsvlm.alerts.passes import RulePass, Scene, Verdict
from edge_rsvlm.alerts.places import place_of
from edge_rsvlm.alerts.times import instant, written
from edge_rsvlm.alerts.tracks import Tracks
from edge_rsvlm.bundle import Bundle
from edge_rsvlm.config.cover import UNKNOWN
from edge_rsvlm.config.rules import Rules
from edge_rsvlm.errors import UsageError
from edge_rsvlm.geo import PixelMapper, box_ring, feature_geometry
from edge_rsvlm.pipeline.change import ChangeOutcome, MaskRows
from edge_rsvlm.pipeline.covers import cover_labels, too_coarse
from edge_rsvlm.pipeline.evidence import Wanted
from edge_rsvlm.pipeline.outcome import Emit, Progress
from edge_rsvlm.pipeline.session import Session, georeference
from edge_rsvlm.raster.acquired import acquired
from edge_rsvlm.raster.inputs import Source
from edge_rsvlm.sinks.files import writing
from edge_rsvlm.types import Alert, Georeference

NOWHERE = (0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Comparison:
    """What ``compare`` found beside the changes, which it emits one by one.

    ``alerts``: at most the budget of the rules, highest score first. ``held_back`` met a rule and were beyond the
    budget. ``pending`` are seen and have yet to persist, by rule. ``silenced`` are within the cool-down of an earlier
    alert. ``tracks`` are those given, as they are after this pass: keep them for the next one.
    """

    outcome: ChangeOutcome
    alerts: list[Alert]
    tracks: Tracks
    held_back: int = 0
    pending: dict[str, int] = field(default_factory=dict)
    silenced: int = 0


def compare(
    session: Session,
    before: Source,
    after: Source,
    emit: Emit,
    *,
    rules: Rules | None,
    tracks: Tracks | None,
    when: str,
    crops: Path | None,
    mask_rows: MaskRows | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Find what changed from ``before`` to ``after``, and what of it the rules want told.

    ``Source(name, path)``: the name is what records say and what ids are made of (its last part), the path what is
    opened. ``emit`` gets each change as soon as it is final, with its evidence: ``id``, ``from``, ``to``, ``sentence``,
    ``spectral`` where there is near infrared, ``crops`` where they are kept in the folder ``crops``, which is made.

    ``when`` is the time of ``after``, UTC in ISO 8601 ("2024-05-01T10:00:00Z", or a day, or a year): persistence and
    cool-downs are counted by it, never by a clock. ``tracks`` are those of the pass before (None: the first); they are
    not changed, and ``Comparison.tracks`` are new. ``Tracks.rows()`` and ``Tracks.of(rows)`` are their plain form.

    A change persists when it is seen again from the same ``before``: against the scene in which it came it is no change
    any more. So while ``Comparison.pending`` is not empty compare the next scene with the same ``before``.

    UsageError for rules about what this bundle cannot tell, and for a folder that cannot be made.
    """
    where = georeference(after.path)
    tracks, rule_pass = Tracks() if tracks is None else tracks, None
    if rules is not None:
        check_classes(rules, session.bundle)
        rule_pass = RulePass(rules, tracks, _scene(before, after, where, when))
    if crops is not None:
        with writing(crops):
            crops.mkdir(parents=True, exist_ok=True)

    def ruled(record: dict[str, Any], geometry: dict[str, Any] | None) -> None:
        emit(record, geometry)
        if rule_pass is not None:
            rule_pass.feed(record, geometry)

    wanted = Wanted(partial(change_id, _identity(before, georeference(before.path)), _identity(after, where)), crops)
    outcome = session.change(before.path, after.path, ruled, mask_rows, progress, wanted)
    if rules is None or rule_pass is None:
        return Comparison(outcome, [], tracks)
    return _compared(outcome, rule_pass.finish(complete=outcome.complete), _notes(rules, session.bundle, where))


def scene_time(source: Source) -> str:
    """When a scene was taken as its file or its name says, else when the file was written: UTC in ISO 8601.

    InputError for what cannot be read.
    """
    taken = acquired(source.path, source.name)
    if taken is not None:
        return written(instant(taken))
    file = Path(source.path.rpartition(",")[2])  # a member of an archive: "/vsisubfile/offset_size,archive"
    modified = file.stat().st_mtime if file.is_file() else 0.0
    return written(datetime.fromtimestamp(modified, timezone.utc))


def _compared(outcome: ChangeOutcome, verdict: Verdict, notes: list[str]) -> Comparison:
    outcome.warnings += [*notes, *verdict.warnings]
    for rule, count in verdict.pending.items():
        outcome.warnings.append(f"rule '{rule}': {count} pending, since what it looks for must be seen on more dates")
    if verdict.held_back:
        outcome.warnings.append(f"{verdict.held_back} alerts were held back: the budget of the rules was reached")
    return Comparison(
        outcome, verdict.alerts, verdict.tracks, verdict.held_back, dict(verdict.pending), verdict.silenced
    )


def _scene(before: Source, after: Source, where: Georeference, when: str) -> Scene:
    instant(when)  # which refuses what is no time before any work
    mapper = PixelMapper(where)
    geometry = feature_geometry([box_ring(np.array([0, 0, where.width, where.height], np.float64))], mapper)
    # Where a corner has no place, as off the disk of a geostationary image, nothing counts as looked at.
    extent = NOWHERE if geometry is None else place_of(geometry)
    return Scene(when, mapper.located, extent, {"before": before.name, "after": after.name})


def _identity(source: Source, where: Georeference) -> Identity:
    """A scene by its name, its bytes where it is a file, its pixels and where they lie: nothing of this machine."""
    path = Path(source.path)
    size = path.stat().st_size if path.is_file() else 0
    transform = () if where.transform is None else tuple(float(value) for value in where.transform[:6])
    return (Path(source.name).name, size, where.width, where.height, *transform)


def check_classes(rules: Rules, bundle: Bundle) -> None:
    """UsageError for a rule whose classes this bundle never gives: it would wait in vain."""
    known = {*cover_labels(bundle), UNKNOWN}
    for rule in rules.rules:
        strange = [label for label in (*rule.from_, *rule.to) if label not in known]
        if strange:
            problem = f"rule '{rule.name}' waits for '{strange[0]}', which bundle '{bundle.manifest.name}' cannot tell"
            raise UsageError(problem, fix=f"it can tell {', '.join(sorted(known))}")


def _notes(rules: Rules, bundle: Bundle, where: Georeference) -> list[str]:
    """Rules that cannot be met in this scene, and why."""
    notes, located, task = [], PixelMapper(where).located, bundle.manifest.tasks.segment
    for rule in rules.rules:
        if not located and rule.area is not None:
            notes.append(f"rule '{rule.name}' has an area, and the scene has no place on Earth: it is not met")
        elif not located and rule.min_area is not None and rule.min_area_px is None:
            notes.append(f"rule '{rule.name}' has min_area, and the scene no metres: give min_area_px as well")
        if rule.labelled and task is not None and too_coarse(task, where):
            assert task.input.resolution_m is not None
            notes.append(
                f"rule '{rule.name}' asks what the ground was or is, which the model tells of pixels of "
                f"{task.input.resolution_m[1]:g} m at most: here it stays unknown"
            )
    return notes
