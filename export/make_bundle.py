"""Trained artifacts -> a bundle: graphs, tokenizer, golden probe, measured memory and accuracy, card and manifest.

``python -m edge_rsvlm.export.make_bundle --data ../shared/data --work build/train --out edge_rsvlm/bundles/default``
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edge_rsvlm.bundle import load_bundle
from edge_rsvlm.config.manifest import MANIFEST_NAME, SCHEMA_VERSION, Manifest
from edge_rsvlm.export import artifact
from edge_rsvlm.export.baselines import change_vectors, consensus
from edge_rsvlm.export.compile_onnx import (
    CHANGE_MAPS,
    DETECT_MAPS,
    ChangeGraph,
    DetectGraph,
    Model,
    compile_all,
    load_model,
)
from edge_rsvlm.export.data.captions import BOS_ID, EOS_ID
from edge_rsvlm.export.data.change import OVERLAP_PX, TILE_PX
from edge_rsvlm.export.data.views import MEAN, S2_RANGE, STD, U8_RANGE
from edge_rsvlm.export.model import change, detect
from edge_rsvlm.export.model.encoder import STEM_BANDS
from edge_rsvlm.export.model_card import CARD_NAME, CardFacts, write_card
from edge_rsvlm.export.score import evaluations
from edge_rsvlm.export.stages import backbone, caption, joint
from edge_rsvlm.export.stages import change as change_stage
from edge_rsvlm.export.thresholds import change_threshold, detect_threshold
from edge_rsvlm.pipeline.runtime import Runtime, cpu_engine
from edge_rsvlm.raster.reader import open_raster
from edge_rsvlm.tasks.encode import encode
from edge_rsvlm.types import Window
from edge_rsvlm.verify import probe_tiles

MOST_BYTES = 12 << 20
NAME, VERSION = "edge-rsvlm-default", 1
LICENCE = "research and non-commercial use only (terms of the training data, see MODEL_CARD.md)"
DESCRIPTION = "MobileNetV2 encoder with box, change and caption heads for aerial and satellite images"
TRAINING_DATA = (
    "ImageNet MobileNetV2 weights (Apache-2.0)",
    "UC Merced Land Use (public domain) with UCM-Captions and RSIVQA (research)",
    "RSICD (research only)", "HRPlanes (CC BY 4.0)", "Aerial Airport (public domain)",
    "Airbus Aircraft Sample (CC BY-NC-SA 4.0)", "SIMD (research)", "drone vehicles (CC BY / BY-SA)",
    "OSCD (Copernicus imagery; masks CC BY-NC-SA)", "SZTAKI AirChange (scientific use)",
)  # fmt: skip
COLOUR = tuple("none" if band == "nir" else band for band in STEM_BANDS)
"""Boxes and captions were learnt without near infrared."""
FLOAT_RANGE = S2_RANGE / 10_000  # reflectance
PROBE_TOLERANCE = 0.01
PROBE_SCENES = ("airliners.webp", "marina.webp")
THREADS, UNBOUNDED = 2, 0
CACHE = Path("build/train/cache")
UNMEASURED = {"session_bytes": 1, "tile_bytes": 1}
UNCHOSEN = 0.5


def input_spec(
    tile_px: int, overlap_px: int, resolution_m: tuple[float, float], bands: Sequence[str] = COLOUR
) -> dict[str, Any]:
    ranges = {"uint8": (0.0, U8_RANGE), "uint16": (0.0, S2_RANGE), "float32": (0.0, FLOAT_RANGE)}
    return {
        "bands": bands, "ranges": ranges, "mean": MEAN, "std": STD, "tile_px": tile_px, "overlap_px": overlap_px,
        "resolution_m": resolution_m, "resampling": "bilinear",
    }  # fmt: skip


def task_specs(model: Model) -> dict[str, Any]:
    """Tasks of the manifest, memory not yet measured.

    Ground resolutions are those of the training images under their scale jitter.
    """
    decoder = model.captioner.decoder.config
    return {
        "detect": {
            "input": input_spec(512, 160, (0.1, 1.0)), "head": "detect.onnx", "encoder_outputs": DETECT_MAPS,
            "classes": detect.CLASSES, "stride": detect.STRIDE, "score_threshold": UNCHOSEN, "nms_iou": 0.5,
            "max_boxes_per_tile": 1000, "memory": UNMEASURED,
        },
        "change": {
            "input": input_spec(TILE_PX, OVERLAP_PX, (1.5, 6.4), STEM_BANDS), "head": "change.onnx",
            "encoder_outputs": CHANGE_MAPS, "stride": change.STRIDE, "threshold": UNCHOSEN, "min_area_m2": 200.0,
            "min_area_px": 4, "memory": UNMEASURED,
        },
        "caption": {
            "input": input_spec(256, 0, (0.3, 15.0)), "prefix": "caption_prefix.onnx", "embed": "caption_embed.onnx",
            "decoder": "caption_decoder.onnx", "encoder_outputs": ["c5"], "tokenizer": caption.TOKENIZER_NAME,
            "bos_id": BOS_ID, "eos_id": EOS_ID, "layers": decoder.layers, "heads": decoder.heads,
            "head_dim": decoder.head_width, "max_tokens": caption.MOST_TOKENS, "beams": 3, "length_penalty": 1.0,
            "memory": UNMEASURED,
        },
    }  # fmt: skip


def golden_probe(model: Model, folder: Path, scenes: Path) -> None:
    """Inputs from the packaged scenes; outputs of the torch modules, and the caption of the compiled graphs."""
    tiles = []
    for name in PROBE_SCENES:
        with open_raster(str(scenes / name)) as raster:
            tiles.append(raster.read(Window(0, 0, 256, 256)).data_CHW[:3])
    rgb_N3HW = np.stack(tiles).astype(np.uint8)
    with torch.inference_mode():
        maps = model.encoder(torch.from_numpy(probe_tiles(rgb_N3HW)))
        scores, ltrb = DetectGraph(model.detect)(*(maps[n] for n in DETECT_MAPS))
        dates = [maps[n][k : k + 1] for k in (0, 1) for n in CHANGE_MAPS]
        changed = ChangeGraph(model.change)(*dates)
    outputs = {"scores": scores.numpy(), "ltrb": ltrb.numpy(), "change": changed.numpy()}
    np.savez_compressed(
        folder / "probe.npz", tiles=rgb_N3HW, caption=first_caption(folder, rgb_N3HW),
        **{name: values.astype(np.float16) for name, values in outputs.items()},
    )  # fmt: skip


def first_caption(folder: Path, rgb_N3HW: np.ndarray) -> str:
    runtime = Runtime(load_bundle(folder, allow_unsigned=True), cpu_engine(1, UNBOUNDED))
    features = encode(runtime.encoder, probe_tiles(rgb_N3HW[:1]), ["c5"])
    return runtime.captioner(features)[0]


def write_manifest(folder: Path, tasks: dict[str, Any], accuracy: list[dict[str, Any]]) -> None:
    """Hash every file of ``folder`` into its manifest."""
    files = {
        p.name: {"sha256": hashlib.sha256(p.read_bytes()).hexdigest(), "bytes": p.stat().st_size}
        for p in sorted(folder.iterdir())
        if p.name != MANIFEST_NAME
    }
    manifest = Manifest.model_validate({
        "schema_version": SCHEMA_VERSION, "name": NAME, "version": VERSION, "description": DESCRIPTION,
        "licence": LICENCE, "training_data": TRAINING_DATA, "engine": "onnxruntime",
        "precision": "f16 weights, f32 arithmetic", "encoder": "encoder.onnx", "tasks": tasks, "accuracy": accuracy,
        "probe": {"file": "probe.npz", "tolerance": PROBE_TOLERANCE}, "files": files,
    })  # fmt: skip
    (folder / MANIFEST_NAME).write_text(manifest.model_dump_json(indent=1) + "\n")


def measured_memory(folder: Path, task: str) -> dict[str, int]:
    command = [sys.executable, "-m", "edge_rsvlm.export.measure_memory", str(folder), task]
    found: dict[str, int] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return found


def make_bundle(data: Path, work: Path, out: Path, scenes: Path) -> None:
    """Assemble in a temporary folder beside ``out``, then replace ``out`` and the hash that the package carries."""
    parts = [artifact.load(work / stage.NAME) for stage in (joint, change_stage, caption)]
    model = load_model(*parts)
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".bundle-", dir=out.parent))
    folder.chmod(0o755)
    compile_all(model, folder)
    shutil.copyfile(parts[-1].folder / caption.TOKENIZER_NAME, folder / caption.TOKENIZER_NAME)
    tasks = task_specs(model)
    (folder / "probe.npz").touch()
    write_manifest(folder, tasks, [])
    golden_probe(model, folder, scenes)
    write_manifest(folder, tasks, [])
    draft = load_bundle(folder, allow_unsigned=True)
    detect_cut = detect_threshold(Runtime(draft, cpu_engine(THREADS, UNBOUNDED)), data, CACHE)
    change_cut, cut_by_others = change_threshold(draft, data)
    tasks["detect"]["score_threshold"], tasks["change"]["threshold"] = detect_cut, change_cut
    tasks = {name: {**spec, "memory": measured_memory(folder, name)} for name, spec in tasks.items()}
    write_manifest(folder, tasks, [])
    accuracy = evaluations(data, folder)
    facts = CardFacts(
        NAME, LICENCE, TRAINING_DATA, accuracy, [p.manifest for p in parts], detect_cut, change_cut, cut_by_others,
        consensus(data, work, CACHE), change_vectors(data),
        len(artifact.load(work / backbone.NAME).metrics["ucm_left_out"]),
    )  # fmt: skip
    write_card(folder / CARD_NAME, facts)
    write_manifest(folder, tasks, accuracy)
    size = sum(p.stat().st_size for p in folder.iterdir())
    if size > MOST_BYTES:
        raise ValueError(f"the bundle holds {size} bytes; it may hold {MOST_BYTES}")
    publish(folder, out)
    print(f"{out}: {size / 2**20:.2f} MiB")


def publish(folder: Path, out: Path) -> None:
    """Swap the new bundle in, and write the hash of its manifest beside it."""
    if out.exists():
        shutil.rmtree(out)
    folder.rename(out)
    digest = hashlib.sha256((out / MANIFEST_NAME).read_bytes()).hexdigest()
    out.with_name(f"{out.name}.sha256").write_text(digest + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="labelled data for the evaluation")
    parser.add_argument("--work", type=Path, default=Path("export/weights"), help="artifacts of the training stages")
    parser.add_argument("--out", type=Path, default=Path("edge_rsvlm/bundles/default"))
    parser.add_argument("--scenes", type=Path, default=Path("edge_rsvlm/scenes"), help="packaged scenes, for the probe")
    options = parser.parse_args()
    make_bundle(options.data, options.work, options.out, options.scenes)


if __name__ == "__main__":
    main()
