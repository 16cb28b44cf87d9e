"""PEFT LoRA adapters: read from a folder, matched to a model by name, merged tensor by tensor.

``read_adapter`` checks the folder; ``resolve`` says which tensors of the model change, and how; ``merge`` (see
``adapters_updates`` for the formula) computes one of them, so that a checkpoint can be streamed. Tensors of the
adapter stay memory-mapped until they are needed. Every tensor of an adapter must be used, else InputError names it.
"""

from __future__ import annotations

import json
import math
import pickle
import re
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from edge_rsvlm.errors import InputError

CONFIG_NAME = "adapter_config.json"
TENSOR_NAMES = ("adapter_model.safetensors", "adapter_model.bin")
ORIGINAL_LLAVA_NAME = "non_lora_trainables.bin"
"""LLaVA's own training code keeps the projector, trained whole, in this file beside the adapter."""

NOT_MERGEABLE = {
    "alora_invocation_tokens": "activated LoRA (it changes only some tokens)",
    "arrow_config": "Arrow routing (it chooses among adapters for every token)",
    "kasa_config": "KaSA (it truncates the weights it was trained on)",
    "layer_replication": "layer replication (it makes a deeper model)",
    "megatron_config": "Megatron parallel layers",
    "monteclora_config": "Monte Carlo LoRA",
    "target_parameters": "LoRA on bare parameters (target_parameters)",
    "use_bdlora": "block-diagonal LoRA",
    "use_qalora": "QA-LoRA (it belongs to quantized weights)",
}
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Values of ``init_lora_weights`` that subtract something from the base before training."""
HARMLESS = frozenset(
    {
        "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying", "eva_config",
        "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
        "layers_to_transform", "loftq_config", "lora_bias", "lora_dropout", "lora_ga_config", "megatron_core",
        "merge_weights", "modules_to_save", "peft_version", "qalora_group_size", "revision", "runtime_config",
        "target_modules", "task_type", "use_dora", "velora_config",
    }
)  # fmt: skip
"""What else peft writes: how the adapter was trained, or what its tensors tell better."""

_FACTOR = re.compile(
    r"(?P<path>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(?:\.default)?"
    r"(?:\.(?P<leaf>weight|bias))?"
)
_ROWS = re.compile(r"(?P<path>.+)\.token_adapter\.trainable_tokens_delta(?:\.default)?")
_WHOLE = re.compile(r"\.(?P<wrapper>base_layer|modules_to_save(?:\.default)?)(?=\.)")
_ORIGINAL = ".original_module."
_PREFIX = "base_model.model."


class AdapterConfig(BaseModel):
    """What of ``adapter_config.json`` decides the numbers (peft 0.21 and older)."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    peft_type: str
    r: int = Field(gt=0)
    lora_alpha: float
    use_rslora: bool = False
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    trainable_token_indices: tuple[int, ...] | dict[str, tuple[int, ...]] | None = None

    def rank(self, path: str) -> int:
        return _by_pattern(self.rank_pattern, path, self.r)

    def scale(self, path: str) -> float:
        """s of W + s B A for the module ``path``, by the name it had in training."""
        rank = self.rank(path)
        return _by_pattern(self.alpha_pattern, path, self.lora_alpha) / (math.sqrt(rank) if self.use_rslora else rank)

    def token_rows(self, path: str) -> tuple[int, ...]:
        """Which rows of the embedding ``path`` were trained; empty where the config does not say."""
        indices = self.trainable_token_indices or ()
        if not isinstance(indices, dict):
            return indices
        return next((rows for name, rows in indices.items() if f".{path}".endswith(f".{name}")), ())


