"""Tiny random models and adapters of them, made by peft itself, and what both compute."""

from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch", reason="needs torch: not installed")
transformers = pytest.importorskip("transformers", reason="needs transformers: not installed")
peft = pytest.importorskip("peft", reason="needs peft: not installed")

from edge_rsvlm.export.adapters.resolve import resolve  # noqa: E402
from edge_rsvlm.export.adapters.unmerged import Unmerged  # noqa: E402
from edge_rsvlm.export.adapters.updates import merge  # noqa: E402

TEXT = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {**TEXT, "intermediate_size": 48, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
OPT = {**TEXT, "ffn_dim": 48, "max_position_embeddings": 64, "word_embed_proj_dim": 32, "eos_token_id": 2}
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
DUAL_TEXT = {
    **TEXT, "intermediate_size": 48, "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
QWEN_TEXT = {
    **LLAMA,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
}
QWEN_IDS = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 59}
IMAGE = 63


def clip():
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=DUAL_TEXT, vision_config=VISION))


def siglip():
    return transformers.SiglipModel(transformers.SiglipConfig(text_config=DUAL_TEXT, vision_config=VISION))


def llava(**changes):
    text, vision = {"model_type": "llama", **LLAMA}, {"model_type": "clip_vision_model", **VISION}
    config = {"text_config": text, "vision_config": vision, "image_token_index": IMAGE, **changes}
    return transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(**config))


def qwen2_vl(tie=True):
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4}
    config = transformers.Qwen2VLConfig(
        text_config=QWEN_TEXT, vision_config=vision, tie_word_embeddings=tie, **QWEN_IDS
    )
    return transformers.Qwen2VLForConditionalGeneration(config)


def qwen2_5_vl():
    vision = {
        "depth": 2, "hidden_size": 32, "out_hidden_size": 32, "num_heads": 4, "intermediate_size": 48, "patch_size": 4,
        "fullatt_block_indexes": [1], "window_size": 16,
    }  # fmt: skip
    config = transformers.Qwen2_5_VLConfig(text_config=QWEN_TEXT, vision_config=vision, **QWEN_IDS)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def smolvlm():
    text = {"model_type": "llama", "pad_token_id": 0, **LLAMA}
    config = transformers.SmolVLMConfig(text_config=text, vision_config=VISION, scale_factor=2, image_token_id=IMAGE)
    return transformers.SmolVLMForConditionalGeneration(config)


def blip_2():
    qformer = {**TEXT, "intermediate_size": 48, "encoder_hidden_size": 32}
    config = transformers.Blip2Config(
        vision_config=VISION, qformer_config=qformer, text_config={"model_type": "opt", **OPT}, num_query_tokens=4,
        image_token_index=IMAGE,
    )  # fmt: skip
    return transformers.Blip2ForConditionalGeneration(config)


def opt():
    return transformers.OPTForCausalLM(transformers.OPTConfig(**OPT))


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))


IMAGE_TOKENS = {"llava": 4, "qwen2_vl": 4, "qwen2_5_vl": 4, "smolvlm": 1, "blip_2": 4}
TOKEN_OF = {"qwen2_vl": 60, "qwen2_5_vl": 60}
MADE = {f.__name__: f for f in (clip, siglip, llava, qwen2_vl, qwen2_5_vl, smolvlm, blip_2, opt, llama)}
TEXT_LINEARS = ["q_proj", "v_proj"]


def make(family, **options):
    torch.manual_seed(0)
    return MADE[family](**options).eval()


def answer(family, model):
    """Everything that the model computes of one image and one text, as one vector."""
    generator = torch.Generator().manual_seed(7)
    pixels = torch.randn(1, 3, 16, 16, generator=generator)
    tokens = TOKEN_OF.get(family, IMAGE)
    ids = torch.tensor([[1, *[tokens] * IMAGE_TOKENS.get(family, 0), 5, 3, 4, 2]])
    inputs = {"input_ids": ids}
    if family in ("clip", "siglip", "llava", "blip_2"):
        inputs["pixel_values"] = pixels
    if family == "smolvlm":
        inputs["pixel_values"] = pixels[:, None]
    if family.startswith("qwen"):
        inputs["pixel_values"] = torch.randn(16, 3 * 2 * 4 * 4, generator=generator)
        inputs["image_grid_thw"] = torch.tensor([[1, 4, 4]])
        inputs["mm_token_type_ids"] = (ids == tokens).long()
    with torch.no_grad():
        out = model(**inputs)
    if family in ("clip", "siglip"):
        return torch.cat([out.image_embeds.flatten(), out.text_embeds.flatten()])
    return out.logits.flatten()


def adapted(family, folder, *, seed=1, base=None, **config):
    """Saves a random adapter of this kind in ``folder``; returns its base, and the PeftModel."""
    base = base or make(family)
    config = {"r": 4, "target_modules": TEXT_LINEARS, **config}
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**config)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad or "original_module" in name:
                continue
            if "magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.rand(parameter.shape, generator=generator))
            else:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return base, model


def merged(base, resolution):
    """The base with every tensor replaced by its merge, as an export does it."""
    config = copy.deepcopy(base.config)
    if resolution.untied:
        for part in (config, config.get_text_config()):
            part.tie_word_embeddings = False
    model = type(base)(config).eval()
    state = {k: merge(v, resolution.updates.get(k, ())) for k, v in base.state_dict().items()}
    model.load_state_dict(state, strict=True)
    return model


def check(family, base, adapters, expected):
    """Merged and unmerged equal ``expected``, and differ from the base."""
    resolution = resolve(adapters, base)
    assert expected.shape == answer(family, base).shape
    assert not torch.allclose(expected, answer(family, base), atol=1e-3)
    torch.testing.assert_close(answer(family, merged(base, resolution)), expected, atol=1e-5, rtol=1e-5)
    before = copy.deepcopy(base.state_dict())
    with Unmerged(base, resolution.updates) as unmerged:
        torch.testing.assert_close(answer(family, unmerged), expected, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(v, before[k]) for k, v in base.state_dict().items())
    return resolution
