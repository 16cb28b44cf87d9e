"""Tiny random models of every family that can be exported, without tokenizers. Needs torch and transformers."""

from __future__ import annotations

import torch
import transformers

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
IMAGE = {**SMALL, "image_size": 16, "patch_size": 8}
TEXT = {**SMALL, "vocab_size": 64, "max_position_embeddings": 32}
CLIP = {"vision_config": IMAGE, "text_config": TEXT}
LLAMA = {**TEXT, "model_type": "llama", "num_key_value_heads": 2}
TILED = {"vision_config": IMAGE, "text_config": LLAMA, "image_token_id": 60, "scale_factor": 2}
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
QWEN_TEXT = {**TEXT, "num_key_value_heads": 2, "rope_parameters": ROPE}
BERT = {**TEXT, "model_type": "bert"}
SWIN = {
    "model_type": "swin", "image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2],
    "window_size": 4,
}  # fmt: skip
CONFIGS = {
    "clip": ("CLIPModel", {**CLIP, "projection_dim": 16}),
    "siglip": ("SiglipModel", CLIP),
    "owlvit": ("OwlViTForObjectDetection", {**CLIP, "projection_dim": 32}),
    "owlv2": ("Owlv2ForObjectDetection", {**CLIP, "projection_dim": 32}),
    "smolvlm": ("SmolVLMForConditionalGeneration", TILED),
    "idefics3": ("Idefics3ForConditionalGeneration", TILED),
    "llava": (
        "LlavaForConditionalGeneration",
        {
            "vision_config": {"model_type": "clip_vision_model", **IMAGE, "projection_dim": 16},
            "text_config": LLAMA,
            "image_token_index": 60,
        },
    ),
    "qwen2_vl": (
        "Qwen2VLForConditionalGeneration",
        {
            "vision_config": {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 8},
            "text_config": QWEN_TEXT,
            "tie_word_embeddings": True,
        },
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VLForConditionalGeneration",
        {
            "vision_config": {
                "depth": 2, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48, "num_heads": 2,
                "patch_size": 8, "fullatt_block_indexes": [1],
            },
            "text_config": QWEN_TEXT,
        },
    ),
    "blip-2": (
        "Blip2ForConditionalGeneration",
        {
            "vision_config": IMAGE,
            "qformer_config": {**TEXT, "encoder_hidden_size": 32},
            "text_config": {
                "model_type": "opt", "vocab_size": 64, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2,
                "num_attention_heads": 4, "word_embed_proj_dim": 32, "max_position_embeddings": 32,
            },
            "num_query_tokens": 4,
        },
    ),
    "vilt": ("ViltForQuestionAnswering", {**TEXT, **IMAGE, "num_labels": 7}),
    "visual_bert": ("VisualBertForQuestionAnswering", {**TEXT, "visual_embedding_dim": 16, "num_labels": 7}),
    "align": (
        "AlignModel",
        {
            "text_config": TEXT,
            "vision_config": {"image_size": 32, "width_coefficient": 0.2, "depth_coefficient": 0.1, "hidden_dim": 64},
            "projection_dim": 64,
        },
    ),
    "vision-text-dual-encoder": (
        "VisionTextDualEncoderModel", {"vision_config": SWIN, "text_config": BERT, "projection_dim": 16}
    ),
}  # fmt: skip
"""model_type -> transformers class, keywords of its config."""


def tiny(name):
    """The transformers class and a model in eval mode."""
    class_name, keywords = CONFIGS[name]
    config_class = type(transformers.AutoConfig.for_model(name))
    torch.manual_seed(0)
    if name == "vision-text-dual-encoder":
        towers = [transformers.AutoConfig.for_model(**keywords[part]) for part in ("vision_config", "text_config")]
        config = config_class.from_vision_text_configs(*towers, projection_dim=keywords["projection_dim"])
    else:
        config = config_class(**keywords)
    model_class = getattr(transformers, class_name)
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # not 0 or 1, which hide what is left out
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    return model_class, model
