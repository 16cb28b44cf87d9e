"""Generative models in training: how they are loaded, and what they predict of an answer.

Letters: A tokens of an answer, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edge_rsvlm.export.checkpoint.reading import Checkpoint
from edge_rsvlm.export.families.base import Family
from edge_rsvlm.export.finetuning.loop import Process
from edge_rsvlm.export.finetuning.samples import Encoded, Sample


def load_model(checkpoint: Checkpoint, family: Family, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The checkpoint in evaluation mode: without dropout a run is the same however it was cut.

    Raises InputError for missing or unknown weights.
    """
    model_class: Any = family.model_class(checkpoint.config)
    checkpoint.weights(model_class)  # raises where from_pretrained would only warn, and make weights up
    model: nn.Module = model_class.from_pretrained(checkpoint.folder, dtype=dtype, local_files_only=True)
    return model.to(device).eval()


def quick_dtype(device: torch.device) -> torch.dtype:
    """Of weights that are not learnt."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def answer_logits(model: Any, base: Any, encoded: Encoded, device: torch.device) -> Tensor:
    """What ``model`` says of the answer's tokens, each seen with those before it: float32 [A, V].

    ``base`` is the transformers model, which ``model`` may wrap.
    """
    kept = {"logits_to_keep": encoded.answer_tokens + 1} if _keeps_logits(base) else {}
    logits = model(**place(encoded.inputs, device, base.dtype), **kept, use_cache=False).logits
    answer: Tensor = logits[0, -encoded.answer_tokens - 1 : -1].float()
    return answer


def answer_ids(encoded: Encoded) -> Tensor:
    """[A]"""
    return encoded.inputs["input_ids"][0, encoded.inputs["input_ids"].shape[1] - encoded.answer_tokens :]


def place(inputs: dict[str, Tensor], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """On ``device``, pixels in ``dtype``."""
    return {name: t.to(device, dtype if t.is_floating_point() else t.dtype) for name, t in inputs.items()}


def _keeps_logits(base: nn.Module) -> bool:
    return "logits_to_keep" in inspect.signature(base.forward).parameters


class AnswerLoss:
    """Gradients of the mean cross entropy of a batch's answer tokens.

    Samples go through the model one by one, so that images of any size and number of tiles make a batch.
    """

    def __init__(self, model: Any, encoder: Callable[[Any], Encoded], process: Process) -> None:
        self._model, self._encoder, self._process = model, encoder, process
        self._base = model.get_base_model()

    def __call__(self, share: Sequence[Sample]) -> Tensor:
        device = self._process.device
        batch = [self._encoder(sample) for sample in share]
        tokens = self._process.total(torch.tensor(float(sum(e.answer_tokens for e in batch)), device=device))
        loss = torch.zeros(1, device=device)
        for encoded in batch:
            logits_AV = answer_logits(self._model, self._base, encoded, device)
            part = nn.functional.cross_entropy(logits_AV, answer_ids(encoded).to(device), reduction="sum") / tokens
            part.backward()
            loss += part.detach()
        return loss
