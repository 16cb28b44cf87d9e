"""What transformers itself answers for a checkpoint folder of 5.x, by its own classes and processors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import peft
import torch
import transformers
from transformers import AutoConfig, AutoImageProcessor, AutoProcessor, AutoTokenizer

TOKENS = 16
NEEDS_TORCHVISION = ("smolvlm", "qwen2_vl", "qwen2_5_vl")
"""Models whose processors ask for it on account of videos."""


def model_of(folder: Path, adapters: Sequence[tuple[Path, float]] = ()):
    """In float32; ``adapters`` (folder, weight) side by side, as peft adds them without cross terms."""
    (name,) = AutoConfig.from_pretrained(folder).architectures
    model = getattr(transformers, name).from_pretrained(folder, dtype=torch.float32).eval()
    if not adapters:
        return model
    names = [str(index) for index in range(len(adapters))]
    adapted = peft.PeftModel.from_pretrained(model, adapters[0][0], adapter_name=names[0])
    for key, (path, _) in list(zip(names, adapters, strict=True))[1:]:
        adapted.load_adapter(path, key)
    if [weight for _, weight in adapters] != [1.0]:
        adapted.add_weighted_adapter(names, [weight for _, weight in adapters], "sum", combination_type="cat")
        adapted.set_adapter("sum")
    return adapted.eval()


@torch.no_grad()
def generated(folder: Path, model, image, question: str | None) -> tuple[list[int], np.ndarray]:
    """Tokens of greedy generation, and the logits [T, V] that they were chosen by."""
    answer = model.generate(
        **prompt(folder, image, question), max_new_tokens=TOKENS, do_sample=False, return_dict_in_generate=True,
        output_scores=True,
    )  # fmt: skip
    logits = torch.cat(answer.scores).numpy()
    return answer.sequences[0, -len(logits) :].tolist(), logits


def prompt(folder: Path, image, question: str | None) -> dict:
    """Without a question, BLIP-2 goes on from nothing."""
    kind = AutoConfig.from_pretrained(folder).model_type
    if kind in NEEDS_TORCHVISION:
        return _prompt_by_hand(folder, kind, image, question)
    processor = AutoProcessor.from_pretrained(folder)
    if kind == "blip-2":
        processor.num_query_tokens = AutoConfig.from_pretrained(folder).num_query_tokens
        asked = {} if question is None else {"text": f"Question: {question} Answer:"}
        return processor(images=image, **asked, return_tensors="pt")
    if kind == "llava":
        processor.num_additional_image_tokens = 1  # CLIP's class token, which old checkpoints do not mention
    if kind == "idefics3":
        config, side = AutoConfig.from_pretrained(folder), processor.image_processor.max_image_size["longest_edge"]
        processor.image_seq_len = (side // config.vision_config.patch_size // config.scale_factor) ** 2
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    template = (folder / "chat_template.jinja").read_text()
    text = processor.apply_chat_template(turn, chat_template=template, add_generation_prompt=True)
    # A template that writes BOS leaves none to add (as apply_chat_template does with tokenize=True).
    special = not text.startswith(str(processor.tokenizer.bos_token))
    return processor(images=image, text=text, return_tensors="pt", add_special_tokens=special)


def _prompt_by_hand(folder: Path, kind: str, image, question: str) -> dict:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    images = AutoImageProcessor.from_pretrained(folder, backend="pil")
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    template = (folder / "chat_template.jinja").read_text()
    text = tokenizer.apply_chat_template(turn, chat_template=template, tokenize=False, add_generation_prompt=True)
    if kind == "smolvlm":
        pixels = images(image, return_row_col_info=True, return_tensors="pt")
        rows, cols = pixels.pop("rows")[0][0], pixels.pop("cols")[0][0]
        side, config = pixels["pixel_values"].shape[-1], AutoConfig.from_pretrained(folder)
        tokens = "<image>" * int((side // config.vision_config.patch_size // config.scale_factor) ** 2)
        around, written = "<fake_token_around_image>", ""
        for row in range(1, rows + 1):
            written += "".join(f"{around}<row_{row}_col_{col}>{tokens}" for col in range(1, cols + 1)) + "\n"
        text = text.replace("<image>", f"{written}{chr(10) if rows else ''}{around}<global-img>{tokens}{around}")
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        return {**ids, **pixels}
    pixels = images(image, return_tensors="pt")
    count = int(pixels["image_grid_thw"][0].prod()) // images.merge_size**2
    ids = tokenizer(text.replace("<|image_pad|>", "<|image_pad|>" * count), return_tensors="pt")
    kinds = (ids["input_ids"] == tokenizer.convert_tokens_to_ids("<|image_pad|>")).int()
    return {
        "input_ids": ids["input_ids"],
        "attention_mask": ids["attention_mask"],
        **pixels,
        "mm_token_type_ids": kinds,
    }


@torch.no_grad()
def matched(folder: Path, model, image, texts: Sequence[str]):
    """Logits [M] of an image and texts, and their cosines."""
    processor = AutoProcessor.from_pretrained(folder)
    siglip = AutoConfig.from_pretrained(folder).model_type == "siglip"
    how = {"padding": "max_length", "max_length": 64} if siglip else {"padding": True}
    tokens = processor.tokenizer(list(texts), truncation=True, return_tensors="pt", **how)
    pixels = processor.image_processor(image, return_tensors="pt")["pixel_values"]
    names = ("input_ids",) if siglip else ("input_ids", "attention_mask")
    out = model(pixel_values=pixels, **{name: tokens[name] for name in names})
    return out.logits_per_image[0].numpy(), (out.image_embeds @ out.text_embeds.T)[0].numpy()


@torch.no_grad()
def detected(
    folder: Path, model, image, queries: Sequence[str], threshold: float
) -> list[tuple[str, float, list[float]]]:
    """(query, score, corners in pixels) of every box above the threshold, best first."""
    processor = AutoProcessor.from_pretrained(folder)
    inputs = processor(text=[list(queries)], images=image, return_tensors="pt")
    out = model(**inputs)
    sizes = [(image.height, image.width)]
    (found,) = processor.post_process_grounded_object_detection(out, threshold=threshold, target_sizes=sizes)
    rows = zip(found["labels"].tolist(), found["scores"].tolist(), found["boxes"].tolist(), strict=True)
    return sorted(((queries[label], score, box) for label, score, box in rows), key=lambda row: -row[1])


@torch.no_grad()
def answered(folder: Path, model, given, question: str) -> tuple[str, float]:
    """The best answer, and its probability; ``given`` is an image, or features of regions [R, D]."""
    config = AutoConfig.from_pretrained(folder)
    if isinstance(given, np.ndarray):
        tokens = AutoTokenizer.from_pretrained(folder)(question, return_tensors="pt")
        logits = model(**tokens, visual_embeds=torch.from_numpy(given)[None]).logits[0]
        scores = logits.softmax(-1)
    else:
        logits = model(**AutoProcessor.from_pretrained(folder)(given, question, return_tensors="pt")).logits[0]
        scores = logits.sigmoid()
    best = int(scores.argmax())
    return config.id2label[best], float(scores[best])
