"""The stages' artifacts as one checkpoint: a config, a model class, and every tensor by the names of that class.

With them the default model goes through the steps of an export, and through fine-tuning, like any other family's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from edge_rsvlm.errors import InputError
from edge_rsvlm.export import artifact
from edge_rsvlm.export.checkpoint.reading import Checkpoint, LazyTensor, list_safetensors
from edge_rsvlm.export.default.data.objects import CLASSES
from edge_rsvlm.export.default.describe import THRESHOLDS_NAME
from edge_rsvlm.export.default.model.appearance import Appearance
from edge_rsvlm.export.default.model.boxes import BoxHead
from edge_rsvlm.export.default.model.change import ChangeHead
from edge_rsvlm.export.default.model.decoder import DecoderConfig
from edge_rsvlm.export.default.model.dense import DenseHead
from edge_rsvlm.export.default.model.encoder import Encoder
from edge_rsvlm.export.default.model.language import Language
from edge_rsvlm.export.default.model.pyramid import Pyramid
from edge_rsvlm.export.default.model.refer import Refer
from edge_rsvlm.export.default.stages import appearance, language, match, refer, vision
from edge_rsvlm.export.default.stages.match import Match
from edge_rsvlm.tasks.refer import feature_count

STAGES = (vision.NAME, appearance.NAME, match.NAME, language.NAME, refer.NAME)
TEXTS = (language.TOKENIZER_NAME, language.VOCABULARY_NAME)
"""Files of the language stage that go into the bundle."""
OF_VISION = ("encoder.", "pyramid.", "boxes.", "dense.", "change.")
"""What the vision stage trains for the bundle: the text encoder gives the vectors of its queries and labels, and its
scene labels only help the encoder."""
WORDS = "language.decoder.embed_tokens.weight"
Model = TypeVar("Model", bound=nn.Module)


class DefaultConfig(PretrainedConfig):
    model_type = "edge_rsvlm"

    def __init__(self, vocabulary: int = 2048, **others: Any) -> None:
        self.vocabulary = vocabulary
        super().__init__(**others)


class DefaultModel(PreTrainedModel):
    """Encoder, heads, text encoder and decoder. ``forward`` is what a fine-tuning of the decoder needs; the graphs call
    the parts."""

    config_class = DefaultConfig

    def __init__(self, config: DefaultConfig) -> None:
        super().__init__(config)
        self.encoder, self.pyramid, self.change = Encoder(), Pyramid(), ChangeHead()
        self.boxes, self.dense, self.appearance = BoxHead(), DenseHead(), Appearance()
        self.match = Match(config.vocabulary, dropout=0.0)
        self.language = Language(DecoderConfig(config.vocabulary, dropout=0.0))
        self.refer = Refer(config.vocabulary, feature_count(len(CLASSES)))
        self.post_init()

    @classmethod
    def from_pretrained(
        cls, folder: Path, *, dtype: torch.dtype = torch.float32, local_files_only: bool = True
    ) -> DefaultModel:
        """The model of a folder of stages, in eval mode."""
        return load(cls, open_stages(folder)).to(dtype)

    def forward(
        self, tokens: Tensor, input_ids: Tensor, logits_to_keep: int = 0, use_cache: bool = False
    ) -> CausalLMOutput:
        """Logits [N, T, V] of the words after visual tokens [N, 704, h, w], of the last ``logits_to_keep`` (0: all)."""
        embeds = torch.cat([self.language.prefix(tokens), self.language.decoder.embed(input_ids)], dim=1)
        order = torch.arange(embeds.shape[1], device=embeds.device)
        hidden, _ = self.language.decoder(embeds, order.expand(len(embeds), -1), order[None, :] <= order[:, None])
        kept = logits_to_keep or input_ids.shape[1]
        return CausalLMOutput(logits=self.language.decoder.logits(hidden[:, -kept:]))


def load(model_class: type[Model], checkpoint: Checkpoint) -> Model:
    """The model with its weights in float32, in eval mode."""
    model = model_class(checkpoint.config)
    tensors = checkpoint.weights(model_class)
    model.load_state_dict({name: tensor.read() for name, tensor in tensors.items()})
    return model.eval()


def is_stages(folder: Path) -> bool:
    """Whether ``folder`` holds the stages of the default model, as ``train`` leaves them."""
    return all((folder / stage / artifact.MANIFEST_NAME).is_file() for stage in STAGES)


def open_stages(folder: Path) -> Checkpoint:
    """InputError when a stage lacks a file, or its weights are not a whole safetensors file."""
    texts = [folder / language.NAME / name for name in TEXTS]
    needed = (*(folder / stage / artifact.WEIGHTS_NAME for stage in STAGES), *texts)
    if missing := [str(path) for path in needed if not path.is_file()]:
        raise InputError(f"{missing[0]} is not there", fix="copy the stages whole, or train them again")
    stored = {stage: list_safetensors(folder / stage / artifact.WEIGHTS_NAME) for stage in STAGES}
    tensors: dict[str, LazyTensor] = {
        name: tensor for name, tensor in stored[vision.NAME].items() if name.startswith(OF_VISION)
    }
    for stage in STAGES[1:]:
        tensors |= {f"{stage}.{name}": tensor for name, tensor in stored[stage].items()}
    config = DefaultConfig(vocabulary=tensors[WORDS].shape[0] if WORDS in tensors else 0)
    names = artifact.MANIFEST_NAME, artifact.WEIGHTS_NAME
    files = *(folder / stage / name for stage in STAGES for name in names), *texts, folder / THRESHOLDS_NAME
    return Checkpoint(folder, config, files, tensors)
