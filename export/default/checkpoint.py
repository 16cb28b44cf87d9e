"""The stages' artifacts as one checkpoint: a config, a model class, and every tensor by the names of that class.

With them the default model goes through the steps of an export, and through fine-tuning, like any other family's.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from edge_rsvlm.errors import InputError
from edge_rsvlm.export import artifact
from edge_rsvlm.export.checkpoint.reading import Checkpoint, LazyTensor, list_safetensors
from edge_rsvlm.export.default.describe import THRESHOLDS_NAME
from edge_rsvlm.export.default.model.change import ChangeHead
from edge_rsvlm.export.default.model.decoder import Captioner, Decoder, DecoderConfig
from edge_rsvlm.export.default.model.detect import DetectHead
from edge_rsvlm.export.default.model.encoder import Encoder
from edge_rsvlm.export.default.stages import caption, change, joint

STAGES = (joint.NAME, change.NAME, caption.NAME)
OF_JOINT = ("encoder.", "detect.")
"""What the joint stage trains for the bundle; its change head is replaced, its scene labels only help the encoder."""
WORDS = "captioner.decoder.embed_tokens.weight"
Model = TypeVar("Model", bound=nn.Module)


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
        return load(cls, open_stages(folder)).to(dtype)

    def forward(
        self, c5: Tensor, input_ids: Tensor, logits_to_keep: int = 0, use_cache: bool = False
    ) -> CausalLMOutput:
        """Logits [N, T, V] of the words after c5 [N, 320, h, w], of the last ``logits_to_keep`` (0: all)."""
        return logits_after(self.captioner.prefix(c5), self.captioner.decoder, input_ids, logits_to_keep)


def logits_after(prefix: Tensor, decoder: Decoder, input_ids: Tensor, logits_to_keep: int) -> CausalLMOutput:
    """Logits [N, T, V] of the words after visual tokens [N, P, D], of the last ``logits_to_keep`` (0: all)."""
    embeds = torch.cat([prefix, decoder.embed(input_ids)], dim=1)
    order = torch.arange(embeds.shape[1], device=embeds.device)
    hidden, _ = decoder(embeds, order.expand(len(embeds), -1), order[None, :] <= order[:, None])
    return CausalLMOutput(logits=decoder.logits(hidden[:, -(logits_to_keep or input_ids.shape[1]) :]))


def load(model_class: type[Model], checkpoint: Checkpoint) -> Model:
    """The model with its weights in float32, in eval mode."""
    model = model_class(checkpoint.config)
    tensors = checkpoint.weights(model_class)
    model.load_state_dict({name: tensor.read() for name, tensor in tensors.items()})
    return model.eval()


def is_stages(folder: Path, stages: Sequence[str] = STAGES) -> bool:
    """Whether ``folder`` holds these stages, by default those of the default model as ``train`` leaves it."""
    return all((folder / stage / artifact.MANIFEST_NAME).is_file() for stage in stages)


def open_stages(folder: Path) -> Checkpoint:
    """InputError when a stage lacks a file, or its weights are not a whole safetensors file."""
    stored = stored_tensors(folder, STAGES, (_tokenizer(folder),))
    tensors: dict[str, LazyTensor] = {
        name: tensor for name, tensor in stored[joint.NAME].items() if name.startswith(OF_JOINT)
    }
    tensors |= {f"change.{name}": tensor for name, tensor in stored[change.NAME].items()}
    tensors |= {f"captioner.{name}": tensor for name, tensor in stored[caption.NAME].items()}
    config = DefaultConfig(vocabulary=tensors[WORDS].shape[0] if WORDS in tensors else 0)
    return Checkpoint(folder, config, files_of(folder, STAGES, (_tokenizer(folder),)), tensors)


def stored_tensors(folder: Path, stages: Sequence[str], texts: Sequence[Path]) -> dict[str, dict[str, LazyTensor]]:
    """Tensors of each stage by name; InputError where its weights or one of ``texts`` are missing or broken."""
    needed = (*(folder / stage / artifact.WEIGHTS_NAME for stage in stages), *texts)
    if missing := [str(path) for path in needed if not path.is_file()]:
        raise InputError(f"{missing[0]} is not there", fix="copy the stages whole, or train them again")
    return {stage: list_safetensors(folder / stage / artifact.WEIGHTS_NAME) for stage in stages}


def files_of(folder: Path, stages: Sequence[str], texts: Sequence[Path]) -> tuple[Path, ...]:
    """All that an export reads."""
    names = artifact.MANIFEST_NAME, artifact.WEIGHTS_NAME
    return *(folder / stage / name for stage in stages for name in names), *texts, folder / THRESHOLDS_NAME


def _tokenizer(folder: Path) -> Path:
    return folder / caption.NAME / caption.TOKENIZER_NAME
