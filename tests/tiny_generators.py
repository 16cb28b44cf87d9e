"""Tiny random checkpoints of models that write text, in the files of the published ones.

No two sizes are equal by chance, vocabularies are larger than the tokenizers, no weight is zero or one, and logits lie
far apart, so that equal tokens mean equal models.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import sentencepiece
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    LlamaTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

SENTENCES = (
    "Describe this image in one sentence.",
    "Question: how many airplanes are there? Answer:",
    "USER: What is the colour of the roof? ASSISTANT: red",
    "You are a helpful assistant. The user asks about ships in the harbour.",
)
TEXT = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}
QWEN_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
IDEFICS_TEMPLATE = (
    "<|begin_of_text|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] | trim }}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
LLAVA_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def llava(folder: Path, *, tower: str = "clip_vision_model", text: dict | None = None, **config) -> Path:
    """Llama's sentencepiece tokenizer, with ``<image>`` added."""
    tokenizer = _llama_tokenizer(folder, "<image>", "<pad>")
    vision = {"model_type": tower, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3}
    built = LlavaConfig(
        vision_config=vision | {"num_attention_heads": 2, "image_size": 42, "patch_size": 14},
        text_config={"model_type": "llama", **TEXT, "vocab_size": len(tokenizer) + 13} | (text or {}),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        **config,
    )
    _save(LlavaForConditionalGeneration(built), folder)
    _write(folder, "chat_template.jinja", LLAVA_TEMPLATE)
    images = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 42},
        "crop_size": {"height": 42, "width": 42},
        "resample": 3,
    }
    patches = {"patch_size": 14, "vision_feature_select_strategy": built.vision_feature_select_strategy}
    _write(folder, "processor_config.json", patches | {"processor_class": "LlavaProcessor", "image_processor": images})
    return folder


def idefics3(folder: Path, *, smol: bool = False, split: bool = True, tile_px: int = 100) -> Path:
    """A grid of 25 x 25 patches, whose positions transformers sorts into the wrong buckets."""
    special = ["<|begin_of_text|>", "<end_of_utterance>", "<fake_token_around_image>", "<image>", "<global-img>"]
    special += [f"<row_{row}_col_{col}>" for row in (1, 2) for col in (1, 2)]
    tokenizer = _byte_tokenizer(folder, special, bos="<|begin_of_text|>", eos="<end_of_utterance>", adds_bos=True)
    vision = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3}
    built = (SmolVLMConfig if smol else Idefics3Config)(
        vision_config=vision | {"image_size": 100, "patch_size": 4},
        text_config={"model_type": "llama", **TEXT, "vocab_size": len(tokenizer) + 11}
        | {"eos_token_id": [tokenizer.eos_token_id, tokenizer.bos_token_id]},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=5,
    )
    _save((SmolVLMForConditionalGeneration if smol else Idefics3ForConditionalGeneration)(built), folder)
    _write(folder, "chat_template.jinja", IDEFICS_TEMPLATE)
    images = {
        "image_processor_type": "SmolVLMImageProcessor" if smol else "Idefics3ImageProcessor",
        "size": {"longest_edge": 2 * tile_px},
        "max_image_size": {"longest_edge": tile_px},
        "do_image_splitting": split,
    }
    _write(folder, "preprocessor_config.json", images)
    return folder


def qwen(folder: Path, *, version: str = "qwen2_vl", tied: bool = False, text: dict | None = None) -> Path:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
    special += ["<|video_pad|>", "<|box_start|>", "<|box_end|>"]
    tokenizer = _byte_tokenizer(folder, special, bos=None, eos="<|im_end|>", adds_bos=False)
    ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>")
        for name, token in (
            ("image", "image_pad"),
            ("video", "video_pad"),
            ("vision_start", "vision_start"),
            ("vision_end", "vision_end"),
        )
    }
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 2, 3]}
    words = {**TEXT, "vocab_size": len(tokenizer) + 17, "rope_parameters": rope, "bos_token_id": None} | (text or {})
    words |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    if version == "qwen2_vl":
        vision = {"embed_dim": 32, "hidden_size": TEXT["hidden_size"], "mlp_ratio": 2}
        config, model = Qwen2VLConfig, Qwen2VLForConditionalGeneration
    else:
        vision = {"hidden_size": 32, "intermediate_size": 40, "out_hidden_size": TEXT["hidden_size"]}
        vision |= {"fullatt_block_indexes": [1], "window_size": 112}
        config, model = Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    vision |= {"depth": 3, "num_heads": 2}
    built = config(vision_config=vision, text_config=words, tie_word_embeddings=tied, **ids)
    _save(model(built), folder)
    _write(folder, "chat_template.jinja", QWEN_TEMPLATE)
    images = {"image_processor_type": "Qwen2VLImageProcessor"}
    _write(folder, "preprocessor_config.json", images | {"min_pixels": 4 * 28 * 28, "max_pixels": 40 * 28 * 28})
    return folder


