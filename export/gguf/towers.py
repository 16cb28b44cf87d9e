"""Image encoders and their projectors as libmtmd, the eye of llama.cpp, knows them: sizes, tensors, prompts.

Names and what is computed: ggml-org/llama.cpp, tools/mtmd/clip.cpp and models/.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edge_rsvlm.export.checkpoint.reading import LazyTensor
from edge_rsvlm.export.families.base import Source
from edge_rsvlm.export.families.image_processors import Steps
from edge_rsvlm.export.gguf.files import Change, Entry, same

if TYPE_CHECKING:
    import gguf

Weights = Mapping[str, LazyTensor]
SIGLIP_LAYER = {
    "ln1": "layer_norm1",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_out": "self_attn.out_proj",
    "ln2": "layer_norm2",
    "ffn_up": "mlp.fc1",
    "ffn_down": "mlp.fc2",
}
"""Modules of one layer of SigLIP and of CLIP: libmtmd's names, and those of transformers."""
TANH_GELUS = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")


@dataclass(frozen=True)
class Tower:
    """Sizes of an image encoder."""

    width: int
    inner: int
    """Of its feed-forward layers."""
    layers: int
    heads: int
    image_px: int
    patch_px: int
    epsilon: float

    def refusal(self) -> str | None:
        if self.inner == self.width:
            return f"llama.cpp takes feed-forward layers as narrow as the model ({self.width}) for swapped ones"
        return None


@dataclass(frozen=True)
class Projector:
    """What goes into a projector file beside the language model, ``width`` wide."""

    kind: str
    """``clip.projector_type``."""
    tower: Tower
    width: int
    entries: tuple[Entry, ...]
    describe: Callable[[gguf.GGUFWriter], None]
    """Adds what only this kind has."""


@dataclass(frozen=True)
class VisionWriter:
    """How the vision of one family is written for libmtmd."""

    refusal: Callable[[Source, Steps], str | None]
    """Why it cannot be; None: it can. The steps are those that prepare an image."""
    projector: Callable[[Source, Weights], Projector]
    steps: Callable[[Source, Steps], Steps]
    """What is left to do to an image, so that libmtmd changes no pixel of it but cuts it into tiles."""
    written_around: tuple[str, str] = ("", "")
    """What libmtmd itself writes before and after an image; prompts must have it, and lose it."""


def each(weights: Weights, name: str, source: str, change: Change = same, *, exact: bool = False) -> Iterator[Entry]:
    """The weight, and the bias where there is one, of a module."""
    for part in ("weight", "bias"):
        if f"{source}.{part}" in weights:
            yield Entry(f"{name}.{part}", weights[f"{source}.{part}"], change, exact)


def siglip_layers(weights: Weights, body: str, count: int) -> Iterator[Entry]:
    """The first ``count`` layers of a tower whose transformers name is ``body``."""
    for layer in range(count):
        for ours, theirs in SIGLIP_LAYER.items():
            yield from each(weights, f"v.blk.{layer}.{ours}", f"{body}.encoder.layers.{layer}.{theirs}")


def siglip_tower(config: Any, image_px: int, layers: int) -> Tower:
    """Of a vision config of transformers."""
    return Tower(
        config.hidden_size,
        config.intermediate_size,
        layers,
        config.num_attention_heads,
        image_px,
        config.patch_size,
        config.layer_norm_eps,
    )


def as_prepared(source: Source, steps: Steps) -> Steps:
    return steps
