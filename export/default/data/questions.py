"""Questions about UC Merced's images: those of RSIVQA, and more of the same kinds that follow from the labels.

Two of RSIVQA's kinds follow from the multi-labels (in 97 % and 99 % of its own answers: presence of trees and of
airplanes) and one from the class (its theme), so every labelled image can be asked them. In a fifth of its questions
for a number or a place the word for the thing is missing ("How many  in the picture?"); most often there is none.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from edge_rsvlm.export.default.data.scenes import UCM_LABELS, Scene
from edge_rsvlm.export.default.data.words import UNTAUGHT

THEME = "What is the theme of this picture?"
PRESENCE = "Does this picture contain {}?"
PLACE = "What is the location of"
THINGS = {
    "airplane": ("an airplane", "airplanes", "a plane", "planes"), "bare-soil": ("bare soil", "soil"),
    "buildings": ("buildings", "a building", "houses"), "cars": ("cars", "a car", "vehicles"),
    "chaparral": ("chaparral",), "court": ("a court", "a tennis court", "tennis courts"), "dock": ("a dock", "docks"),
    "field": ("a field", "fields"), "grass": ("grass", "a lawn"), "mobile-home": ("mobile homes", "a mobile home"),
    "pavement": ("pavement", "a road", "roads"), "sand": ("sand",), "sea": ("the sea", "sea", "the ocean"),
    "ship": ("ships", "a ship", "boats", "a boat"), "tanks": ("tanks", "a tank", "storage tanks"),
    "trees": ("trees", "a tree"), "water": ("water",),
}  # fmt: skip
"""What people call the things of UCM's labels when they ask for them."""


@dataclass(frozen=True)
class Question:
    question: str
    answer: str

    @property
    def names_its_thing(self) -> bool:
        return "  " not in self.question

    @property
    def of_a_place(self) -> bool:
        return self.question.startswith(PLACE)


def asked(scene: Scene) -> list[Question]:
    """What RSIVQA asks of the image."""
    found = [Question(question, answer) for question, answer in scene.asked]
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
            answer = "yes" if label in scene.labels else "no"
            found += [Question(PRESENCE.format(thing), answer) for thing in THINGS[label]]
    return [q for q in found if not UNTAUGHT.search(q.question)]
