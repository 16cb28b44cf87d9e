"""What an export must know of a model family.

A family reads the checkpoint's own config with the real transformers classes, wraps the towers so that they trace,
and describes inputs, prompts and decoding for the manifest. It never touches weights: graphs are traced with the
tensors left out, and filled from the checkpoint file by file.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class GraphInput:
    """``shape`` mixes fixed sizes and names of dynamic ones."""

    name: str
    shape: tuple[int | str, ...]
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class GraphPlan:
    """One graph to trace.

    ``wrap`` makes the module to trace out of the transformers model (whose tensors may have no data); its ``forward``
    takes the inputs in order and returns a tensor, or a tuple of them, in the order of ``outputs``. ``sizes`` are
    example sizes of the dynamic dimensions, all different and none 0 or 1. Initialisers of the traced graph must be
    parameters or buffers of the transformers model, or small constants computed from the config.
    """

    name: str
    wrap: Callable[[nn.Module], nn.Module]
    inputs: tuple[GraphInput, ...]
    outputs: tuple[str, ...]
    sizes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """A checkpoint folder as ``save_pretrained`` of transformers 4.x or 5.x wrote it, and its parsed config."""

    folder: Path
    config: PretrainedConfig


@dataclass(frozen=True)
class Description:
    """What goes into the bundle beside the graphs.

    ``graphs`` maps graph names to ``{"inputs": {role: name}, "outputs": {role: name}}`` of the manifest; ``tasks``
    holds the manifest's tasks by verb, without ``memory``; ``files`` are small files by name (tokenizer.json,
    answers.txt). ``facts`` are fields of the manifest (name, licence, training_data ...) where the checkpoint tells
    them; the recipe's own words win.
    """

    graphs: dict[str, dict[str, dict[str, str]]]
    tasks: dict[str, dict[str, Any]]
    files: dict[str, bytes]
    facts: dict[str, Any] = field(default_factory=dict)


class Family(ABC):
    """One family. Stateless."""

    name: str
    model_types: tuple[str, ...]
    """Values of ``model_type`` in config.json that this family reads."""

    @abstractmethod
    def model_class(self, config: PretrainedConfig) -> type[nn.Module]:
        """The transformers class whose state dict the checkpoint holds."""

    @abstractmethod
    def graphs(self, source: Source) -> tuple[GraphPlan, ...]:
        """Every graph of the bundle."""

    @abstractmethod
    def describe(self, source: Source) -> Description:
        """Manifest fragments and small files."""

    @abstractmethod
    def reference(self, source: Source, model: nn.Module, image_HWC: NDArray[np.uint8], text: str) -> Arrays:
        """What transformers itself computes of one image and one text, by names that say what it is.

        Uses the family's own processors and ``model`` as published, never our wrappers: parity compares the bundle's
        answers with it. Generative families give ``tokens`` (16 greedy tokens) and ``logits`` (of the first), dual
        encoders ``image_embedding``, ``text_embedding`` (of unit length) and ``score``, detectors ``boxes`` and
        ``scores`` of the query, answer classifiers ``logits``.
        """
