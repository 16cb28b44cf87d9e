"""4-bit weights of the trained decoder: how far next-token distributions move, and how long a token takes.

Calibrated on images of UC Merced's training part, evaluated on its validation part, where the decoder follows captions
that people wrote. What is compared with is onnxruntime's own quantizer (MatMulNBitsQuantizer: round to nearest, whole
ranges) and this package's `rtn` (round to nearest, searched ranges). AWQ is measured too, and has no floor but that of
doing no harm: it protects inputs that are much larger than the others, and this decoder has none (the largest mean
magnitude of an input is about twice the median behind its norms).
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs torch: not installed")
pytest.importorskip("transformers", reason="needs transformers: not installed")
pytest.importorskip("onnxscript", reason="needs onnxscript: not installed")

import onnx
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

from edge_rsvlm.bundle import load_bundle
from edge_rsvlm.engines.onnxruntime import OnnxRuntimeEngine
from edge_rsvlm.export.chain import run_export
from edge_rsvlm.export.default.checkpoint import is_stages
from edge_rsvlm.export.default.data.captions import tidy
from edge_rsvlm.export.quantize.calibration import record
from edge_rsvlm.export.quantize.dynamic import quantize_dynamic
from edge_rsvlm.export.quantize.settings import CalibrationImages, Int4, Int8
from edge_rsvlm.export.quantize.weight_only import quantize_int4
from edge_rsvlm.export.recipe import Recipe
from edge_rsvlm.tasks.decoder import OnnxLanguage
from edge_rsvlm.tasks.text import load_tokenizer
from edge_rsvlm.types import Prompt

ROOT = Path(__file__).parents[1]
WEIGHTS, CAPTIONS = ROOT / "export" / "default" / "weights", ROOT.parent / "shared" / "data" / "ucm_captions"
FLOOR, AIM, NO_HARM = 0.75, 0.5, 1.15
BLOCKS = (32, 128)
DRAWS, PAIRS, PAST = 2000, 61, 70


def bundle_of(folder: Path, stored: str):
    recipe = Recipe(checkpoint=WEIGHTS, target=f"onnx:{stored}", out=folder / stored, work=folder / f"{stored}.steps")
    return load_bundle(run_export(recipe, lambda *_: None), allow_unsigned=True, allow_older=True)


class Captions:
    """The decoder over captions of validation images; what it says of their tokens is [images, tokens, words]."""

    def __init__(self, bundle, folder: Path) -> None:
        self._task, self._engine = bundle.manifest.tasks.caption, OnnxRuntimeEngine(threads=1)
        self._roles = frozenset(bundle.manifest.graphs["language_decoder"].inputs)
        self._embed, project = (self._engine.open(bundle.path(f"language_{name}.onnx")) for name in ("embed", "prefix"))
        images = CalibrationImages(images=CAPTIONS / "val.tar", count=10_000)
        calls = record(bundle, images, folder, lambda *_: None)[0].of("language_prefix")
        self._visual_NTD = np.concatenate([project.run(call, ["features"])[0] for call in calls])
        tokenizer = load_tokenizer(bundle.path("tokenizer.json"))
        rows = sorted(map(json.loads, (CAPTIONS / "val.jsonl").read_text().splitlines()), key=lambda row: row["image"])
        assert len(rows) == len(calls)
        (self._start,) = tokenizer.encode(self._task.prompt.replace("{image}", ""), add_special_tokens=False).ids
        said = [tokenizer.encode(tidy(row["captions"][0]), add_special_tokens=False).ids for row in rows]
        self._tokens_NT = np.full((len(said), max(map(len, said)) + 1), self._task.eos_ids[0])
        self._counted_NT = np.zeros(self._tokens_NT.shape, bool)
        for row, ids in enumerate(said):
            self._tokens_NT[row, : len(ids)] = ids
            self._counted_NT[row, : len(ids) + 1] = True

    def log_probabilities(self, decoder: Path):
        language = OnnxLanguage(self._task.decoder, self._embed, self._engine.open(decoder), self._roles)
        images, visual = self._visual_NTD.shape[:2]
        ids_S = np.array([*np.zeros(visual, np.int64), self._start])
        prompt = Prompt(ids_S, np.arange(visual + 1) < visual, self._visual_NTD, np.arange(visual + 1))
        logits_NV, advance = language.start(prompt)
        each = [logits_NV, *(advance(tokens_N, np.arange(images)) for tokens_N in self._tokens_NT.T[:-1])]
        logits_NTV = np.stack(each, 1).astype(np.float64)
        logits_NTV -= logits_NTV.max(-1, keepdims=True)
        return logits_NTV - np.log(np.exp(logits_NTV).sum(-1, keepdims=True))

    def divergence(self, before_NTV, after_NTV):
        """KL(before || after) in nats, of each image the mean over its tokens."""
        each_NT = (np.exp(before_NTV) * (before_NTV - after_NTV)).sum(-1) * self._counted_NT
        return each_NT.sum(1) / self._counted_NT.sum(1)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    if not CAPTIONS.exists():
        pytest.skip("needs data: the set 'ucm_captions' is not here")
    if not is_stages(WEIGHTS):
        pytest.skip("needs weights: the stages are not installed")
    folder = tmp_path_factory.mktemp("int4")
    wide, bundle = bundle_of(folder, "f32"), bundle_of(folder, "f16")
    images = CalibrationImages(images=CAPTIONS / "train.tar")
    samples = record(bundle, images, folder / "calibration", lambda *_: None)[0].of("language_decoder")
    captions = Captions(bundle, folder / "validation")
    return folder, wide.path("language_decoder.onnx"), bundle.path("language_decoder.onnx"), samples, captions


def by_onnxruntime(graph: Path, out: Path, block: int) -> None:
    quantizer = MatMulNBitsQuantizer(onnx.load(graph), block_size=block, is_symmetric=True, accuracy_level=4)
    quantizer.process()
    quantizer.model.save_model_to_file(str(out))


def interval(draws) -> str:
    low, high = np.percentile(draws, [2.5, 97.5])
    return f"{low:.3f} to {high:.3f}"


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("engines", ["onnxruntime alone", "TensorRT too"])
def test_next_tokens(made, block, engines):
    folder, wide, half, samples, captions = made
    before, found, drawn = captions.log_probabilities(wide), {}, {}
    tensorrt = None if engines == "onnxruntime alone" else folder / "tensorrt.onnx"
    for method in ("onnxruntime", "rtn", "gptq", "awq"):
        out = folder / f"{method}.onnx"
        if method == "onnxruntime":
            by_onnxruntime(wide, out, block)
        else:
            quantize_int4(half, samples, Int4(method=method, block=block), out, tensorrt)
        found[method] = captions.divergence(before, captions.log_probabilities(out))
    rng = np.random.default_rng(0)
    chosen = rng.integers(0, len(found["rtn"]), (DRAWS, len(found["rtn"])))
    print(f"\nblocks of {block}, for {engines}; KL to float32 in thousandths of a nat per token (95 % interval)")
    for method, each in found.items():
        drawn[method] = each[chosen].mean(1)
        ratios = [f"{each.mean() / found[other].mean():.2f} of {other}" for other in ("onnxruntime", "rtn")]
        print(f"  {method:12} {1e3 * each.mean():.3f} ({interval(1e3 * drawn[method])}); {', '.join(ratios)}")
    ratio = drawn["gptq"] / drawn["rtn"]
    print(f"  gptq / rtn {interval(ratio)} (aim {AIM}, floor {FLOOR})")
    for other in ("onnxruntime", "rtn"):
        assert found["gptq"].mean() <= FLOOR * found[other].mean()
        assert found["awq"].mean() <= NO_HARM * found[other].mean()


def test_time_of_a_token(made):
    """One more token of one caption, 70 read before; the decoders take turns."""
    folder, wide, half, samples, _ = made
    graphs = {"f32": wide, "int8-dynamic": folder / "dynamic.onnx", "int4": folder / "gptq32.onnx"}
    quantize_dynamic(wide, Int8(), graphs["int8-dynamic"])
    quantize_int4(half, samples, Int4(block=32), graphs["int4"], None)
    sessions = {name: OnnxRuntimeEngine(threads=1).open(graph) for name, graph in graphs.items()}
    feed = next(dict(call) for call in samples if call["inputs_embeds"].shape[1] == 1)
    rng = np.random.default_rng(0)
    feed = {
        name: rng.normal(size=(1, 1, array.shape[2]) if array.ndim == 3 else (1, array.shape[1], PAST, array.shape[3]))
        for name, array in feed.items()
    }
    feed = {name: array.astype(np.float32) for name, array in feed.items()}
    outputs = [value.name for value in onnx.load(wide, load_external_data=False).graph.output]
    taken = np.array([[_milliseconds(session, feed, outputs) for session in sessions.values()] for _ in range(PAIRS)])
    print()
    for name, graph, times, ratios in zip(graphs, graphs.values(), taken.T, (taken[:, :1] / taken).T, strict=True):
        size = sum(path.stat().st_size for path in graph.parent.glob(f"{graph.stem}.onnx*")) / 1e6
        print(f"  {name:12} {np.median(times):.3f} ms, {np.median(ratios):.2f} times as fast as f32; {size:.1f} MB")
    assert np.median(taken[:, 0] / taken[:, 2]) > 0.8  # smaller, and not much slower even where all fits into caches


def _milliseconds(session, feed, outputs) -> float:
    session.run(feed, outputs)  # its weights, and not another's, are in the cache
    begun = time.perf_counter()
    session.run(feed, outputs)
    return 1e3 * (time.perf_counter() - begun)
