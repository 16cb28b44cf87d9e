"""Tiles that lack objects: scenes without boxes, whose labels say what there is none of.

Box sets are airports, roads and marinas. Fields, forests, roofs and water are background that they never show.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edge_rsvlm.export.default.data.augment import degraded
from edge_rsvlm.export.default.data.objects import F32, KINDS, PLANES, TRUCKS, Targets, empty_targets
from edge_rsvlm.export.default.data.scenes import TILE_PX, Scene, SceneSet
from edge_rsvlm.export.default.data.views import jitter

LACKING = {"airplane": (*PLANES, "helicopter"), "cars": ("car", "van", *TRUCKS), "ship": ("boat",)}
"""The kinds that there are none of where an image has no such label."""


@dataclass
class AbsentData:
    """Of labelled scenes those that lack something; where they have it, nothing is known of its kinds."""

    scenes: SceneSet
    usable: npt.NDArray[np.int64]
    weight: float = 0.12
    """As of an object set."""

    def __post_init__(self) -> None:
        self.usable = np.array([i for i in self.usable if lacks(self.scenes.scenes[int(i)]).any()])

    def sample(self, rng: np.random.Generator) -> tuple[F32, Targets]:
        """A tile [5,TILE_PX,TILE_PX], as of ``ObjectData`` in crops of that size, and targets without an object."""
        i = int(self.usable[rng.integers(len(self.usable))])
        zoom, shift = float(rng.uniform(1.0, 1.3)), rng.uniform(-1, 1, 2)
        tile = self.scenes.tile(i, int(rng.integers(8)), jitter(rng, 0.18, 0.05, 0.04), zoom, *map(float, shift))
        made = empty_targets(TILE_PX)
        made.trust[lacks(self.scenes.scenes[i])] = True
        return degraded(rng, tile), made


def lacks(scene: Scene) -> npt.NDArray[np.bool_]:
    """Mask [F] of the kinds that the image has none of."""
    found = [kind for label, kinds in LACKING.items() if label not in scene.labels for kind in kinds]
    return np.isin(KINDS, found)
