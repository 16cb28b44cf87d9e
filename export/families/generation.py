"""What the families that write text share: three graphs, the manifest's tasks, and transformers' own greedy answer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from transformers import GenerationConfig, PretrainedConfig

from edge_rsvlm.errors import UsageError
from edge_rsvlm.export.families import chat
from edge_rsvlm.export.families.base import Arrays, Description, Family, GraphPlan, Source
from edge_rsvlm.export.families.causal_decoder import TextModel, cache_of, decoder_plan, embed_plan
from edge_rsvlm.export.families.image_processors import input_spec, load_image_processor
from edge_rsvlm.export.families.tokenizers import FILE, load_tokenizer, tokenizer_json

CAPTION = "Describe this image in one sentence."
MAX_TOKENS = 128
PARITY_TOKENS = 16
NOT_KNOWN = (
    "bad_words_ids", "begin_suppress_tokens", "dola_layers", "encoder_no_repeat_ngram_size",
    "encoder_repetition_penalty", "exponential_decay_length_penalty", "forced_eos_token_id", "guidance_scale",
    "min_length", "min_new_tokens", "no_repeat_ngram_size", "penalty_alpha", "sequence_bias", "stop_strings",
    "suppress_tokens", "watermarking_config",
)  # fmt: skip
"""Settings of generation_config.json that change greedy answers, and that no task of a manifest has."""
NEUTRAL: tuple[object, ...] = (None, 0, 1.0, [], ())


@dataclass(frozen=True)
class Grounding:
    """How a family is asked for boxes, and how it writes them (BoxFormat of the manifest)."""

    question: str
    boxes: dict[str, Any]


class GenerativeFamily(Family):
    """Image and text in, text out: an ``image`` graph, ``embed`` and ``decoder``."""

    mrope = False
    prompt: str
    """Of a checkpoint without a chat template."""

    @abstractmethod
    def image_graph(self, source: Source) -> GraphPlan:
        """``tiles`` [N, 3, H, W] -> ``features`` [N, T, D], each in place of an image token's embedding."""

    @abstractmethod
    def text_model(self, model: nn.Module) -> TextModel:
        """The text parts of the transformers model."""

    @abstractmethod
    def visual(self, source: Source, tokenizer: Any) -> dict[str, Any]:
        """VisualTokens of the manifest."""

    @abstractmethod
    def inputs(self, source: Source, image: Image.Image, text: str) -> Mapping[str, Tensor]:
        """Inputs of ``model.generate`` by transformers' own processors: ``text`` is a question about ``image``."""

    def grounding(self, source: Source) -> Grounding | None:
        """Known only for families whose checkpoints were all trained to write boxes."""
        return None

    def chat_prompt(self, source: Source, tokenizer: Any) -> chat.Prompt:
        return chat.expand(source.folder, tokenizer, image_token(source, tokenizer), self.prompt)

    def caption_fields(self, source: Source, tokenizer: Any, prompt: chat.Prompt) -> dict[str, Any]:
        """What the task ``caption`` has otherwise than ``ask``."""
        return {"prompt": prompt.text.replace(chat.TEXT, CAPTION)}

    def generation_config(self, source: Source) -> GenerationConfig:
        """What transformers generates by."""
        if (source.folder / "generation_config.json").is_file():
            return GenerationConfig.from_pretrained(source.folder, local_files_only=True)
        return GenerationConfig.from_model_config(source.config)

    def eos_ids(self, source: Source, tokenizer: Any) -> tuple[int, ...]:
        return eos_ids(self.generation_config(source), source.config.text_config, tokenizer)

    def graphs(self, source: Source) -> tuple[GraphPlan, ...]:
        decoder = decoder_plan(source.config.text_config, self.text_model, mrope=self.mrope)
        return self.image_graph(source), embed_plan(self.text_model), decoder

    def describe(self, source: Source) -> Description:
        tokenizer = load_tokenizer(source.folder, source.config)
        prompt = self.chat_prompt(source, tokenizer)
        common = self._task(source, tokenizer, prompt)
        tasks = {
            "caption": {**common, **self.caption_fields(source, tokenizer, prompt)},
            "ask": {**common, "prompt": prompt.text},
        }
        if grounding := self.grounding(source):
            question = prompt.text.replace(chat.TEXT, grounding.question)
            tasks["ground"] = {**common, "prompt": question, "boxes": grounding.boxes}
        graphs = {plan.name: roles(plan) for plan in self.graphs(source)}
        return Description(graphs, tasks, {FILE: tokenizer_json(tokenizer)})

    def reference(self, source: Source, model: nn.Module, image_HWC: NDArray[np.uint8], text: str) -> Arrays:
        ends = self.eos_ids(source, load_tokenizer(source.folder, source.config))
        return greedy(model, self.inputs(source, Image.fromarray(image_HWC), text), ends)

    def _task(self, source: Source, tokenizer: Any, prompt: chat.Prompt) -> dict[str, Any]:
        return {
            "kind": "generate",
            "input": input_spec(load_image_processor(source.folder)),
            "encoder": "image",
            "encoder_outputs": ("features",),
            "project": None,
            "decoder": {
                "kind": "onnx",
                "embed": "embed",
                "graph": "decoder",
                "cache": cache_of(source.config.text_config),
            },
            # Not cut: a prompt is longer than its text by the tokens of the image.
            "tokenizer": {"file": FILE, "add_special_tokens": prompt.add_special_tokens},
            "visual": self.visual(source, tokenizer),
            "positions": "mrope" if self.mrope else "sequence",
            "eos_ids": self.eos_ids(source, tokenizer),
            "repetition_penalty": repetition_penalty(self.generation_config(source), source.folder),
            "max_tokens": MAX_TOKENS,
            "beams": 1,
            "length_penalty": 1.0,
        }


