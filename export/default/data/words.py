"""What the model has words for: scene classes, labels of the ground, and the sentences of the captions.

Buses are kept out: they show whether examples find what words were not taught (see ``objects``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from edge_rsvlm.export.default.data.captions import tidy
from edge_rsvlm.export.default.data.scenes import Scene

UNTAUGHT = re.compile(r"\b(mini)?bus(es)?\b")
CLASS_WORDS = {
    "agricultural": ("agricultural land", "farmland"), "airplane": ("airplane", "airplanes at an airport"),
    "baseballdiamond": ("baseball diamond", "baseball field"), "denseresidential": ("dense residential area",),
    "golfcourse": ("golf course",), "mediumresidential": ("medium residential area",),
    "mobilehomepark": ("mobile home park",), "parkinglot": ("parking lot",),
    "sparseresidential": ("sparse residential area",), "storagetanks": ("storage tanks",),
    "tenniscourt": ("tennis court",), "BareLand": ("bare land",), "BaseballField": ("baseball field",),
    "DenseResidential": ("dense residential area",), "MediumResidential": ("medium residential area",),
    "SparseResidential": ("sparse residential area",), "RailwayStation": ("railway station", "train station"),
    "StorageTanks": ("storage tanks",), "Parking": ("parking lot", "parking"), "Commercial": ("commercial area",),
    "Industrial": ("industrial area",), "Center": ("center", "central building"), "Port": ("port", "harbor"),
    "buildings": ("buildings",), "Viaduct": ("viaduct", "overpass"),
}  # fmt: skip
"""Names of classes as people write them, where those of the sets are none."""
LABEL_WORDS = {
    "airplane": ("airplane", "airplanes"), "bare-soil": ("bare soil", "soil"), "buildings": ("buildings", "building"),
    "cars": ("cars", "car"), "court": ("court", "tennis court"), "mobile-home": ("mobile homes", "mobile home"),
    "pavement": ("pavement", "road"), "sea": ("sea", "ocean"), "ship": ("ship", "ships", "boat"),
    "tanks": ("tanks", "storage tank"), "trees": ("trees", "tree"), "dock": ("dock",), "grass": ("grass", "lawn"),
}  # fmt: skip


def class_names(scene: str) -> tuple[str, ...]:
    """Names of one of the sets' classes."""
    return CLASS_WORDS.get(scene, (scene.lower(),))


def class_words(scene: Scene) -> tuple[str, ...]:
    """Names of an image's class."""
    return class_names(scene.scene)


def label_words(label: str) -> tuple[str, ...]:
    """Names of one of UCM's labels."""
    return LABEL_WORDS.get(label, (label,))


def sentences(scene: Scene) -> list[str]:
    """Captions, tidied, without those that name what is not taught; a sentence that many share stays as often."""
    return [said for said in map(tidy, scene.captions) if not UNTAUGHT.search(said)]


def vocabulary(texts: Iterable[str]) -> list[str]:
    """Every word of ``texts``, sorted: runs of letters in lower case."""
    return sorted({word for text in texts for word in re.findall(r"[^\W\d_]+", text.lower())})
