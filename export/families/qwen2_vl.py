"""Qwen2-VL (Wang et al. 2024) and Qwen2.5-VL (Bai et al. 2025), which TinyRS is too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import PretrainedConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLForConditionalGeneration

from edge_rsvlm.export.families.base import GraphInput, GraphPlan, Source
from edge_rsvlm.export.families.causal_decoder import MASKED, TextModel
from edge_rsvlm.export.families.generation import GenerativeFamily, Grounding, encode, image_token, question
from edge_rsvlm.export.families.image_processors import load_image_processor
from edge_rsvlm.export.families.tokenizers import load_tokenizer


class QwenVision(nn.Module):
    """tiles [N, 3, H, W], both multiples of patch * merge -> features [N, T, D].

    Patches go block by block: the merge x merge patches of one visual token follow each other, blocks in raster order.
    Blocks of Qwen2.5-VL see their window only, all but a few layers; here a mask says so, and nothing is reordered.
    """

    def __init__(self, model: nn.Module, config: PretrainedConfig) -> None:
        super().__init__()
        self.visual = model.model.visual
        self.patch, self.merge = int(config.patch_size), int(config.spatial_merge_size)
        self.frames, self.heads = int(config.temporal_patch_size), int(config.num_heads)
        full = getattr(config, "fullatt_block_indexes", range(config.depth))
        self.window = [index not in set(full) for index in range(config.depth)]
        self.window_blocks = getattr(config, "window_size", 0) // self.merge // self.patch

    def forward(self, tiles: Tensor) -> Tensor:
        height, width = tiles.shape[2] // self.patch, tiles.shape[3] // self.patch
        rows, cols = self._places(height, width)
        # An image is a still film: the same frame as often as the convolution is deep.
        film = tiles[:, :, None].expand(-1, -1, self.frames, -1, -1)
        patches_NDL = self.visual.patch_embed.proj(film).flatten(2)
        hidden = patches_NDL.transpose(1, 2)[:, (rows * width + cols).flatten()]
        turn = self.visual.rotary_pos_emb(hidden, torch.stack([rows.flatten(), cols.flatten()], dim=1))
        mask = self._window_mask(rows, cols, width) if any(self.window) else None
        for block, windowed in zip(self.visual.blocks, self.window, strict=True):
            hidden = hidden + self._attend(block.attn, block.norm1(hidden), turn, mask if windowed else None)
            hidden = hidden + block.mlp(block.norm2(hidden))
        merger = self.visual.merger
        joined = merger.ln_q(hidden).reshape(tiles.shape[0], rows.shape[0], merger.hidden_size)
        features: Tensor = merger.mlp(joined)
        return features

    def _places(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Row and column [T, merge * merge] of every patch, in the order of the patches."""
        down, across, unit = height // self.merge, width // self.merge, self.merge * self.merge
        inside = torch.arange(unit)
        rows = torch.arange(down)[:, None, None] * self.merge + inside // self.merge
        cols = torch.arange(across)[None, :, None] * self.merge + inside % self.merge
        every = (down, across, unit)
        return rows.expand(every).reshape(-1, unit), cols.expand(every).reshape(-1, unit)

    def _window_mask(self, rows: Tensor, cols: Tensor, width: int) -> Tensor:
        """[1, 1, L, L], added to the scores: patches see those of their own window, whole or cut by the edge."""
        side = self.window_blocks * self.merge
        windows = (rows // side * (width + 1) + cols // side).flatten()
        return torch.where(windows[:, None] == windows[None], 0.0, MASKED)[None, None]

    def _attend(self, attention: nn.Module, hidden: Tensor, turn: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        batch, length, _ = hidden.shape
        parts = attention.qkv(hidden).reshape(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = parts[0], parts[1], parts[2]
        seen = nn.functional.scaled_dot_product_attention(_turn(query, *turn), _turn(key, *turn), value, mask)
        out: Tensor = attention.proj(seen.transpose(1, 2).reshape(batch, length, -1))
        return out


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [N, heads, L, hd] (Su et al. 2021), halves paired."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class Qwen2VL(GenerativeFamily):
    name = "qwen2_vl"
    model_types = ("qwen2_vl", "qwen2_5_vl")
    mrope = True
    prompt = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|>{image}<|vision_end|>{text}<|im_end|>\n<|im_start|>assistant\n"
    )

    def model_class(self, config: PretrainedConfig) -> type[nn.Module]:
        old = config.model_type == "qwen2_vl"
        return Qwen2VLForConditionalGeneration if old else Qwen2_5_VLForConditionalGeneration

    def image_graph(self, source: Source) -> GraphPlan:
        vision = source.config.vision_config
        unit = unit_px(source.config)
        return GraphPlan(
            name="image",
            wrap=lambda model: QwenVision(model, vision),
            inputs=(GraphInput("tiles", ("tiles", 3, "height", "width")),),
            outputs=("features",),
            sizes={"tiles": 2, "height": 5 * unit, "width": 7 * unit},
        )

    def text_model(self, model: nn.Module) -> TextModel:
        body = model.model.language_model
        return TextModel(body.get_input_embeddings(), body, model.lm_head)

    def visual(self, source: Source, tokenizer: Any) -> dict[str, Any]:
        return {"token": image_token(source, tokenizer), "unit_px": unit_px(source.config)}

    def grounding(self, source: Source) -> Grounding:
        if source.config.model_type == "qwen2_vl":
            boxes = {"open": "<|box_start|>", "close": "<|box_end|>", "scale": 1000.0}
            return Grounding("Detect the bounding box of {text}.", boxes)
        boxes = {"open": '"bbox_2d": [', "close": "]", "scale": None}
        return Grounding("Locate {text} and output its bounding box coordinates in JSON format.", boxes)

    def inputs(self, source: Source, image: Image.Image, text: str) -> Mapping[str, Tensor]:
        # Not by the processors themselves: they want torchvision for videos that nobody asked for.
        tokenizer = load_tokenizer(source.folder, source.config)
        token = image_token(source, tokenizer)
        prompt = question(source, tokenizer, token, text, self.prompt)
        processor = load_image_processor(source.folder)
        pixels = processor(image, return_tensors="pt")
        tokens = int(pixels["image_grid_thw"][0].prod()) // processor.merge_size**2
        ids = encode(tokenizer, prompt.replace(token, token * tokens))
        kinds = (ids["input_ids"] == source.config.image_token_id).int()
        return {**ids, **pixels, "mm_token_type_ids": kinds}


def unit_px(config: PretrainedConfig) -> int:
    """Side of the square of pixels that one visual token stands for."""
    return int(config.vision_config.patch_size * config.vision_config.spatial_merge_size)
