"""Compare encoders for the default model: what they know, what they learn in so many minutes, what they cost.

``python -m edge_rsvlm.export.default.encoders.compare --data ../shared/data --minutes 20 --work build/encoders`` leaves
a JSON file per candidate in ``--work``, skips those that are there, times all graphs in turns when ``latency.json`` is
not there yet, and writes the table into ``--report``. ``--only NAME`` stops after that candidate, so that several
processes can share the work.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from edge_rsvlm.export.default.data.scenes import SceneSet, ucm
from edge_rsvlm.export.default.encoders import graphs, scores
from edge_rsvlm.export.default.encoders.candidates import CANDIDATES, Candidate
from edge_rsvlm.export.default.encoders.norms import fold_norms
from edge_rsvlm.export.default.encoders.proxy import DETECT_BATCH, Proxy, batch_maker, finetune, usable_ucm
from edge_rsvlm.export.default.encoders.report import write_report

MEASURED_BATCHES = 32
"""Of 12 tiles each, from which norms that are put back are measured."""
CALIBRATION, LIKENESS = 48, 32
"""Tiles of training images for INT8's ranges, and of held-out images to compare maps on."""
SEED = 0


def measure(candidate: Candidate, options: argparse.Namespace) -> dict[str, Any]:
    """Everything about one candidate but its latency. Leaves its graphs in ``options.work``."""
    data, cache = options.data, options.work / "cache"
    torch.manual_seed(SEED)
    make = batch_maker(data, cache, SEED)
    batches = [make()["tiles"] for _ in range(MEASURED_BATCHES)]
    encoder = candidate.build(data, batches)
    scenes = ucm(data, cache)
    known = once(
        options.work / f"{candidate.name}.probe.json", lambda: imagenet_probe(candidate, encoder, scenes, options)
    )
    print(f"{candidate.name}: probe of ImageNet features {known}", flush=True)
    model = Proxy(encoder, candidate.channels, [tiles[DETECT_BATCH:] for tiles in batches])
    seen = trained(candidate, model, options)
    return {
        "name": candidate.name, "graph": candidate.graph, "minutes": options.minutes, "probe": known,
        "training": seen, **evaluate(candidate, model, scenes, options),
    }  # fmt: skip


def imagenet_probe(
    candidate: Candidate, encoder: nn.Module, scenes: SceneSet, options: argparse.Namespace
) -> dict[str, float]:
    frozen = options.work / f"{candidate.name}.imagenet.onnx"
    graphs.export(fold_norms(encoder), frozen)
    return probe(scenes, graphs.encoder_of(frozen), None)[0]


def trained(candidate: Candidate, model: Proxy, options: argparse.Namespace) -> dict[str, float]:
    """Give ``model`` its fine-tuned weights, from an earlier call where it finished; returns what training saw."""
    path = options.work / f"{candidate.name}.pt"
    if not path.is_file():
        state, seen = finetune(model, batch_maker(options.data, options.work / "cache", SEED), options.minutes)
        temporary = path.with_suffix(".tmp")
        torch.save({"state": state, "seen": seen}, temporary)
        temporary.replace(path)
    done = torch.load(path, weights_only=True)
    model.load_state_dict(done["state"])
    model.eval()
    return dict(done["seen"])


def evaluate(candidate: Candidate, model: Proxy, scenes: SceneSet, options: argparse.Namespace) -> dict[str, Any]:
    """Scores of the fine-tuned model in f32 and INT8, its size and cost."""
    folded = fold_norms(model.encoder)
    paths = {p: options.work / f"{candidate.name}.{p}.onnx" for p in graphs.PRECISIONS}
    graphs.export(folded, paths["f32"])
    bytes_int8 = graphs.quantize(paths["f32"], calibration_tiles(options), paths["int8"])
    tiles = list(scores.dense_tiles(options.data, options.work / "cache"))
    encoders = {p: graphs.encoder_of(path) for p, path in paths.items()}
    found: dict[str, Any] = {"f32": {}, "int8": {}}
    ridge: scores.Ridge | None = None
    for precision, encode in encoders.items():
        known, ridge = probe(scenes, encode, ridge)
        held = validation(scenes)
        features = scores.pooled(scenes, held, encode)
        found[precision] = {
            "probe_top1": known["top1"],
            **scores.scene_scores(model, scenes, held, features),
            **scores.dense_scores(model, tiles, encode),
        }
    some = [tiles[i].tile for i in np.linspace(0, len(tiles) - 1, LIKENESS).astype(int)]
    return found | {
        "cosine": graphs.likeness(some, encoders["f32"], encoders["int8"]),
        "dense_tiles": len(tiles),
        "bytes": {"f32": paths["f32"].stat().st_size, "int8": bytes_int8},
        **graphs.cost(folded),
    }


def validation(scenes: SceneSet) -> npt.NDArray[np.int64]:
    return np.flatnonzero([scene.source == "ucm_val" for scene in scenes.scenes])


def probe(
    scenes: SceneSet, encode: scores.Encode, fitted: scores.Ridge | None
) -> tuple[dict[str, float], scores.Ridge]:
    """Top-1 on UCM's validation part of a ridge regression on UCM's training part, or of one that is ``fitted``."""
    held, usable = validation(scenes), usable_ucm(scenes)
    labels = np.array([scenes.class_index(i) for i in range(len(scenes))])
    if fitted is None:
        names = [scenes.scenes[int(i)].name for i in usable]
        fitted = scores.Ridge(scores.pooled(scenes, usable, encode), labels[usable], names)
    top1 = fitted.top1(scores.pooled(scenes, held, encode), labels[held])
    return {"top1": top1, "penalty": fitted.penalty}, fitted


def calibration_tiles(options: argparse.Namespace) -> list[npt.NDArray[np.float32]]:
    """Training tiles of both kinds."""
    make = batch_maker(options.data, options.work / "cache", SEED + 1)
    tiles: list[npt.NDArray[np.float32]] = []
    while len(tiles) < CALIBRATION:
        tiles.extend(make()["tiles"].numpy())
    return tiles[:CALIBRATION]


def timed(work: Path, candidates: Sequence[Candidate]) -> dict[str, Any]:
    """Latency of each architecture, from the first of its candidates that has graphs."""
    chosen = {c.graph: c.name for c in reversed(candidates)}
    files = {g: {p: work / f"{name}.{p}.onnx" for p in graphs.PRECISIONS} for g, name in chosen.items()}
    return graphs.latency(files, candidates[0].graph)


def once(path: Path, make: Any) -> Any:
    """What ``path`` holds, made and written where it is absent."""
    if not path.is_file():
        made = make()
        path.write_text(json.dumps(made, indent=1) + "\n")
    return json.loads(path.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="the data sets")
    parser.add_argument("--work", type=Path, default=Path("build/encoders"), help="results, graphs and caches")
    parser.add_argument("--minutes", type=float, default=20.0, help="processor time of each fine-tuning")
    parser.add_argument("--report", type=Path, default=Path("docs/encoders.md"), help="where the table goes")
    parser.add_argument("--only", choices=[c.name for c in CANDIDATES], help="measure this candidate alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    chosen = [c for c in CANDIDATES if options.only in (None, c.name)]
    results = [once(options.work / f"{c.name}.json", lambda c=c: measure(c, options)) for c in chosen]
    if options.only:
        return
    latency = once(options.work / "latency.json", lambda: timed(options.work, CANDIDATES))
    write_report(options.report, results, latency)


if __name__ == "__main__":
    main()
