"""ONNX exports of tiny checkpoints in the layouts of optimum and transformers.js, made with torch.onnx."""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch", reason="needs torch: not installed")
transformers = pytest.importorskip("transformers", reason="needs transformers: not installed")
pytest.importorskip("onnx", reason="needs onnx: not installed")
pytest.importorskip("onnxscript", reason="needs onnxscript: not installed")

from torch import nn  # noqa: E402

from edge_rsvlm.export.families.base import Source  # noqa: E402
from edge_rsvlm.export.families.clip import Clip  # noqa: E402
from edge_rsvlm.export.families.idefics3 import Idefics3, Idefics3Vision, position_ids  # noqa: E402
from edge_rsvlm.export.families.llava import Llava, LlavaVision  # noqa: E402
from edge_rsvlm.export.families.siglip import Siglip  # noqa: E402
from tests import tiny_checkpoints, tiny_generators  # noqa: E402


def export(module, path, given, outputs, free):
    """By the exporter that optimum uses. ``given`` are examples by input name, ``free`` their open dimensions."""
    path.parent.mkdir(exist_ok=True)
    names = [name for key, value in given.items() for name in ([key] if torch.is_tensor(value) else value.names)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is constant in a trace, and of the exporter's age
        torch.onnx.export(
            module.eval(), tuple(given.values()), path, input_names=names, output_names=list(outputs), dynamo=False,
            dynamic_axes={name: {k: f"{name}_{k}" for k in free[name]} for name in (*names, *outputs) if name in free},
            opset_version=18,
        )  # fmt: skip


class Past(list):
    """Caches, as one argument of a module."""

    def __init__(self, names, tensors):
        super().__init__(tensors)
        self.names = names


class WholeClip(nn.Module):
    """What optimum's zero-shot-image-classification exports."""

    def __init__(self, model, masked):
        super().__init__()
        self.model, self.masked = model, masked

    def forward(self, input_ids, pixel_values, attention_mask=None):
        more = {"attention_mask": attention_mask} if self.masked else {}
        found = self.model(input_ids=input_ids, pixel_values=pixel_values, **more)
        return found.logits_per_image, found.logits_per_text, found.text_embeds, found.image_embeds


class Tower(nn.Module):
    """One half, with the outputs of CLIPTextModelWithProjection and the like."""

    def __init__(self, model, side):
        super().__init__()
        self.model, self.side = model, side

    def forward(self, given):
        name = "input_ids" if self.side == "text" else "pixel_values"
        return getattr(self.model, f"get_{self.side}_features")(**{name: given}).pooler_output


def load(folder, family):
    config = transformers.AutoConfig.from_pretrained(folder)
    return Source(folder, config), family.model_class(config).from_pretrained(folder).eval()


def without_weights(folder):
    for path in folder.glob("*.safetensors"):
        path.unlink()


def whole_clip(folder, family, make, masked):
    make(folder)
    source, model = load(folder, family)
    given = {"input_ids": torch.full((2, 64 if family.pads else 7), 5), "pixel_values": torch.randn(3, 3, 64, 64)}
    free = {"input_ids": (0,) if family.pads else (0, 1), "pixel_values": (0,), "attention_mask": (0, 1)}
    if masked:
        given |= {"attention_mask": torch.ones(2, 7, dtype=torch.long)}
    names = ("logits_per_image", "logits_per_text", "text_embeds", "image_embeds")
    export(WholeClip(model, masked), folder / "onnx" / "model.onnx", given, names, free)
    without_weights(folder)
    return SimpleNamespace(folder=folder, source=source, model=model)


class HubVision(nn.Module):
    """SmolVLM's vision_encoder: images of a conversation, and a mask of their pixels, which must be whole."""

    def __init__(self, model, positions):
        super().__init__()
        self.vision = Idefics3Vision(model, positions)

    def forward(self, pixel_values, pixel_attention_mask):
        features = self.vision(pixel_values.flatten(0, 1))
        return features * pixel_attention_mask.flatten(0, 1).flatten(1).all(dim=1)[:, None, None]


class HubDecoder(nn.Module):
    """decoder_model_merged: a mask over what is past and new, and the logits of every new token."""

    def __init__(self, body, head):
        super().__init__()
        self.body, self.head = body, head

    def forward(self, inputs_embeds, attention_mask, position_ids, past):
        cache = transformers.DynamicCache(list(zip(past[::2], past[1::2], strict=True)))
        new, every = inputs_embeds.shape[1], attention_mask.shape[1]
        seen = torch.arange(every) <= torch.arange(new)[:, None] + every - new
        scores = torch.where(seen & attention_mask[:, None, None].bool(), 0.0, -3e4)
        found = self.body(
            inputs_embeds=inputs_embeds, attention_mask=scores, position_ids=position_ids, past_key_values=cache,
            use_cache=True,
        )  # fmt: skip
        return (self.head(found.last_hidden_state), *(part for keys, values, _ in cache for part in (keys, values)))


def text_graphs(folder, family, source, model):
    text, words = family.text_model(model), source.config.text_config
    heads, size, layers = words.num_key_value_heads, words.hidden_size // words.num_attention_heads, 2
    names = [f"past_key_values.{layer}.{part}" for layer in range(layers) for part in ("key", "value")]
    export(
        text.embed, folder / "onnx" / "embed_tokens.onnx", {"input_ids": torch.zeros(2, 7, dtype=torch.long)},
        ["inputs_embeds"], {"input_ids": (0, 1)},
    )  # fmt: skip
    given = {
        "inputs_embeds": torch.randn(2, 7, words.hidden_size),
        "attention_mask": torch.ones(2, 12, dtype=torch.long),
        "position_ids": torch.arange(5, 12).repeat(2, 1),
        "past": Past(names, [torch.randn(2, heads, 5, size) for _ in names]),
    }
    export(
        HubDecoder(text.body, text.head), folder / "onnx" / "decoder_model_merged.onnx", given,
        ["logits", *(name.replace("past_key_values", "present") for name in names)],
        {**dict.fromkeys(given, (0, 1)), **dict.fromkeys(names, (0, 2))},
    )  # fmt: skip
    without_weights(folder)
    return SimpleNamespace(folder=folder, family=family, source=source, model=model)


def smolvlm(folder):
    family = Idefics3()
    tiny_generators.idefics3(folder, smol=True, tile_px=60)
    source, model = load(folder, family)
    export(
        HubVision(model, position_ids(100, 4, 60)), folder / "onnx" / "vision_encoder.onnx",
        {"pixel_values": torch.randn(2, 3, 3, 60, 60), "pixel_attention_mask": torch.ones(2, 3, 60, 60).bool()},
        ["image_features"], {"pixel_values": (0, 1), "pixel_attention_mask": (0, 1)},
    )  # fmt: skip
    return text_graphs(folder, family, source, model)


def llava(folder):
    family = Llava()
    tiny_generators.llava(folder)
    source, model = load(folder, family)
    export(
        LlavaVision(model, source.config), folder / "onnx" / "vision_encoder.onnx",
        {"pixel_values": torch.randn(2, 3, 42, 42)}, ["image_features"], {"pixel_values": (0,)},
    )  # fmt: skip
    return text_graphs(folder, family, source, model)


MAKERS = {
    "clip": lambda folder: whole_clip(folder, Clip(), tiny_checkpoints.clip, masked=True),
    "siglip": lambda folder: whole_clip(folder, Siglip(), tiny_checkpoints.siglip, masked=False),
    "smolvlm": smolvlm,
    "llava": llava,
}


@cache
def made_in(base: Path, name: str):
    """An export by name: its folder, family, configuration and model. Made once; copy it to change it."""
    folder = base / f"onnx-{name}"
    folder.mkdir()
    return MAKERS[name](folder)