def _by_pattern(patterns: dict[str, Any] | None, path: str, default: Any) -> Any:
    """The first pattern that matches the end of ``path`` from a dot on, or all of it, decides (as in peft)."""
    return next((value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", path)), default)


@dataclass
class Factors:
    """The tensors of a LoRA on one module, as stored."""

    parts: dict[str, Tensor] = field(default_factory=dict)

    @property
    def embedding(self) -> bool:
        return "lora_embedding_A" in self.parts

    @property
    def pair(self) -> tuple[Tensor, Tensor]:
        stem = "lora_embedding_" if self.embedding else "lora_"
        return self.parts[f"{stem}A"], self.parts[f"{stem}B"]


@dataclass(frozen=True)
class Whole:
    """A tensor stored whole. ``trained`` is False for the base's own weight, which peft saves beside a LoRA on it."""

    values: Tensor
    trained: bool


@dataclass(frozen=True)
class Adapter:
    """One adapter, with its tensors by the names of the modules (``factors``, ``rows``) and tensors (``whole``) that
    they had in training."""

    folder: Path
    weight: float
    config: AdapterConfig
    factors: dict[str, Factors]
    rows: dict[str, Tensor]
    whole: dict[str, Whole]

    @property
    def name(self) -> str:
        return str(self.folder)


def read_adapter(folder: Path, weight: float = 1.0) -> Adapter:
    """Read and check an adapter as ``save_pretrained`` of peft wrote it.

    Raises InputError where it is not LoRA, uses a variant that cannot be merged, or has tensors that fit nowhere.
    """
    if not math.isfinite(weight):
        raise InputError(f"the weight {weight} of {folder} is not a number", fix="give a finite weight, such as 1.0")
    config = _read_config(folder)
    adapter = Adapter(folder, weight, config, {}, {}, {})
    tensors = {key.removeprefix(_PREFIX): values for key, values in _read_tensors(folder).items()}
    for path, values in tensors.items():
        _sort_in(adapter, path, values)
    _drop_originals(adapter)
    for path, factors in adapter.factors.items():
        _check_factors(adapter, path, factors)
    return adapter


def _read_config(folder: Path) -> AdapterConfig:
    path = folder / CONFIG_NAME
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        inside = sorted(p.parent.name for p in folder.glob(f"*/{CONFIG_NAME}"))
        fix = f"name one of its adapters: {', '.join(inside)}" if inside else "name the folder that peft saved"
        raise InputError(f"no {CONFIG_NAME} in {folder}", fix=fix) from exc
    except ValueError as exc:
        raise InputError(f"{path} is not JSON: {exc}", fix="save the adapter again with peft") from exc
    if not isinstance(raw, dict):
        raise InputError(f"{path} is not a JSON object", fix="save the adapter again with peft")
    _refuse_other_kinds(path, raw)
    try:
        config = AdapterConfig.model_validate(raw)
        for pattern in (*(config.rank_pattern or ()), *(config.alpha_pattern or ())):
            re.compile(pattern)
    except (ValidationError, re.error) as exc:
        raise InputError(f"{path} is not a LoRA config: {exc}", fix="save the adapter again with peft") from exc
    return config


def _refuse_other_kinds(path: Path, raw: dict[str, Any]) -> None:
    elsewhere = "merge it with peft's own merge_and_unload, save that model, and export it without an adapter"
    kind = raw.get("peft_type")
    if kind != "LORA":
        raise InputError(f"{path}: '{kind}' adapters are not supported, only LoRA", fix=elsewhere)
    for name, meaning in NOT_MERGEABLE.items():
        if raw.get(name):
            raise InputError(
                f"{path}: {meaning} cannot be merged here", fix="train a plain LoRA, rsLoRA or DoRA adapter"
            )
    start = str(raw.get("init_lora_weights", "")).lower()
    if start.startswith(CHANGES_BASE):
        raise InputError(
            f"{path}: '{start}' initialisation changed the weights that the adapter belongs to",
            fix="save it with peft's save_pretrained(..., path_initial_model_for_weight_conversion=...)",
        )
    known = HARMLESS | NOT_MERGEABLE.keys() | AdapterConfig.model_fields.keys()
    unknown = sorted(name for name, value in raw.items() if value and name not in known)
    if unknown:
        raise InputError(
            f"{path} says what this version does not know: {', '.join(unknown)}",
            fix=f"{elsewhere}; or remove the entry if it does not change the weights",
        )


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = next((folder / name for name in TENSOR_NAMES if (folder / name).is_file()), None)
    if path is None:
        raise InputError(f"none of {', '.join(TENSOR_NAMES)} in {folder}", fix="save the adapter again with peft")
    extra = folder / ORIGINAL_LLAVA_NAME
    tensors = _load(path) | (_load(extra) if extra.is_file() else {})
    for key, values in tensors.items():
        if not isinstance(values, Tensor) or not values.numel():
            raise InputError(
                f"'{key}' in {path} is empty",
                fix="gather the shards before saving (ZeRO-3: GatheredParameters; FSDP: summon_full_params)",
            )
    return tensors


def _load(path: Path) -> dict[str, Any]:
    """Tensors by name, mapped into memory rather than read."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (SafetensorError, pickle.UnpicklingError, OSError, RuntimeError, EOFError) as exc:
        raise InputError(f"cannot read {path}: {exc}", fix="copy the file again, or save it as safetensors") from exc
    if not isinstance(loaded, dict):
        raise InputError(f"{path} does not hold tensors by name", fix="save the adapter again with peft")
    return loaded


def _sort_in(adapter: Adapter, path: str, values: Tensor) -> None:
    if match := _FACTOR.fullmatch(path):
        module = match["path"].replace(".base_layer.", ".").removesuffix(".base_layer")
        part = match["part"] + (".bias" if match["leaf"] == "bias" else "")
        adapter.factors.setdefault(module, Factors()).parts[part] = values
    elif match := _ROWS.fullmatch(path):
        adapter.rows[match["path"]] = values
    else:
        own_weight = path.endswith(".base_layer.weight")
        adapter.whole[_WHOLE.sub("", path)] = Whole(values, trained=not own_weight)


def _drop_originals(adapter: Adapter) -> None:
    """peft saves what a module was before, too, in some settings; the trained tensor takes its place."""
    for path in [p for p in adapter.whole if _ORIGINAL in p and p.replace(_ORIGINAL, ".") in adapter.whole]:
        del adapter.whole[path]


def _check_factors(adapter: Adapter, path: str, factors: Factors) -> None:
    stem = "lora_embedding_" if factors.embedding else "lora_"
    allowed = {f"{stem}A", f"{stem}B", "lora_magnitude_vector", "lora_B.bias"}
    if not {f"{stem}A", f"{stem}B"} <= factors.parts.keys() <= allowed:
        raise InputError(
            f"{adapter.folder}: the LoRA on '{path}' is no pair of A and B: {', '.join(sorted(factors.parts))}",
            fix="save the adapter again with peft",
        )
    rank, found = adapter.config.rank(path), factors.pair[0].shape[0]
    if rank != found:
        raise InputError(
            f"{adapter.folder}: the LoRA on '{path}' has rank {found}, but {CONFIG_NAME} says {rank}",
            fix=f"correct r or rank_pattern in {CONFIG_NAME}: the scale depends on it",
        )
