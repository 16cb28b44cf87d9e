"""Models as hubs ship them for llama.cpp: a language model and the projector that sees for it, two GGUF files.

What their metadata means: ggml-org/ggml, docs/gguf.md; of projectors ggml-org/llama.cpp, tools/mtmd/clip-impl.h.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import gguf

from edge_rsvlm.errors import InputError, UsageError
from edge_rsvlm.export.families.image_processors import Steps

PROJECTOR_NAME = re.compile("mmproj", re.IGNORECASE)
"""In the name of a projector, by the hubs' custom."""
SPLIT = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
PROJECTOR_ARCHITECTURE = "clip"
CONFUSED = ("mlp", "mlp_norm", "ldp", "ldpv2")
"""Projectors whose towers libmtmd confuses where these have a class token (ggml-org/llama.cpp#25814)."""
CLASS_TOKEN = "v.class_embd"
ANY_SIZE = ("qwen2vl_merger", "qwen2.5vl_merger", "qwen3vl_merger", "pixtral", "lfm2", "kimivl")
"""Projectors that take images of any size, in units of joined patches."""
LEAST_UNITS = 8
DEFAULT_MERGE = 2
AGAIN = "copy or download the file again"


@dataclass(frozen=True)
class GgufSource:
    """One file and its metadata, but for the vocabulary."""

    path: Path
    fields: dict[str, Any]
    types: Counter[str]
    """Numbers stored as each type."""
    tensors: frozenset[str]

    @property
    def architecture(self) -> str:
        return str(self.fields.get("general.architecture", ""))

    @property
    def quantization(self) -> str:
        """As llama.cpp calls it; where the file does not say, the type of most of its numbers."""
        try:
            return gguf.LlamaFileType(self.fields["general.file_type"]).name.partition("_")[2]
        except (KeyError, ValueError):
            return self.types.most_common(1)[0][0]

    def own(self, key: str, otherwise: Any = None) -> Any:
        """A field of the architecture's."""
        return self.fields.get(f"{self.architecture}.{key}", otherwise)


