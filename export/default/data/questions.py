"""Questions about UC Merced's images: those of RSIVQA, and more of the same kinds that follow from the labels.

Two of RSIVQA's kinds follow from the multi-labels (in 97 % and 99 % of its own answers: presence of trees and of
airplanes) and one from the class (its theme), so every labelled image can be asked them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from edge_rsvlm.export.default.data.scenes import UCM_LABELS, Scene
from edge_rsvlm.export.default.data.words import UNTAUGHT, label_words

THEME = "What is the theme of this picture?"
PRESENCE = "Does this picture contain {}?"
ONE = {"airplane": "an airplane"}
"""Labels of which RSIVQA asks for one."""


@dataclass(frozen=True)
class Question:
    question: str
    answer: str


def asked(scene: Scene) -> list[Question]:
    """What RSIVQA asks of the image; a few of its questions lack the word for the thing, and are left out."""
    found = [Question(question, answer) for question, answer in scene.asked if "  " not in question]
    return [q for q in found if not UNTAUGHT.search(f"{q.question} {q.answer}".lower())]


def themes(scenes: Iterable[Scene]) -> dict[str, str]:
    """The answer that most images of a class have to THEME."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for scene in scenes:
        counts[scene.scene].update(answer for question, answer in scene.asked if question == THEME)
    return {name: found.most_common(1)[0][0] for name, found in counts.items() if found}


def made(scene: Scene, theme: Mapping[str, str]) -> list[Question]:
    """Questions whose answers the class and the labels of ``scene`` give."""
    found = [Question(THEME, theme[scene.scene])] if scene.scene in theme else []
    if scene.labels:
        for label in UCM_LABELS:
            thing = ONE.get(label, label_words(label)[0])
            found.append(Question(PRESENCE.format(thing), "yes" if label in scene.labels else "no"))
    return [q for q in found if not UNTAUGHT.search(q.question)]
