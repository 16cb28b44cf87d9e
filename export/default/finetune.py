"""Fine-tuning of the default model's decoder to other captions: what a sample is for it.

Features of the frozen encoder are computed once for every image and view, and wait in a file of the run. Tiles are cut
as in training, which is how the runtime looks at an image of unknown ground resolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from edge_rsvlm.errors import InputError
from edge_rsvlm.export.default.checkpoint import DefaultModel
from edge_rsvlm.export.default.data.captions import BOS_ID, EOS_ID, caption_view, points_somewhere, tidy
from edge_rsvlm.export.default.data.scenes import TILE_PX, Scene, SceneSet
from edge_rsvlm.export.default.describe import WHOLE_SCENE_PX
from edge_rsvlm.export.default.model.encoder import STRIDES
from edge_rsvlm.export.default.model.language import TOKEN_CHANNELS
from edge_rsvlm.export.default.stages import language
from edge_rsvlm.export.default.stages.features import tokens_of
from edge_rsvlm.export.finetuning.samples import Encoded, Sample, open_image

TARGETS = r"language\.decoder\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
"""Every linear layer of the decoder; its embeddings are left alone."""
VIEWS = 4
"""An epoch shows every image as it is, and turned, zoomed and re-lit in three other ways."""


@dataclass(frozen=True)
class ViewedSample(Sample):
    view: int


class CaptionEncoder:
    """Samples of captions to visual tokens and words.

    ``model`` encodes; ``cache`` is the file of its features, which a resumed run goes on with.
    """

    def __init__(self, folder: Path, model: DefaultModel, samples: Sequence[Sample], cache: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(folder / language.NAME / language.TOKENIZER_NAME))
        self._encoder = model.encoder
        first = {sample.image: sample for sample in samples}
        self._index = {path: i for i, path in enumerate(first)}
        scenes = [Scene("", str(path), "", (), ()) for path in first]
        self._scenes = SceneSet(scenes, {"": _Pixels({str(path): sample for path, sample in first.items()})})
        self._features, self._done = _open_cache(cache, len(first))

    def __call__(self, sample: ViewedSample) -> Encoded:
        """Raises InputError for an image that cannot be read, or is larger than what one caption describes."""
        said = self._tokenizer.encode(tidy(str(sample.answer))).ids[: language.MOST_TOKENS - 1]
        ids = torch.tensor([[BOS_ID, *said, EOS_ID]])
        return Encoded({"tokens": torch.from_numpy(self._tokens(sample)), "input_ids": ids}, len(said) + 1)

    def _tokens(self, sample: ViewedSample) -> NDArray[np.float32]:
        place = self._index[sample.image], sample.view
        if not self._done[place]:
            like = next(self._encoder.parameters())
            tile = torch.from_numpy(caption_view(self._scenes, *place))[None].to(like.device, like.dtype)
            with torch.no_grad():
                self._features[place] = tokens_of(self._encoder(tile))[0].float().cpu().numpy()
            self._done[place] = 1
        return self._features[place][None].astype(np.float32)


def viewed(samples: Sequence[Sample]) -> list[ViewedSample]:
    """Every sample in each view in which it is true. InputError for samples that are no captions."""
    for sample in samples:
        if sample.verb != "caption":
            raise InputError(f"{sample.where}: the default model writes captions only", fix="give captions of images")
    return [
        ViewedSample(**vars(sample), view=view)
        for sample in samples
        for view in range(1 if points_somewhere(tidy(str(sample.answer))) else VIEWS)
    ]


class _Pixels:
    """Images [H, W, 3] by path, opened when they are asked for."""

    def __init__(self, samples: dict[str, Sample]) -> None:
        self._samples = samples

    def __getitem__(self, path: str) -> NDArray[np.uint8]:
        sample = self._samples[path]
        pixels = np.asarray(open_image(sample))
        if max(pixels.shape[:2]) > WHOLE_SCENE_PX:
            raise InputError(
                f"{sample.where}: {path} is {pixels.shape[1]} x {pixels.shape[0]}, and the device would cut it into "
                "tiles with a caption each",
                fix=f"cut it into images of at most {WHOLE_SCENE_PX} pixels, and describe these",
            )
        return pixels


def _open_cache(path: Path, images: int) -> tuple[Any, Any]:
    """Features [images, VIEWS, C, h, w] in half precision, and which of them are there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    side = TILE_PX // STRIDES["c5"]
    known = path.with_suffix(".done")
    mode: Any = "r+" if known.is_file() else "w+"
    features = np.memmap(path, np.float16, mode=mode, shape=(images, VIEWS, TOKEN_CHANNELS, side, side))
    return features, np.memmap(known, np.uint8, mode=mode, shape=(images, VIEWS))
