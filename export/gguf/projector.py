"""The vision of a checkpoint as a projector file (mmproj) of llama.cpp, for families that libmtmd knows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from edge_rsvlm.errors import UsageError
from edge_rsvlm.export.families.base import Family, Source
from edge_rsvlm.export.families.chat import IMAGE
from edge_rsvlm.export.families.image_processors import Steps, load_image_processor, normalisation, prepare_steps
from edge_rsvlm.export.gguf import vision_idefics3, vision_llava, vision_qwen2_vl
from edge_rsvlm.export.gguf.files import Precision, write_file
from edge_rsvlm.export.gguf.towers import VisionWriter

if TYPE_CHECKING:
    import gguf

    from edge_rsvlm.export.graphs.external_data import Progress
    from edge_rsvlm.export.steps.merge_lora import ModelWeights

BY_FAMILY: dict[str, VisionWriter] = {
    "idefics3": vision_idefics3.WRITER,
    "llava": vision_llava.WRITER,
    "qwen2_vl": vision_qwen2_vl.WRITER,
}
ONNX_INSTEAD = 'take [gguf] vision = "onnx"'


def can_see(family: Family, source: Source) -> str | None:
    """Why libmtmd cannot see as this checkpoint does; None: it can. Weights are not read."""
    writer = BY_FAMILY.get(family.name)
    if writer is None:
        return f"llama.cpp cannot see for the family {family.name}, but for {', '.join(sorted(BY_FAMILY))}"
    return writer.refusal(source, prepare_steps(load_image_processor(source.folder)))


def write_projector(
    family: Family, source: Source, weights: ModelWeights, path: Path, precision: Precision,
    progress: Progress | None = None,
) -> None:  # fmt: skip
    """Write ``path``. UsageError for a model that libmtmd does not know."""
    projector = _writer(family, source).projector(Source(source.folder, weights.config), weights.tensors)
    tower = projector.tower
    mean, std = normalisation(load_image_processor(source.folder))

    def describe(writer: gguf.GGUFWriter) -> None:
        writer.add_type("mmproj")
        writer.add_clip_has_vision_encoder(True)
        writer.add_clip_projector_type(projector.kind)
        writer.add_vision_projection_dim(projector.width)
        writer.add_vision_image_size(tower.image_px)
        writer.add_vision_patch_size(tower.patch_px)
        writer.add_vision_embedding_length(tower.width)
        writer.add_vision_feed_forward_length(tower.inner)
        writer.add_vision_block_count(tower.layers)
        writer.add_vision_head_count(tower.heads)
        writer.add_vision_attention_layernorm_eps(tower.epsilon)
        writer.add_vision_image_mean(list(mean))
        writer.add_vision_image_std(list(std))
        projector.describe(writer)

    write_file(path, "clip", describe, projector.entries, precision, progress)


def image_steps(family: Family, source: Source, steps: Steps) -> Steps:
    """What prepares an image for libmtmd, which then changes no pixel of it but cuts it into tiles."""
    return _writer(family, source).steps(source, steps)


def prompt_around(family: Family, source: Source, prompt: str) -> str:
    """``prompt`` without what libmtmd itself writes around an image; UsageError for one that does not have it."""
    before, after = _writer(family, source).written_around
    if f"{before}{IMAGE}{after}" not in prompt:
        raise UsageError(
            f"llama.cpp writes {before} and {after} around an image, and this chat template does not", fix=ONNX_INSTEAD
        )
    return prompt.replace(f"{before}{IMAGE}{after}", IMAGE)


def _writer(family: Family, source: Source) -> VisionWriter:
    if reason := can_see(family, source):
        raise UsageError(reason, fix=ONNX_INSTEAD)
    return BY_FAMILY[family.name]
