"""Trained artifacts -> a bundle: graphs, tokenizer, golden probe, measured memory and accuracy, card and manifest.

``python -m edge_rsvlm.export.default.make_bundle --data ../shared/data --out edge_rsvlm/bundles/default``
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from edge_rsvlm.bundle import load_bundle
from edge_rsvlm.config.manifest import MANIFEST_NAME
from edge_rsvlm.export import artifact
from edge_rsvlm.export.bundle_writer import bundle_folder, measured_memory, probe_case, step_record, write_manifest
from edge_rsvlm.export.default.baselines import change_vectors, consensus
from edge_rsvlm.export.default.compile_onnx import (
    CHANGE_MAPS,
    DETECT_MAPS,
    ChangeGraph,
    DecoderGraph,
    DetectGraph,
    EmbedGraph,
    EncoderGraph,
    Model,
    PrefixGraph,
    compile_all,
    graph_names,
    load_model,
)
from edge_rsvlm.export.default.data.views import MEAN, STD, U8_RANGE
from edge_rsvlm.export.default.describe import (
    DESCRIPTION,
    LICENCE,
    NAME,
    TRAINING_DATA,
    VERSION,
    Thresholds,
    task_specs,
    write_thresholds,
)
from edge_rsvlm.export.default.model.encoder import STEM_BANDS
from edge_rsvlm.export.default.model_card import CARD_NAME, CardFacts, write_card
from edge_rsvlm.export.default.score import evaluations
from edge_rsvlm.export.default.stages import backbone, caption, joint
from edge_rsvlm.export.default.stages import change as change_stage
from edge_rsvlm.export.default.thresholds import change_threshold, detect_threshold
from edge_rsvlm.pipeline.runtime import Runtime, cpu_engine
from edge_rsvlm.raster.reader import open_raster
from edge_rsvlm.types import Window

MOST_BYTES = 12 << 20
PROBE_TOLERANCE = 0.01
PROBE_SCENES = ("airliners.webp", "marina.webp")
PROBE_PX = 64
PROBE_TOKENS = 7
THREADS, UNBOUNDED = 2, 0
CACHE = Path("build/train/cache")
UNMEASURED = {"session_bytes": 1, "tile_bytes": 1}
UNCHOSEN = Thresholds(detect=0.5, change=0.5)


def golden_probe(model: Model, folder: Path, graphs: Mapping[str, Path], scenes: Path) -> list[dict[str, Any]]:
    """Corners of packaged scenes, and random tensors further on; outputs of the torch modules."""
    tiles = []
    for name in PROBE_SCENES:
        with open_raster(str(scenes / name)) as raster:
            tiles.append(raster.read(Window(0, 0, PROBE_PX, PROBE_PX)).data_CHW[:3])
    rgb_N3HW = torch.from_numpy(np.stack(tiles).astype(np.float32) / U8_RANGE)
    tiles_N5HW = torch.ones(len(tiles), len(STEM_BANDS), PROBE_PX, PROBE_PX)
    tiles_N5HW[:, :3], tiles_N5HW[:, 3] = (rgb_N3HW - MEAN) / STD, 0.0
    config = model.captioner.decoder.config
    torch.manual_seed(0)
    with torch.inference_mode():
        maps = model.encoder(tiles_N5HW)
        pair = [maps[n][k : k + 1] for k in (0, 1) for n in CHANGE_MAPS]
        past = [torch.zeros(1, config.heads, 0, config.head_width)] * (2 * config.layers)
        tokens = torch.arange(PROBE_TOKENS)[None] + 10
        words = model.captioner.decoder.embed_tokens(tokens)
        cases: dict[str, tuple[nn.Module, Sequence[torch.Tensor]]] = {
            "encoder": (EncoderGraph(model.encoder), [tiles_N5HW]),
            "detect": (DetectGraph(model.detect), [maps[n][:1] for n in DETECT_MAPS]),
            "change": (ChangeGraph(model.change), pair),
            "caption_prefix": (PrefixGraph(model.captioner), [maps["c5"]]),
            "caption_embed": (EmbedGraph(model.captioner), [tokens]),
            "caption_decoder": (DecoderGraph(model.captioner), [words, *past]),
        }
        found = []
        for name, (module, inputs) in cases.items():
            outputs = module(*inputs)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            names = graph_names(graphs[name])
            found.append(
                probe_case(
                    folder, name,
                    {key: value.numpy() for key, value in zip(names[0], inputs, strict=True)},
                    {key: value.numpy() for key, value in zip(names[1], outputs, strict=True)},
                    PROBE_TOLERANCE,
                )
            )  # fmt: skip
    return found


def manifest_graphs(graphs: Mapping[str, Path]) -> dict[str, Any]:
    """Graphs whose inputs and outputs are called by their roles; caches are named by the task."""

    def roles(names: Sequence[str]) -> dict[str, str]:
        return {name: name for name in names if not name.startswith(("past_key_values.", "present."))}

    found = {}
    for name, path in graphs.items():
        inputs, outputs = graph_names(path)
        found[name] = {"file": path.name, "precision": "f16", "inputs": roles(inputs), "outputs": roles(outputs)}
    return found


def make_bundle(data: Path, work: Path, out: Path, scenes: Path) -> None:
    """Assemble beside ``out``, then replace ``out`` and the hash that the package carries."""
    parts = [artifact.load(work / stage.NAME) for stage in (joint, change_stage, caption)]
    model = load_model(*parts)
    with bundle_folder(out) as folder:
        graphs = compile_all(model, folder)
        shutil.copyfile(parts[-1].folder / caption.TOKENIZER_NAME, folder / caption.TOKENIZER_NAME)
        tasks = {
            name: {**task, "memory": UNMEASURED}
            for name, task in task_specs(model.captioner.decoder.config, UNCHOSEN).items()
        }
        fields = {
            "name": NAME, "version": VERSION, "description": DESCRIPTION, "licence": LICENCE,
            "training_data": TRAINING_DATA,
            "graphs": manifest_graphs(graphs), "tasks": tasks, "probe": golden_probe(model, folder, graphs, scenes),
            "steps": [step_record(p) for p in parts],
        }  # fmt: skip
        write_manifest(folder, fields)
        draft = load_bundle(folder, allow_unsigned=True, allow_older=True)
        detect_cut = detect_threshold(Runtime(draft, cpu_engine(THREADS, UNBOUNDED)), data, CACHE)
        change_cut, cut_by_others = change_threshold(draft, data)
        tasks["detect"]["score_threshold"], tasks["change"]["threshold"] = detect_cut, change_cut
        write_thresholds(work, parts[:2], Thresholds(detect_cut, change_cut))
        for name, spec in tasks.items():
            spec["memory"] = measured_memory(folder, name)
        write_manifest(folder, fields)
        accuracy = evaluations(data, folder)
        facts = CardFacts(
            NAME, LICENCE, TRAINING_DATA, accuracy, [p.manifest for p in parts], detect_cut, change_cut, cut_by_others,
            consensus(data, work, CACHE), change_vectors(data),
            len(artifact.load(work / backbone.NAME).metrics["ucm_left_out"]),
        )  # fmt: skip
        write_card(folder / CARD_NAME, facts)
        write_manifest(folder, {**fields, "accuracy": accuracy})
        size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
        if size > MOST_BYTES:
            raise ValueError(f"the bundle holds {size} bytes; it may hold {MOST_BYTES}")
    digest = artifact.file_hash(out / MANIFEST_NAME)
    out.with_name(f"{out.name}.sha256").write_text(digest + "\n")
    print(f"{out}: {size / 2**20:.2f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="labelled data for the evaluation")
    parser.add_argument(
        "--work", type=Path, default=Path("export/default/weights"), help="artifacts of the training stages"
    )
    parser.add_argument("--out", type=Path, default=Path("edge_rsvlm/bundles/default"))
    parser.add_argument("--scenes", type=Path, default=Path("edge_rsvlm/scenes"), help="packaged scenes, for the probe")
    options = parser.parse_args()
    make_bundle(options.data, options.work, options.out, options.scenes)


if __name__ == "__main__":
    main()
