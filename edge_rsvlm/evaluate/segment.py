"""How well a mask covers labelled objects, and leaves what lies around them alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_rsvlm import scoring
from edge_rsvlm.errors import UsageError
from edge_rsvlm.evaluate import Evaluation, counted
from edge_rsvlm.evaluate.labels import chosen, locate, read_coco, read_points
from edge_rsvlm.evaluate.places import Objects, inside, looked_up, ring_places
from edge_rsvlm.pipeline.outcome import Progress
from edge_rsvlm.pipeline.session import Session, georeference


def labelled_objects(labels: Path, label: str, boxes: bool, only: Path | None) -> dict[str, Objects]:
    """By image: points of JSON lines, or the ``boxes`` of a COCO file whose category is ``label``."""
    if not boxes:
        points = read_points(labels, label)
        names = chosen(list(points), only, labels)
        return {name: Objects.points(np.array(points[name], np.float64).reshape(-1, 2)) for name in names}
    categories, truth = read_coco(labels)
    if label not in categories:
        raise UsageError(f"{labels} has no category '{label}'", fix=f"categories: {', '.join(categories)}")
    names = chosen(list(truth), only, labels)
    found = {name: [box.box for box in truth[name] if box.label == label] for name in names}
    return {name: Objects.boxes(np.array(xywh, np.float64).reshape(-1, 4)) for name, xywh in found.items()}


def evaluate_segment(
    session: Session,
    truth: Mapping[str, Objects],
    images: str,
    label: str,
    ring_px: tuple[float, float],
    progress: Progress | None,
) -> Evaluation:
    """Balanced accuracy of the mask of ``label``: recall on the objects of each image, specificity on rings around.

    Objects outside of their image do not count; see ``ring_places`` for ``ring_px``.
    """
    session.require("segment")
    sources = locate(images, list(truth))
    counts = [_counts(session, s.path, truth[s.name], label, ring_px) for s in counted(sources, progress)]
    scores = scoring.balanced_scores(np.array(counts, np.int64).reshape(-1, 4), label)
    if not all(np.isfinite(score.value) for score in scores):
        raise UsageError(f"no object '{label}' has a place around it in its image", fix="give other labels or --ring")
    return Evaluation("segment", len(sources), tuple(scores))


def _counts(
    session: Session, path: str, objects: Objects, label: str, ring_px: tuple[float, float]
) -> tuple[int, int, int, int]:
    """A row of ``scoring.balanced_scores``."""
    where = georeference(path)
    size = (where.width, where.height)
    mask_HW = np.zeros(size[::-1], np.uint8)

    def keep(first: int, rows_RW: NDArray[np.uint8]) -> None:
        mask_HW[first : first + len(rows_RW)] = rows_RW

    session.segment(path, [label], lambda *_: None, keep)
    on = looked_up(mask_HW, objects.centres_P2[inside(objects.centres_P2, size)])
    around = looked_up(mask_HW, ring_places(objects, ring_px, size))
    return int((on == 1).sum()), len(on), int((around == 0).sum()), len(around)
