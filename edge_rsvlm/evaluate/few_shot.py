"""Detection by a few examples: some labelled boxes say what is looked for, and the images without them are scored."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from edge_rsvlm import scoring
from edge_rsvlm.errors import UsageError
from edge_rsvlm.evaluate import LEAST_SCORE, Evaluation, LabelRules, counted, detections, scored_truth
from edge_rsvlm.evaluate.labels import chosen, locate, read_coco
from edge_rsvlm.pipeline.detect import DetectQuery
from edge_rsvlm.pipeline.examples import Box, example_task
from edge_rsvlm.pipeline.outcome import Progress
from edge_rsvlm.pipeline.session import Session, georeference
from edge_rsvlm.scoring import Found, Truth
from edge_rsvlm.scoring.sampling import SEED
from edge_rsvlm.tasks.like import Examples


@dataclass(frozen=True)
class FewShot:
    """``examples`` boxes of the category ``label`` are drawn, ``draws`` times."""

    label: str
    examples: int
    draws: int


class Labelled(NamedTuple):
    path: str
    truth: list[Truth]


class Example(NamedTuple):
    """A labelled box of the image of this number, clipped to it."""

    image: int
    box: Box


Looks = Mapping[Example, Examples]


def evaluate_few_shot(
    session: Session, annotations: Path, images: str, only: Path | None, rules: LabelRules, wanted: FewShot,
    progress: Progress | None,
) -> Evaluation:  # fmt: skip
    """AP50 of one category of a COCO file by examples of it: the mean over draws, and the middle 95 % of them.

    An image that gave an example does not count in that draw. The same labels are drawn alike.
    """
    example_task(session.bundle.manifest)
    scoring.detection_libraries()
    labels, truth_of = read_coco(annotations)
    _check_label(wanted.label, [rules.renamed(name) for name in labels if name not in rules.ignore])
    names = chosen(list(truth_of), only, annotations)
    labelled = [
        Labelled(source.path, list(scored_truth(truth_of[source.name], rules, [wanted.label])))
        for source in locate(images, names)
    ]
    draws = _draws(list(_candidates(labelled)), wanted)
    looks = _embedded(session, labelled, {example for draw in draws for example in draw})
    values = _ap50(session, labelled, draws, looks, wanted.label, progress)
    metric = f"AP50 by {wanted.examples} example{'' if wanted.examples == 1 else 's'}"
    score = scoring.score_of_draws(metric, np.array(values), wanted.label)
    return Evaluation("detect", len(names), (score,))


def _check_label(label: str, known: Sequence[str]) -> None:
    if label not in known:
        near = difflib.get_close_matches(label, known, n=1, cutoff=0.4)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise UsageError(f"no category '{label}' to give examples", fix=f"{hint}categories: {', '.join(known)}")


def _candidates(labelled: Sequence[Labelled]) -> Iterator[Example]:
    for n, image in enumerate(labelled):
        boxes = np.array([box.box for box in image.truth if not box.ignore]).reshape(-1, 4)
        if not len(boxes):
            continue
        where = georeference(image.path)
        corners = np.clip(np.hstack([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]]), 0, [where.width, where.height] * 2)
        for x0, y0, x1, y1 in corners.tolist():
            if x0 < x1 and y0 < y1:
                yield Example(n, (x0, y0, x1 - x0, y1 - y0))


def _draws(candidates: Sequence[Example], wanted: FewShot) -> list[list[Example]]:
    """UsageError where a draw would leave nothing to find."""
    holders = {candidate.image for candidate in candidates}
    rng = np.random.default_rng(SEED)
    draws = []
    for _ in range(wanted.draws):
        picked = rng.permutation(len(candidates))[: wanted.examples]
        draw = [candidates[k] for k in picked]
        if len(draw) < wanted.examples or holders == {example.image for example in draw}:
            labels = f"{len(candidates)} boxes of '{wanted.label}' in {len(holders)} images"
            raise UsageError(
                f"{wanted.examples} examples of {labels} leave nothing to find",
                fix="use fewer --examples, or more labels",
            )
        draws.append(draw)
    return draws


def _embedded(session: Session, labelled: Sequence[Labelled], examples: set[Example]) -> Looks:
    """Every image is opened once."""
    found: dict[Example, Examples] = {}
    for n in sorted({example.image for example in examples}):
        here = sorted(example for example in examples if example.image == n)
        parts, _ = session.examples(labelled[n].path, [example.box for example in here])
        found |= dict(zip(here, parts, strict=True))
    return found


def _ap50(
    session: Session, labelled: Sequence[Labelled], draws: Sequence[Sequence[Example]], looks: Looks, label: str,
    progress: Progress | None,
) -> list[float]:  # fmt: skip
    """Of each draw, on the images that gave none of its examples. An image is looked at once, for all draws."""
    examples = [Examples.joined([looks[example] for example in draw]) for draw in draws]
    truth: list[list[list[Truth]]] = [[] for _ in draws]
    found: list[list[list[Found]]] = [[] for _ in draws]
    for n, image in enumerate(counted(labelled, progress)):
        counting = [k for k, draw in enumerate(draws) if n not in {example.image for example in draw}]
        if not counting:
            continue
        query = DetectQuery((), LEAST_SCORE, {str(k): examples[k] for k in counting})
        seen = detections(session, image.path, query, str)
        for k in counting:
            truth[k].append(image.truth)
            found[k].append([Found(label, box.score, box.box) for box in seen if box.label == str(k)])
    return [scoring.ap50(*of_draw, label) for of_draw in zip(truth, found, strict=True)]
