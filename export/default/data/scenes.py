"""Scene images with classes, multi-labels and captions: UCM and RSICD.

Shapes: tiles [5,256,256]; labels [L] in {0,1}.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from edge_rsvlm.export.artifact import Artifact
from edge_rsvlm.export.default.data.images import open_store
from edge_rsvlm.export.default.data.views import NO_JITTER, RGB_BANDS, U8_RANGE, Radiometry, cut, dihedral
from edge_rsvlm.export.default.splits import held_out

F32 = npt.NDArray[np.float32]
TILE_PX = 256
CAPTION_WORDS = 400
UCM_LABELS = (
    "airplane", "bare-soil", "buildings", "cars", "chaparral", "court", "dock", "field", "grass", "mobile-home",
    "pavement", "sand", "sea", "ship", "tanks", "trees", "water",
)  # fmt: skip


@dataclass(frozen=True)
class Scene:
    """One labelled image; `labels` is empty where the set has no multi-labels, `asked` (question, answer) where nobody
    asked about it."""

    source: str
    name: str
    scene: str
    labels: tuple[str, ...]
    captions: tuple[str, ...]
    asked: tuple[tuple[str, str], ...] = ()


class Images(Protocol):
    """Images [H, W, 3] by name."""

    def __getitem__(self, name: str) -> npt.NDArray[np.uint8]: ...


class SceneSet:
    """Images and records of a scene set."""

    def __init__(self, scenes: list[Scene], stores: Mapping[str, Images]):
        self.scenes, self.stores = scenes, stores
        self.classes = sorted({s.scene for s in scenes})

    def __len__(self) -> int:
        return len(self.scenes)

    def tile(
        self,
        i: int,
        view: int = 0,
        radiometry: Radiometry = NO_JITTER,
        zoom: float = 1.0,
        dx: float = 0.0,
        dy: float = 0.0,
    ) -> F32:
        """The whole image stretched to TILE_PX, or `1/zoom` of it around a shifted centre, under a dihedral view."""
        scene = self.scenes[i]
        image = self.stores[scene.source][scene.name]
        height, width = image.shape[:2]
        w, h = width / zoom, height / zoom
        cx, cy = width / 2 + dx * (width - w) / 2, height / 2 + dy * (height - h) / 2
        box = (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)
        return np.ascontiguousarray(
            dihedral(cut(image, box, (TILE_PX, TILE_PX), RGB_BANDS, U8_RANGE, radiometry), view)
        )

    def class_index(self, i: int) -> int:
        return self.classes.index(self.scenes[i].scene)


def read_scenes(path: Path, source: str) -> list[Scene]:
    """Records of a jsonl file."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        Scene(source, r["image"], r["scene"], tuple(r.get("labels", ())), tuple(r["captions"]),
              tuple((question, answer) for question, answer in r.get("qa", ())))
        for r in rows
    ]  # fmt: skip


def ucm(data_root: Path, cache_dir: Path) -> SceneSet:
    """UCM train and val pooled: 1,890 images, to be split by `splits`."""
    folder = data_root / "ucm_captions"
    parts = ("train", "val")
    scenes = [s for p in parts for s in read_scenes(folder / f"{p}.jsonl", f"ucm_{p}")]
    return SceneSet(scenes, {f"ucm_{p}": open_store(folder / f"{p}.tar", cache_dir, f"ucm_{p}") for p in parts})


def rsicd(data_root: Path, cache_dir: Path) -> SceneSet:
    folder = data_root / "rsicd"
    return SceneSet(
        read_scenes(folder / "train.jsonl", "rsicd"), {"rsicd": open_store(folder / "train.tar", cache_dir, "rsicd")}
    )


def training_ucm(scenes: SceneSet, backbone: Artifact) -> npt.NDArray[np.int64]:
    """Indices of the UCM images that may be trained on: neither validation nor the same place as one of those."""
    left_out = set(backbone.metrics["ucm_left_out"])
    return np.array([i for i, s in enumerate(scenes.scenes) if s.source == "ucm_train" and s.name not in left_out])


def training_rsicd(scenes: SceneSet) -> npt.NDArray[np.int64]:
    """Indices of the RSICD images that may be trained on."""
    out = held_out("rsicd")
    return np.array([i for i, s in enumerate(scenes.scenes) if s.name not in out])


def multi_hot(scene: Scene) -> npt.NDArray[np.float32]:
    """UCM multi-labels [17]."""
    return np.array([name in scene.labels for name in UCM_LABELS], np.float32)


def frequent_words(scenes: Sequence[Scene]) -> tuple[str, ...]:
    """The CAPTION_WORDS words that the captions of most images use."""
    images = Counter(word for scene in scenes for word in {w for c in scene.captions for w in words_of(c)})
    ranked = sorted(images, key=lambda word: (-images[word], word))
    return tuple(ranked[:CAPTION_WORDS])


def word_shares(scene: Scene, words: Sequence[str]) -> npt.NDArray[np.float32]:
    """Share of the scene's captions that use each word [W]."""
    said = [set(words_of(caption)) for caption in scene.captions]
    return np.array([sum(word in caption for caption in said) / len(said) for word in words], np.float32)


def words_of(caption: str) -> list[str]:
    """Lower-case words without punctuation."""
    return "".join(c if c.isalnum() else " " for c in caption.lower()).split()
