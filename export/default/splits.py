"""Which images are held out. The lists in ``held_out/`` are the definition; this module made them, and reads them.

Images of one place stay on one side: UC Merced's were cut from larger ones, airports were photographed on several
dates, and frames of one flight overlap. Pretrained features see it (cosine), and file names say it.
``python -m edge_rsvlm.export.default.splits --data ../shared/data`` writes the lists of the box sets and of RSICD anew.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

SAME_PLACE_COSINE = 0.84
"""Of the 1280-channel ImageNet features of UCM. Chosen by looking: overlapping pairs begin to appear above it."""
SAME_SITE_COSINE = 0.80
"""Of the mean 320-channel features of box images. Chosen by looking, likewise."""
RSICD_SHARE = 0.05
HELD_OUT_SHARE = {"airbus_aircraft": 0.2, "drone_vehicles": 0.1, "hrplanes": 0.1, "aerial_airport": 0.1, "simd": 0.1}
FOLDER = Path(__file__).parent / "held_out"


def near_duplicates(features_ND: npt.NDArray[np.float32], held_out_N: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Mask [N] of the images that are not held out but too much like one that is."""
    unit = features_ND / np.linalg.norm(features_ND, axis=1, keepdims=True)
    likeness = (unit @ unit[held_out_N].T).max(axis=1)
    found: npt.NDArray[np.bool_] = ~held_out_N & (likeness >= SAME_PLACE_COSINE)
    return found


def by_hash(names: Sequence[str], share: float) -> npt.NDArray[np.bool_]:
    """Mask [N] of the ``share`` of names with the smallest hashes, for sets without visible near-duplicates."""
    rank = np.argsort([_hash(name) for name in names])
    mask = np.zeros(len(names), bool)
    mask[rank[: round(share * len(names))]] = True
    return mask


def held_out(name: str) -> frozenset[str]:
    """Names of the images or pairs of a set that no training stage may see."""
    lines = (FOLDER / f"{name}.txt").read_text().splitlines()
    return frozenset(line for line in lines if line and not line.startswith("#"))


def site_of(set_name: str, image: str) -> str:
    """The place that a file name tells of: an airport of HRPlanes, a flight of the drone set; else the image itself."""
    if set_name == "hrplanes":
        return image.partition("_")[0]
    return image.rpartition("-")[0] if set_name == "drone_vehicles" else image


def grouped(names: Sequence[str], sites: Sequence[str], features_ND: npt.NDArray[np.float32]) -> list[list[str]]:
    """Names joined into groups that share a site or look alike, transitively."""
    unit = features_ND / np.linalg.norm(features_ND, axis=1, keepdims=True)
    same = (unit @ unit.T >= SAME_SITE_COSINE) | (np.array(sites)[:, None] == np.array(sites)[None])
    label = np.arange(len(names))
    while True:
        lowest = np.where(same, label[None], len(names)).min(axis=1)
        if (lowest == label).all():
            break
        label = lowest
    return [[names[int(i)] for i in np.flatnonzero(label == k)] for k in np.unique(label)]


def choose(groups: Sequence[Sequence[str]], share: float) -> list[str]:
    """Whole groups in order of their hash until ``share`` of all images is reached; groups too large for it stay in."""
    wanted = share * sum(map(len, groups))
    chosen: list[str] = []
    for group in sorted(groups, key=lambda g: _hash(min(g))):
        if len(chosen) + len(group) <= 1.25 * wanted:
            chosen += group
        if len(chosen) >= wanted:
            break
    return sorted(chosen)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def main() -> None:
    from edge_rsvlm.export import artifact
    from edge_rsvlm.export.default.data.objects import SETS, ObjectData
    from edge_rsvlm.export.default.data.scenes import read_scenes
    from edge_rsvlm.export.default.stages.backbone import whole_image_features

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--work", type=Path, default=Path("build/train"))
    options = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    names = [scene.name for scene in read_scenes(options.data / "rsicd" / "train.jsonl", "rsicd")]
    chosen = sorted(itertools.compress(names, by_hash(names, RSICD_SHARE)))
    head = "# Images of rsicd that are never trained on (by versions after 6): chosen by hash.\n"
    (FOLDER / "rsicd.txt").write_text(head + "\n".join(chosen) + "\n")
    backbone = artifact.load(options.work / "backbone")
    for spec in SETS:
        data = ObjectData(spec, options.data, options.work / "cache")
        names = sorted(data.names)
        features = whole_image_features(backbone, [data.store[name] for name in names])
        groups = grouped(names, [site_of(spec.name, name) for name in names], features)
        chosen = choose(groups, HELD_OUT_SHARE[spec.name])
        head = f"# Images of {spec.name} that are never trained on: whole places, chosen by hash.\n"
        (FOLDER / f"{spec.name}.txt").write_text(head + "\n".join(chosen) + "\n")
        print(f"{spec.name}: {len(names)} images of {len(groups)} places, {len(chosen)} held out")


if __name__ == "__main__":
    main()
