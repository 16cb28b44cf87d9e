"""Qwen2-VL's and Qwen2.5-VL's vision for libmtmd (projectors ``qwen2vl_merger`` and ``qwen2.5vl_merger``)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor

from edge_rsvlm.export.families.base import Source
from edge_rsvlm.export.families.image_processors import Steps
from edge_rsvlm.export.families.qwen2_vl import unit_px
from edge_rsvlm.export.gguf.files import Change, Entry
from edge_rsvlm.export.gguf.towers import Projector, Tower, VisionWriter, Weights, each

if TYPE_CHECKING:
    import gguf

TOWER = "model.visual"
LAYER = {
    "ln1": "norm1", "attn_out": "attn.proj", "ln2": "norm2", "ffn_up": "mlp.fc1", "ffn_down": "mlp.fc2",
}  # fmt: skip
GATED_LAYER = LAYER | {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
FRAMES, MERGE, WINDOW_PX, EPSILON = 2, 2, 112, 1e-6
"""What libmtmd computes with, whatever the file says."""
LEAST_TOKENS, MOST_TOKENS = 8, 4096
"""Images of fewer or more visual tokens are resized by libmtmd."""
IMAGE_PX = 560
"""libmtmd wants one, and uses it for nothing but its warm-up."""
ACTIVATIONS = {"qwen2_vl": "quick_gelu", "qwen2_5_vl": "silu"}


def _refusal(source: Source, steps: Steps) -> str | None:
    config, vision = source.config, source.config.vision_config
    if (vision.temporal_patch_size, vision.spatial_merge_size) != (FRAMES, MERGE):
        return f"llama.cpp joins {FRAMES} frames and {MERGE} x {MERGE} patches, and this checkpoint does not"
    if vision.hidden_act != ACTIVATIONS[config.model_type]:
        return f"llama.cpp does not compute {config.model_type} with {vision.hidden_act}"
    if config.model_type == "qwen2_5_vl":
        if vision.window_size != WINDOW_PX:
            return f"llama.cpp computes with windows of {WINDOW_PX} px, and this tower has {vision.window_size}"
        if set(vision.fullatt_block_indexes) != set(range(_period(vision) - 1, vision.depth, _period(vision))):
            return "llama.cpp wants layers that see everything at regular distances"
    return _tower(config).refusal()


def _period(vision: Any) -> int:
    """Every so many layers one sees everything."""
    return int(vision.fullatt_block_indexes[0]) + 1


def _tower(config: Any) -> Tower:
    vision = config.vision_config
    old = config.model_type == "qwen2_vl"
    width = vision.embed_dim if old else vision.hidden_size
    inner = int(width * vision.mlp_ratio) if old else vision.intermediate_size
    return Tower(width, inner, vision.depth, vision.num_heads, IMAGE_PX, vision.patch_size, EPSILON)


def _projector(source: Source, weights: Weights) -> Projector:
    config, vision = source.config, source.config.vision_config
    old = config.model_type == "qwen2_vl"
    entries = (
        *_frames(weights),
        *(entry for layer in range(vision.depth) for entry in _layer(weights, layer, LAYER if old else GATED_LAYER)),
        *each(weights, "v.post_ln", f"{TOWER}.merger.ln_q"),
        *each(weights, "mm.0", f"{TOWER}.merger.mlp.0"),
        *each(weights, "mm.2", f"{TOWER}.merger.mlp.2"),
    )

    def describe(writer: gguf.GGUFWriter) -> None:
        if not old:
            writer.add_vision_use_silu(True)
            writer.add_vision_n_wa_pattern(_period(vision))

    kind = "qwen2vl_merger" if old else "qwen2.5vl_merger"
    return Projector(kind, _tower(config), config.text_config.hidden_size, entries, describe)


def _frames(weights: Weights) -> Iterator[Entry]:
    """The convolution over two frames as one over each."""
    for frame, name in enumerate(("v.patch_embd.weight", "v.patch_embd.weight.1")):
        yield Entry(name, weights[f"{TOWER}.patch_embed.proj.weight"], _frame(frame), exact=True)


def _frame(frame: int) -> Change:
    return lambda kernel: kernel[:, :, frame].contiguous()


def _layer(weights: Weights, layer: int, names: dict[str, str]) -> Iterator[Entry]:
    block = f"{TOWER}.blocks.{layer}"
    for third, name in enumerate(("attn_q", "attn_k", "attn_v")):
        yield from each(weights, f"v.blk.{layer}.{name}", f"{block}.attn.qkv", _third(third))
    for ours, theirs in names.items():
        yield from each(weights, f"v.blk.{layer}.{ours}", f"{block}.{theirs}")


def _third(index: int) -> Change:
    def part(tensor: Tensor) -> Tensor:
        return tensor.chunk(3)[index]

    return part


def _steps(source: Source, steps: Steps) -> Steps:
    """As before, within what libmtmd leaves alone."""
    area = unit_px(source.config) ** 2
    (step,) = steps
    least, most = max(step["min_pixels"], LEAST_TOKENS * area), min(step["max_pixels"], MOST_TOKENS * area)
    return [{**step, "min_pixels": least, "max_pixels": max(least, most)}]


WRITER = VisionWriter(_refusal, _projector, _steps, ("<|vision_start|>", "<|vision_end|>"))
