"""INT8 graphs beside those in float32 that they come from, on the processor, as the runtime opens them.

Runs alternate, so that what else the machine does meets both; the ratio is the median over pairs. What a vision
transformer gains ends with its attention: products of two activations stay in float32, and at 384 px they are more than
half of the time that is left.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs torch: not installed")
pytest.importorskip("transformers", reason="needs transformers: not installed")
pytest.importorskip("onnxscript", reason="needs onnxscript: not installed")

from edge_rsvlm.bundle import load_bundle
from edge_rsvlm.engines.onnxruntime import OnnxRuntimeEngine
from edge_rsvlm.export.chain import run_export
from edge_rsvlm.export.quantize.dynamic import quantize_dynamic
from edge_rsvlm.export.quantize.settings import Int8
from edge_rsvlm.export.quantize.static import quantize_static
from edge_rsvlm.export.recipe import Recipe
from tests.int8_graphs import TracedTower

WEIGHTS = Path(__file__).parents[1] / "export" / "default" / "weights"
VIT_S = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 6}
PAIRS = 21
ENCODER_AIM, ENCODER_FLOOR = 2.0, 1.6
TOWER_AIM, TOWER_FLOOR = 2.5, {384: 1.8, 224: 2.2}
THREADS = (1, 2)


def tile(channels: int, side_px: int, seed: int = 0):
    return {"tiles": np.random.default_rng(seed).uniform(-1, 1, (1, channels, side_px, side_px)).astype(np.float32)}


def measured(before: Path, after: Path, feed, outputs, threads: int):
    """Median milliseconds of both, and the median of their ratio over pairs."""
    engine = OnnxRuntimeEngine(threads=threads)
    sessions = [engine.open(path) for path in (before, after)]
    taken = np.array([[_milliseconds(session, feed, outputs) for session in sessions] for _ in range(PAIRS + 1)])[1:]
    return np.median(taken, axis=0), float(np.median(taken[:, 0] / taken[:, 1]))


def _milliseconds(session, feed, outputs) -> float:
    begun = time.perf_counter()
    session.run(feed, outputs)
    return 1e3 * (time.perf_counter() - begun)


def megabytes(graph: Path) -> float:
    """With its weights, and without what TensorRT is given."""
    files = [path for path in graph.parent.glob(f"{graph.stem}.*") if ".tensorrt" not in path.suffixes]
    return sum(path.stat().st_size for path in files) / 1e6


def check(what: str, graphs, feed, outputs, threads: int, floor: float, aim: float) -> None:
    (f32, int8), ratio = measured(*graphs, feed, outputs, threads)
    sizes = [megabytes(graph) for graph in graphs]
    speed = f"{f32:.1f} -> {int8:.1f} ms, {ratio:.2f} times as fast (aim {aim}, floor {floor})"
    print(f"\n{what}, {threads} thread(s): {speed}; {sizes[0]:.1f} -> {sizes[1]:.1f} MB")
    assert ratio >= floor


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """As it was trained, whose half-precision weights onnxruntime widens as it loads them, and as packaged."""
    out = tmp_path_factory.mktemp("encoder") / "trained"
    run_export(Recipe(checkpoint=WEIGHTS, target="onnx:f16", out=out), lambda *_: None)
    packaged = load_bundle()
    return out / "encoder.onnx", packaged.path(packaged.manifest.graphs["encoder"].file)


@pytest.fixture(scope="module", params=[384, 224], ids=lambda side_px: f"{side_px}px")
def tower(request, tmp_path_factory):
    """ViT-S/16 with random weights."""
    folder = tmp_path_factory.mktemp("tower")
    traced = TracedTower(**VIT_S, image_size=request.param, patch_size=16)
    path = traced.store(folder / "f32.onnx", "f32")
    quantize_static(path, [tile(3, traced.side_px, seed) for seed in range(2)], Int8(), folder / "static.onnx", None)
    quantize_dynamic(path, Int8(), folder / "dynamic.onnx")
    return folder, traced.side_px


@pytest.mark.parametrize("threads", THREADS)
def test_packaged_encoder(encoder, threads):
    task = load_bundle().manifest.tasks.detect
    feed = tile(len(task.input.bands), task.input.tile_px)
    outputs = list(load_bundle().manifest.graphs["encoder"].outputs)
    check("packaged encoder, static", encoder, feed, outputs, threads, ENCODER_FLOOR, ENCODER_AIM)


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("way", ["static", "dynamic"])
def test_vision_transformer(tower, way, threads):
    folder, side_px = tower
    graphs = (folder / "f32.onnx", folder / f"{way}.onnx")
    what = f"ViT-S/16 at {side_px} px, {way}"
    check(what, graphs, tile(3, side_px), ["features"], threads, TOWER_FLOOR[side_px], TOWER_AIM)
