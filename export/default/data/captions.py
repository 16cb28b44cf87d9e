"""Captions as tokens, and frozen encoder features of the images they describe.

Letters: I images, V views, C channels, h, w cells of c5, S sentences, T tokens.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from edge_rsvlm.export.default.data.augment import degraded
from edge_rsvlm.export.default.data.scenes import SceneSet
from edge_rsvlm.export.default.data.views import jitter
from edge_rsvlm.export.default.loop import device
from edge_rsvlm.export.default.model.encoder import Encoder

VOCABULARY = 2048
BOS, EOS = "<bos>", "<eos>"
BOS_ID, EOS_ID = 0, 1
DIRECTIONS = frozenset({"left", "right", "top", "bottom", "upper", "lower", "north", "south", "east", "west"})
BATCH = 32


def tidy(caption: str) -> str:
    """Lower case, one space between words, no full stop: sentences differ in nothing else between the sets."""
    return " ".join(caption.lower().replace(" ,", ",").rstrip(" .").split())


def train_tokenizer(captions: Sequence[str], specials: Sequence[str] = (BOS, EOS)) -> Any:
    """Byte-level BPE with digits apart: the pre-tokenizer llama.cpp knows as "smollm". ``specials`` come first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(captions, trainer)
    return tokenizer


def points_somewhere(caption: str) -> bool:
    """Whether a caption is only true of the image as it lies (view 0)."""
    return bool(DIRECTIONS & set(caption.split()))


class FeatureStore:
    """Features of every image under several views, [I, V, C, h, w] float16 in one memory-mapped file."""

    def __init__(self, path: Path, shape: tuple[int, ...]) -> None:
        self.features = np.memmap(path, np.float16, mode="r", shape=shape)

    def __getitem__(self, key: tuple[int, int]) -> npt.NDArray[np.float32]:
        return np.asarray(self.features[key], np.float32)


def cached_features(
    encoder: Encoder, scenes: SceneSet, views: int, path: Path, channels: int,
    of: Callable[[dict[str, Tensor]], Tensor],
) -> FeatureStore:  # fmt: skip
    """Features of all images, ``channels`` that ``of`` makes of the encoder's maps, computed once; a run that was
    interrupted goes on where it stopped.

    View v shows the v-th of the square's symmetries; all but the first are also slightly zoomed, shifted and re-lit,
    and some of them degraded.
    """
    side = 256 // 32
    shape = (len(scenes), views, channels, side, side)
    progress = path.with_suffix(".json")
    done = json.loads(progress.read_text())["images"] if progress.is_file() else 0
    if done < len(scenes):
        path.parent.mkdir(parents=True, exist_ok=True)
        store = np.memmap(path, np.float16, mode="r+" if done else "w+", shape=shape)
        for end in _compute(encoder, scenes, views, done, store, of):
            store.flush()
            temporary = progress.with_suffix(f".{os.getpid()}.tmp")
            temporary.write_text(json.dumps({"images": end}))
            temporary.replace(progress)
            print(f"features of {end} of {len(scenes)} images", flush=True)
    return FeatureStore(path, shape)


@torch.inference_mode()
def _compute(
    encoder: Encoder, scenes: SceneSet, views: int, done: int, store: np.memmap[Any, Any],
    of: Callable[[dict[str, Tensor]], Tensor],
) -> Iterator[int]:  # fmt: skip
    """Fill ``store`` from image ``done`` on; yields how many images are complete, every few hundred."""
    where = device()
    encoder = encoder.eval().to(where, memory_format=torch.channels_last)
    block = 512
    for start in range(done, len(scenes), block):
        end = min(start + block, len(scenes))
        pairs = [(i, v) for i in range(start, end) for v in range(views)]
        for k in range(0, len(pairs), BATCH):
            chosen = pairs[k : k + BATCH]
            tiles = torch.from_numpy(np.stack([caption_view(scenes, i, v) for i, v in chosen])).to(where)
            with torch.autocast(where.type, torch.bfloat16):
                made = of(encoder(tiles.contiguous(memory_format=torch.channels_last)))
            for (i, v), feature in zip(chosen, made.float().cpu().numpy(), strict=True):
                store[i, v] = feature
        yield end


def caption_view(scenes: SceneSet, i: int, v: int) -> npt.NDArray[np.float32]:
    """Tile [5, 256, 256] of an image in view ``v``, which is always the same; view 0 is the image as it is."""
    if v == 0:
        return scenes.tile(i)
    rng = np.random.default_rng([i, v])
    dx, dy = rng.uniform(-1, 1, 2)
    tile = scenes.tile(i, v, jitter(rng, 0.12, 0.04, 0.02), float(rng.uniform(1.0, 1.2)), float(dx), float(dy))
    return degraded(rng, tile)