def blip_2(folder: Path, *, image_token: bool = True, text: dict | None = None) -> Path:
    """OPT's tokenizer: byte-level, with ``</s>`` before every text."""
    special = ["<pad>", "</s>", *(["<image>"] if image_token else [])]
    tokenizer = _byte_tokenizer(folder, special, bos="</s>", eos="</s>", adds_bos=True)
    opt = {"model_type": "opt", "hidden_size": 48, "word_embed_proj_dim": 48, "ffn_dim": 80, "num_hidden_layers": 2}
    opt |= {"num_attention_heads": 4, "vocab_size": len(tokenizer) + 7, "max_position_embeddings": 96}
    opt |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.convert_tokens_to_ids("Ċ")}
    qformer = {"hidden_size": 36, "num_attention_heads": 3, "intermediate_size": 52, "num_hidden_layers": 3}
    vision = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
    built = Blip2Config(
        vision_config=vision | {"image_size": 28, "patch_size": 7},
        qformer_config=qformer | {"vocab_size": 20},
        text_config=text or opt,
        num_query_tokens=5,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>") if image_token else None,
    )
    _save(Blip2ForConditionalGeneration(built), folder)
    images = {"image_processor_type": "BlipImageProcessor", "size": {"height": 28, "width": 28}}
    _write(folder, "preprocessor_config.json", images)
    return folder


def as_4x(folder: Path) -> Path:
    """The same checkpoint as transformers 4.x wrote it."""
    config = json.loads((folder / "config.json").read_text())
    flat = config["model_type"].startswith("qwen2")
    for part in (config, config["text_config"], config["vision_config"]):
        _old_names(part, mrope=flat)
    if flat:
        words = config.pop("text_config")
        config = {**words, **config}
        config["vision_config"]["model_type"] = config["model_type"]
    elif config["text_config"]["model_type"] == "llama":
        # Left out where equal to the defaults of the class.
        for name, default in (("hidden_act", "silu"), ("attention_bias", False), ("tie_word_embeddings", False)):
            if config["text_config"].get(name) == default:
                del config["text_config"][name]
    _write(folder, "config.json", config)
    if (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text()
        (folder / "chat_template.jinja").unlink()
        _write(folder, "chat_template.json", {"chat_template": template})
    if (folder / "processor_config.json").is_file():
        images = json.loads((folder / "processor_config.json").read_text()).pop("image_processor")
        _write(folder, "preprocessor_config.json", images)
        _write(folder, "processor_config.json", {"processor_class": "LlavaProcessor"})
    return folder


def _old_names(part: dict, *, mrope: bool) -> None:
    part["torch_dtype"] = part.pop("dtype", "float32")
    if rope := part.pop("rope_parameters", None):
        part["rope_theta"] = rope["rope_theta"]
        if mrope and "mrope_section" in rope:
            part["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    part.pop("transformers_version", None)
    part.pop("layer_types", None)


def _save(model, folder: Path) -> None:
    """Random everywhere: fan-in scaled matrices, wide embeddings and heads, norms and biases off their start."""
    generator = torch.Generator().manual_seed(9)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if "embed_tokens" in name and tied:
                weight.copy_(noise * 0.15)  # else every token would follow itself
            elif "embed_tokens" in name or "lm_head" in name or "query_tokens" in name:
                weight.copy_(noise)
            elif "position" in name:
                weight.copy_(noise * 0.3)
            elif weight.ndim > 1:
                weight.copy_(noise * 1.4 / weight[0].numel() ** 0.5)
            else:
                weight.copy_(noise * 0.2 + float("norm" in name.lower() and name.endswith("weight")))
    model.save_pretrained(folder)


def _write(folder: Path, name: str, content: str | dict) -> None:
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content, indent=2))


def _byte_tokenizer(folder: Path, special: list[str], *, bos: str | None, eos: str, adds_bos: bool):
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(SENTENCES, trainer)
    made.add_special_tokens(special)
    if adds_bos:
        bos_id = made.token_to_id(bos)
        made.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, bos_id)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token=bos, eos_token=eos, pad_token=special[0])
    tokenizer.save_pretrained(folder)
    return tokenizer


def _llama_tokenizer(folder: Path, *added: str):
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_writer=file,
        model_type="bpe",
        vocab_size=340,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(file.getvalue())
    tokenizer = LlamaTokenizer.from_pretrained(folder, add_bos_token=True, local_files_only=True)
    tokenizer.add_special_tokens({"additional_special_tokens": list(added), "pad_token": added[-1]})
    tokenizer.save_pretrained(folder)
    return tokenizer