@dataclass(frozen=True)
class Pair:
    model: GgufSource
    projector: GgufSource

    @property
    def kind(self) -> str:
        """Of the projector."""
        fields = self.projector.fields
        return str(fields.get("clip.projector_type") or fields.get("clip.vision.projector_type") or "not named")

    @property
    def bytes(self) -> int:
        return sum(part.path.stat().st_size for part in (self.model, self.projector))

    @cached_property
    def cache_bytes_per_token(self) -> int:
        """Of keys and values in half precision, in every layer."""
        model = self.model
        sizes = ("block_count", "attention.head_count", "embedding_length")
        layers, heads, width = (model.own(size, 0) for size in sizes)
        per_layer = model.own("attention.head_count_kv", heads)
        heads_kv = sum(per_layer) if isinstance(per_layer, list) else layers * per_layer
        most = max(heads) if isinstance(heads, list) else heads
        lengths = [model.own(f"attention.{part}_length", width // max(most, 1)) for part in ("key", "value")]
        return int(2 * heads_kv * sum(lengths))

    def image_steps(self, most_pixels: int) -> Steps:
        """What makes an image one that libmtmd takes as it is, or makes smaller itself; of ``most_pixels`` where the
        projector takes any size."""
        fields = self.projector.fields
        image_px, patch_px = (int(fields.get(f"clip.vision.{name}_size", 0)) for name in ("image", "patch"))
        if not image_px or not patch_px:
            raise InputError(f"{self.projector.path}: does not say which images it takes", fix=AGAIN)
        if self.kind == "idefics3":
            longest = int(fields.get("clip.vision.preproc_image_size", image_px))
            return [
                {"op": "resize_longest", "px": longest, "even": True, "filter": "lanczos3"},
                {"op": "resize_to_tiles", "px": image_px, "filter": "lanczos3"},
            ]
        if self.kind not in ANY_SIZE:
            return [{"op": "resize_longest", "px": image_px, "filter": "bicubic"}]
        named = ("clip.vision.spatial_merge_size", "clip.vision.projector.scale_factor")
        unit_px = patch_px * int(next((fields[name] for name in named if name in fields), DEFAULT_MERGE))
        return [{
            "op": "smart_resize", "multiple": unit_px, "min_pixels": LEAST_UNITS * unit_px**2,
            "max_pixels": most_pixels, "filter": "bicubic",
        }]  # fmt: skip


def gguf_files(folder: Path) -> list[Path]:
    """The GGUF files of a folder."""
    return sorted(path for path in folder.glob("*.gguf") if path.is_file())


def read_pair(folder: Path) -> Pair:
    """The pair in ``folder``. UsageError where files are missing, too many or of a kind that cannot be used,
    InputError where one is broken."""
    projectors = [path for path in gguf_files(folder) if PROJECTOR_NAME.search(path.name)]
    models = [path for path in gguf_files(folder) if path not in projectors]
    if split := [path.name for path in models if SPLIT.search(path.name)]:
        raise UsageError(
            f"{folder}: the model is split into {len(split)} files",
            fix=f"join them: llama-gguf-split --merge {split[0]} model.gguf",
        )
    if not projectors and models:
        raise UsageError(
            f"{folder} has no projector (mmproj*.gguf): a language model alone sees nothing",
            fix="put the mmproj file that was published with the model beside it",
        )
    pair = Pair(read_source(_one(folder, models, "language model")), read_source(_one(folder, projectors, "projector")))
    _check(pair)
    return pair


def _one(folder: Path, found: Sequence[Path], what: str) -> Path:
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise UsageError(f"{folder}: one {what} is wanted, and there are: {names}", fix="leave one in the folder")
    return found[0]


def _check(pair: Pair) -> None:
    model, projector = pair.model, pair.projector
    if model.architecture == PROJECTOR_ARCHITECTURE or projector.architecture != PROJECTOR_ARCHITECTURE:
        wrong = model if model.architecture == PROJECTOR_ARCHITECTURE else projector
        raise UsageError(
            f"{wrong.path}: holds '{wrong.architecture}', which is not what its name says",
            fix="name the projector mmproj.gguf, and the language model otherwise",
        )
    if model.fields.get("split.count", 1) > 1:
        raise UsageError(
            f"{model.path}: is one of {model.fields['split.count']} parts", fix="join them by llama-gguf-split --merge"
        )
    if not projector.fields.get("clip.has_vision_encoder", False):
        raise UsageError(f"{projector.path}: has no image encoder", fix="use the projector for images")
    if pair.kind in CONFUSED and CLASS_TOKEN in projector.tensors:
        raise UsageError(
            f"{projector.path}: llama.cpp confuses the patches of CLIP, and answers would be far off",
            fix="export the model's own checkpoint: target gguf keeps its image encoder in ONNX",
        )


def read_source(path: Path) -> GgufSource:
    """InputError for a file that is no GGUF, or not all of one."""
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items() if not _of_vocabulary(name, field)}
    except (ValueError, IndexError, KeyError, OSError, OverflowError, MemoryError) as exc:
        raise InputError(f"{path}: no GGUF file that can be read ({exc})", fix=AGAIN) from exc
    types: Counter[str] = Counter()
    for tensor in reader.tensors:
        types[tensor.tensor_type.name] += int(tensor.n_elements)
    if not types:
        raise InputError(f"{path}: a GGUF file without tensors", fix=AGAIN)
    return GgufSource(path, fields, types, frozenset(tensor.name for tensor in reader.tensors))


def _of_vocabulary(name: str, field: Any) -> bool:
    """Lists as long as the vocabulary."""
    return name.startswith("tokenizer.") and field.types[:1] == [gguf.GGUFValueType.ARRAY]
