"""Whether captions tell the truth: the things they name, against UC Merced's 17 multi-labels (Chaudhuri et al. 2018).

A label is named where one of its words is said. Precision: the share of labels named that are labels of the image;
recall: the share of the image's labels that are named; both over all images together.
``python -m edge_rsvlm.export.default.truth BUNDLE`` prints both, and those of the captions that people wrote.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from edge_rsvlm.bundle import load_bundle
from edge_rsvlm.export.default.data.scenes import UCM_LABELS, Scene, read_scenes
from edge_rsvlm.pipeline.session import Limits, Session
from edge_rsvlm.raster.inputs import list_inputs

SAID = {
    "airplane": "(air)?planes?|aircrafts?",
    "bare-soil": "(bare )?soil|bare (land|ground)|earth|desert|mud",
    "buildings": "buildings?|houses?|villas?|apartments?",
    "cars": "cars?|vehicles?",
    "chaparral": "chaparrals?",
    "court": "courts?",
    "dock": "docks?|piers?",
    "field": "fields?|farmlands?|croplands?",
    "grass": "grass|lawns?|meadows?",
    "mobile-home": "mobile ?homes?|mobile houses?",
    "pavement": "pavements?|roads?|streets?|lanes?|(free|high|run)ways?|overpass(es)?|parking lots?|intersections?",
    "sand": "sands?|beach(es)?",
    "sea": "seas?|oceans?",
    "ship": "ships?|boats?|yachts?",
    "tanks": "tanks?",
    "trees": "trees?|forests?|woods?|plants",
    "water": "water|rivers?|ponds?|lakes?|pools?|waves?",
}
"""Per label, the words of captions that name it; those that only suggest it ("residential area") do not."""
WORDS = {label: re.compile(rf"\b({SAID[label]})\b") for label in UCM_LABELS}
MEMORY_BYTES = 8 << 30
NOT_FIELDS = re.compile(r"\b(baseball|golf|sports?|football|play|playing|wheat) ?fields?\b")


@dataclass(frozen=True)
class Truth:
    precision: float
    recall: float


def named(caption: str) -> set[str]:
    """The labels that a caption names."""
    text = caption.lower()
    found = {label for label, words in WORDS.items() if words.search(text)}
    if "field" in found and not WORDS["field"].search(NOT_FIELDS.sub("", text)):
        found.remove("field")
    return found


def truth(said: Sequence[str], labels: Sequence[Iterable[str]]) -> Truth:
    """Of one caption per image, and the labels of each image."""
    pairs = [(named(caption), set(true)) for caption, true in zip(said, labels, strict=True)]
    right = sum(len(told & true) for told, true in pairs)
    named_at_all, there = (sum(map(len, part)) for part in zip(*pairs, strict=True))
    return Truth(right / max(named_at_all, 1), right / max(there, 1))


def truth_of_bundle(data: Path, folder: Path) -> Truth:
    """Of the captions of UC Merced's validation part."""
    scenes = {s.name: s for s in _scenes(data)}
    session = Session(load_bundle(folder, allow_unsigned=True), Limits(MEMORY_BYTES))
    sources = list_inputs([str(data / "ucm_captions" / "val.tar")])
    said = [session.caption(source.path, lambda *_: None).caption or "" for source in sources]
    return truth(said, [scenes[Path(source.name).name].labels for source in sources])


def truth_of_people(data: Path) -> Truth:
    """Of what people wrote of the same images: the first caption of each."""
    scenes = _scenes(data)
    return truth([s.captions[0] for s in scenes], [s.labels for s in scenes])


def _scenes(data: Path) -> list[Scene]:
    return read_scenes(data / "ucm_captions" / "val.jsonl", "ucm_val")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    options = parser.parse_args()
    print(f"bundle: {truth_of_bundle(options.data, options.bundle)}")
    print(f"people: {truth_of_people(options.data)}")


if __name__ == "__main__":
    main()