def image_token(source: Source, tokenizer: Any) -> str:
    """The token that an image's features replace."""
    index = source.config.image_token_id
    token = None if index is None else tokenizer.convert_ids_to_tokens(index)
    if token is None or tokenizer(token, add_special_tokens=False)["input_ids"] != [index]:
        raise UsageError(
            f"{source.folder}: the tokenizer has no token of the number {index}, which config.json says is an image's",
            fix="use the tokenizer files that the model was published with",
        )
    return str(token)


def eos_ids(generation: GenerationConfig, text_config: PretrainedConfig, tokenizer: Any) -> tuple[int, ...]:
    """Tokens that end an answer: as transformers generates, else as the text model or the tokenizer says."""
    for ids in (generation.eos_token_id, getattr(text_config, "eos_token_id", None), tokenizer.eos_token_id):
        if ids is not None:
            return tuple(ids) if isinstance(ids, (list, tuple)) else (int(ids),)
    raise UsageError(
        "nothing says which token ends an answer", fix='give "eos_token_id" in generation_config.json of the checkpoint'
    )


def repetition_penalty(generation: GenerationConfig, folder: Path) -> float:
    """UsageError names a setting that changes which token is the likeliest, and which the runtime does not know."""
    for name in NOT_KNOWN:
        if getattr(generation, name, None) not in NEUTRAL:
            raise UsageError(
                f"{folder}: generation_config.json sets '{name}', which bundles cannot do",
                fix="remove it there, and expect other answers than transformers gives with it",
            )
    return float(generation.repetition_penalty or 1.0)


def greedy(model: nn.Module, inputs: Mapping[str, Tensor], ends: Sequence[int]) -> Arrays:
    """``tokens`` (at most 16, the end included), and ``logits`` [V] of the first before a penalty is applied.

    ``ends`` are for a model whose own settings name no end: transformers would never stop.
    """
    endless = model.generation_config.eos_token_id is None
    with torch.no_grad():
        answer = model.generate(
            **inputs,
            max_new_tokens=PARITY_TOKENS,
            do_sample=False,
            num_beams=1,
            return_dict_in_generate=True,
            output_logits=True,
            **({"eos_token_id": list(ends)} if endless else {}),
        )
    tokens = answer.sequences[0, -len(answer.logits) :]
    return {"tokens": tokens.numpy(), "logits": answer.logits[0][0].float().numpy()}


def encode(tokenizer: Any, prompt: str) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask`` [1, S] of a prompt, BOS exactly once."""
    ids = tokenizer(prompt, add_special_tokens=chat.adds_special_tokens(tokenizer, prompt), return_tensors="pt")
    return {name: ids[name] for name in ("input_ids", "attention_mask")}


def question(source: Source, tokenizer: Any, token: str, text: str, otherwise: str) -> str:
    """``text`` as transformers would ask it, the image still one ``token``."""
    template = chat.read_template(source.folder, tokenizer)
    if template is None:
        return otherwise.replace(chat.IMAGE, token).replace(chat.TEXT, text)
    return chat.render_turn(source.folder, tokenizer, template, token, text)


def roles(plan: GraphPlan) -> dict[str, dict[str, str]]:
    """Graphs made here call every tensor by its role; cache tensors are named by the task's ``cache``."""
    inputs = [spec.name for spec in plan.inputs if not spec.name.startswith("past_key_values.")]
    outputs = [name for name in plan.outputs if not name.startswith("present.")]
    return {"inputs": {name: name for name in inputs}, "outputs": {name: name for name in outputs}}
