"""The stages' artifacts as one checkpoint: a config, a model class, and every tensor by the names of that class.

With them the default model goes through the steps of an export, and through fine-tuning, like any other family's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from edge_rsvlm.errors import InputError
from edge_rsvlm.export import artifact
from edge_rsvlm.export.checkpoint.reading import Checkpoint, LazyTensor, list_safetensors
from edge_rsvlm.export.default.describe import THRESHOLDS_NAME
from edge_rsvlm.export.default.model.change import ChangeHead
from edge_rsvlm.export.default.model.decoder import Captioner, DecoderConfig
from edge_rsvlm.export.default.model.detect import DetectHead
from edge_rsvlm.export.default.model.encoder import Encoder
from edge_rsvlm.export.default.stages import caption, change, joint

STAGES = (joint.NAME, change.NAME, caption.NAME)
OF_JOINT = ("encoder.", "detect.")
"""What the joint stage trains for the bundle; its change head is replaced, its scene labels only help the encoder."""
WORDS = "captioner.decoder.embed_tokens.weight"


class DefaultConfig(PretrainedConfig):
    model_type = "edge_rsvlm"

    def __init__(self, vocabulary: int = 2048, **others: Any) -> None:
        self.vocabulary = vocabulary
        super().__init__(**others)


class DefaultModel(PreTrainedModel):
    """Encoder and heads. ``forward`` is what a fine-tuning of captions needs; the graphs call the parts."""

    config_class = DefaultConfig

    def __init__(self, config: DefaultConfig) -> None:
        super().__init__(config)
        self.encoder, self.detect, self.change = Encoder(), DetectHead(), ChangeHead()
        self.captioner = Captioner(DecoderConfig(config.vocabulary, dropout=0.0))
        self.post_init()

    @classmethod
    def from_pretrained(
        cls, folder: Path, *, dtype: torch.dtype = torch.float32, local_files_only: bool = True
    ) -> DefaultModel:
        """The model of a folder of stages, in eval mode."""
        checkpoint = open_stages(folder)
        model = cls(checkpoint.config)
        tensors = checkpoint.weights(cls)
        model.load_state_dict({name: tensor.read() for name, tensor in tensors.items()})
        return model.to(dtype).eval()

    def forward(
        self, c5: Tensor, input_ids: Tensor, logits_to_keep: int = 0, use_cache: bool = False
    ) -> CausalLMOutput:
        """Logits [N, T, V] of the words after c5 [N, 320, h, w], of the last ``logits_to_keep`` (0: all)."""
        decoder = self.captioner.decoder
        embeds = torch.cat([self.captioner.prefix(c5), decoder.embed(input_ids)], dim=1)
        order = torch.arange(embeds.shape[1], device=embeds.device)
        hidden, _ = decoder(embeds, order.expand(len(embeds), -1), order[None, :] <= order[:, None])
        return CausalLMOutput(logits=decoder.logits(hidden[:, -(logits_to_keep or input_ids.shape[1]) :]))


def is_stages(folder: Path) -> bool:
    """Whether ``folder`` holds the default model as ``train`` leaves it."""
    return all((folder / stage / artifact.MANIFEST_NAME).is_file() for stage in STAGES)


def open_stages(folder: Path) -> Checkpoint:
    """InputError when a stage lacks a file, or its weights are not a whole safetensors file."""
    needed = (*(folder / stage / artifact.WEIGHTS_NAME for stage in STAGES), _tokenizer(folder))
    if missing := [str(path) for path in needed if not path.is_file()]:
        raise InputError(f"{missing[0]} is not there", fix="copy the stages whole, or train them again")
    stored = {stage: list_safetensors(folder / stage / artifact.WEIGHTS_NAME) for stage in STAGES}
    tensors: dict[str, LazyTensor] = {
        name: tensor for name, tensor in stored[joint.NAME].items() if name.startswith(OF_JOINT)
    }
    tensors |= {f"change.{name}": tensor for name, tensor in stored[change.NAME].items()}
    tensors |= {f"captioner.{name}": tensor for name, tensor in stored[caption.NAME].items()}
    config = DefaultConfig(vocabulary=tensors[WORDS].shape[0] if WORDS in tensors else 0)
    files = (
        *(folder / stage / name for stage in STAGES for name in (artifact.MANIFEST_NAME, artifact.WEIGHTS_NAME)),
        _tokenizer(folder), folder / THRESHOLDS_NAME,
    )  # fmt: skip
    return Checkpoint(folder, config, files, tensors)


def _tokenizer(folder: Path) -> Path:
    return folder / caption.NAME / caption.TOKENIZER_NAME
