"""Models that write text, as teacher or student.

Letters: A answer tokens, V vocabulary, T visual tokens, D their width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edge_rsvlm.export.finetuning.answers import answer_logits, place
from edge_rsvlm.export.finetuning.samples import Encoded, Encoder, Sample

TEXT_INPUTS = ("input_ids", "attention_mask", "mm_token_type_ids")


@dataclass(frozen=True)
class Outputs:
    """Float32; ``logits_AV`` is None where the image alone was looked at."""

    logits_AV: Tensor | None
    features_TD: Tensor
    """What the image became for the text model."""


class Generator:
    """A model with its encoder of samples; one in float32 computes in bfloat16 where a GPU does."""

    def __init__(self, model: Any, encoder: Encoder, device: torch.device) -> None:
        self.model, self.encoder, self._device = model, encoder, device
        self._mixed = device.type == "cuda" and model.dtype == torch.float32
        self._features: Tensor | None = None
        # A forward does not return its image features, and a second pass through the tower would be dear.
        inner = model.base_model
        inner.get_image_features = self._listening(inner.get_image_features)

    def __call__(self, encoded: Encoded) -> Outputs:
        """One sample; the image alone where it has no answer."""
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._mixed):
            if encoded.answer_tokens:
                logits = answer_logits(self.model, self.model, encoded, self._device)
            else:
                pixels = {name: tensor for name, tensor in encoded.inputs.items() if name not in TEXT_INPUTS}
                logits = None
                self.model.base_model.get_image_features(**place(pixels, self._device, self.model.dtype))
        features, self._features = self._features, None
        assert features is not None
        return Outputs(logits, features)

    def generate(self, sample: Sample, temperature: float, max_tokens: int) -> list[int]:
        """Tokens of an answer, greedy or drawn from all of them, with its end if it came to one.

        Penalties of the checkpoint's generation_config.json hold.
        """
        inputs = place(self.encoder.answering(sample, ()).inputs, self._device, self.model.dtype)
        draws = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
        with torch.inference_mode():
            sequences = self.model.generate(
                **inputs,
                **draws,
                do_sample=bool(temperature),
                max_new_tokens=max_tokens,
                num_beams=1,
                eos_token_id=list(self.encoder.eos_ids),
                pad_token_id=self.encoder.eos_ids[0],
            )
        ids: list[int] = sequences[0, inputs["input_ids"].shape[1] :].tolist()
        return ids

    def _listening(self, look: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(look)  # generate() reads the signature
        def heard(*args: Any, **named: Any) -> Any:
            output = look(*args, **named)
            self._features = torch.cat(tuple(output.pooler_output)).float()
            return output

        return heard


def without_end(encoded: Encoded) -> Encoded:
    """The same answer less its last token."""
    inputs = {name: t[:, :-1] if name in TEXT_INPUTS else t for name, t in encoded.inputs.items()}
    return Encoded(inputs, encoded.answer_tokens - 1)
