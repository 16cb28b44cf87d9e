"""The stages' artifacts as one checkpoint, as ``edge_rsvlm.export.default.checkpoint`` has those of the other model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from edge_rsvlm.export.checkpoint.reading import Checkpoint, LazyTensor
from edge_rsvlm.export.default import checkpoint
from edge_rsvlm.export.default.model.boxes import BoxHead
from edge_rsvlm.export.default.model.change import ChangeHead
from edge_rsvlm.export.default.model.decoder import DecoderConfig
from edge_rsvlm.export.default.model.dense import DenseHead
from edge_rsvlm.export.default.model.encoder import Encoder
from edge_rsvlm.export.default.model.language import Language
from edge_rsvlm.export.default.model.pyramid import Pyramid
from edge_rsvlm.export.default.stages import change, language, match, vision
from edge_rsvlm.export.default.stages.match import Match

STAGES = (vision.NAME, change.NAME, match.NAME, language.NAME)
TEXTS = (language.TOKENIZER_NAME, language.VOCABULARY_NAME, language.ASKED_NAME)
"""Files of the language stage that go into the bundle."""
OF_VISION = ("encoder.", "pyramid.", "boxes.", "dense.")
"""What the vision stage trains for the bundle: its change head is replaced, the text encoder gives the vectors of its
queries and labels, and its scene labels only help the encoder."""
WORDS = "language.decoder.embed_tokens.weight"


class OpenConfig(PretrainedConfig):
    model_type = "edge_rsvlm_open"

    def __init__(self, vocabulary: int = 2048, **others: Any) -> None:
        self.vocabulary = vocabulary
        super().__init__(**others)


class OpenModel(PreTrainedModel):
    """Encoder, heads, text encoder and decoder. ``forward`` writes; the graphs call the parts."""

    config_class = OpenConfig

    def __init__(self, config: OpenConfig) -> None:
        super().__init__(config)
        self.encoder, self.pyramid, self.change = Encoder(), Pyramid(), ChangeHead()
        self.boxes, self.dense = BoxHead(), DenseHead()
        self.match = Match(config.vocabulary, dropout=0.0)
        self.language = Language(DecoderConfig(config.vocabulary, dropout=0.0))
        self.post_init()

    @classmethod
    def from_pretrained(
        cls, folder: Path, *, dtype: torch.dtype = torch.float32, local_files_only: bool = True
    ) -> OpenModel:
        """The model of a folder of stages, in eval mode."""
        return checkpoint.load(cls, open_stages(folder)).to(dtype)

    def forward(self, tokens: Tensor, input_ids: Tensor, logits_to_keep: int = 0) -> CausalLMOutput:
        """Logits [N, T, V] of the words after visual tokens [N, 704, h, w], of the last ``logits_to_keep`` (0: all)."""
        prefix = self.language.prefix(tokens)
        return checkpoint.logits_after(prefix, self.language.decoder, input_ids, logits_to_keep)


def is_stages(folder: Path) -> bool:
    """Whether ``folder`` holds the stages of this model."""
    return checkpoint.is_stages(folder, STAGES)


def open_stages(folder: Path) -> Checkpoint:
    """InputError when a stage lacks a file, or its weights are not a whole safetensors file."""
    texts = [folder / language.NAME / name for name in TEXTS]
    stored = checkpoint.stored_tensors(folder, STAGES, texts)
    tensors: dict[str, LazyTensor] = {
        name: tensor for name, tensor in stored[vision.NAME].items() if name.startswith(OF_VISION)
    }
    for stage in STAGES[1:]:
        tensors |= {f"{stage}.{name}": tensor for name, tensor in stored[stage].items()}
    config = OpenConfig(vocabulary=tensors[WORDS].shape[0] if WORDS in tensors else 0)
    return Checkpoint(folder, config, checkpoint.files_of(folder, STAGES, texts), tensors)
