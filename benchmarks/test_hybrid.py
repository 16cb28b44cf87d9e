"""Captions from image to text: graphs of ONNX Runtime that see and llama.cpp that writes, beside either alone.

The model has the layers of a SmolVLM, a ViT-S at 384 px whose patches are joined 16 to 1 and a Llama of 33.6 million
parameters, and random weights; no row of the head leads to the end, so that every answer has ``WRITTEN`` tokens. An
image is one view, or four tiles and an overview: llama.cpp alone knows only the latter. Variants take turns, so that
what else the machine does meets all; ratios are medians over rounds.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs torch: not installed")
pytest.importorskip("transformers", reason="needs transformers: not installed")
pytest.importorskip("onnxscript", reason="needs onnxscript: not installed")
pytest.importorskip("sentencepiece", reason="needs sentencepiece: not installed")
pytest.importorskip("gguf", reason="needs gguf: not installed")
pytest.importorskip("llama_cpp", reason="needs llama_cpp: not installed")

import torch
from transformers import PreTrainedTokenizerFast, SmolVLMConfig, SmolVLMForConditionalGeneration

import edge_rsvlm
from edge_rsvlm.bundle import load_bundle
from edge_rsvlm.export.chain import run_export
from edge_rsvlm.export.default.checkpoint import is_stages
from edge_rsvlm.export.recipe import Recipe
from edge_rsvlm.pipeline.session import Limits, Session
from edge_rsvlm.tasks.search import Sampling
from tests import tiny_generators
from tests.test_gguf_projector import paragraphs

SCENES = Path(edge_rsvlm.__file__).parent / "scenes"
SCENE = str(SCENES / "marina.webp")
ROOT = Path(__file__).parents[1]
WEIGHTS, DOCS = ROOT / "export" / "default" / "weights", ROOT / "docs"
WORDS = ["Describe this image in one sentence.", "User:", "Assistant:"] * 9
TILE_PX, WRITTEN, ROUNDS = 384, 32, 11
AIM, FLOOR = 1.5, 1.1
THREADS = (1, 2)
VISION = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 6}
TEXT = {
    "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 8192,
}  # fmt: skip
GRAPHS = {"graphs, int8": "onnx:int8", "graphs, int4": "onnx:int4"}
HYBRIDS = {"hybrid, Q8_0": "gguf:Q8_0", "hybrid, Q4_K_M": "gguf:Q4_K_M"}
ALONE = {"llama.cpp, Q4_K_M": "gguf:Q4_K_M"}


def smolvlm(folder: Path, *, split: bool) -> Path:
    """A tiny checkpoint with a model of a size that is used, and a tokenizer that writes a prompt in as few tokens."""
    tiny_generators.idefics3(folder, smol=True, split=split, tile_px=TILE_PX)
    lines = [line for path in sorted(DOCS.glob("*.md")) for line in path.read_text().splitlines()] + WORDS
    small = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer = small.train_new_from_iterator(lines, TEXT["vocab_size"] // 2, show_progress=False)
    tokenizer.save_pretrained(folder)
    paragraphs(folder)
    ends = [tokenizer.eos_token_id, tokenizer.bos_token_id]
    config = SmolVLMConfig(
        vision_config=VISION | {"image_size": TILE_PX, "patch_size": 16},
        text_config={"model_type": "llama", **TEXT, "max_position_embeddings": 2048, "eos_token_id": ends},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=4,
    )
    torch.manual_seed(0)
    model = SmolVLMForConditionalGeneration(config)
    with torch.no_grad():
        model.lm_head.weight[ends] = 0  # and another word is always likelier
    model.save_pretrained(folder)
    return folder


def exported(checkpoint: Path, folder: Path, target: str, vision: str) -> Path:
    """What fewer bits cost is not asked here."""
    unused = ("segment", "change") if is_stages(checkpoint) else ()  # graphs that captions do not run
    recipe = {
        "checkpoint": checkpoint, "out": folder / vision, "target": target, "gguf": {"vision": vision},
        "calibration": {"images": SCENES, "count": 4}, "int4": {"method": "rtn"}, "allow": ("accuracy",),
        "precision": dict.fromkeys(unused, "f16"),
    }  # fmt: skip
    return run_export(Recipe.model_validate(recipe), lambda *_: None)


def bundles(checkpoint: Path, folder: Path, *variants: Mapping[str, str]) -> dict[str, Path]:
    """By what runs them."""
    return {
        name: exported(checkpoint, folder / target.replace(":", "-"), target, "mmproj" if name in ALONE else "onnx")
        for chosen in variants
        for name, target in chosen.items()
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Bundles of one model, each exported once."""

    @cache
    def make(split: bool) -> Mapping[str, Path]:
        folder = tmp_path_factory.mktemp("hybrid")
        return bundles(smolvlm(folder / "checkpoint", split=split), folder, GRAPHS, HYBRIDS, ALONE if split else {})

    return make


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("split", [False, True], ids=["one view", "five views"])
def test_captions(made, split, threads):
    compare("five views" if split else "one view", made(split), threads, Sampling(0.0, max_tokens=WRITTEN))


@pytest.fixture(scope="module")
def packaged(tmp_path_factory):
    """The packaged model; llama.cpp knows no projector of its kind."""
    if not is_stages(WEIGHTS):
        pytest.skip("needs weights: the stages are not installed")
    return bundles(WEIGHTS, tmp_path_factory.mktemp("packaged"), GRAPHS, HYBRIDS)


@pytest.mark.parametrize("threads", THREADS)
def test_captions_of_the_packaged_model(packaged, threads):
    """As long as they come out, and by the search that the task wants."""
    compare("packaged model", packaged, threads, None)


def compare(what: str, paths: Mapping[str, Path], threads: int, sampling: Sampling | None) -> None:
    """Prints a line per variant; the fastest hybrid must be faster than the fastest of the others."""
    runs = {name: Caption(path, threads, sampling) for name, path in paths.items()}
    taken = np.array([[run() for run in runs.values()] for _ in range(ROUNDS + 1)])[1:]
    found = dict(zip(runs, np.median(taken, axis=0), strict=True))
    ours = min((name for name in found if name in HYBRIDS), key=found.__getitem__)
    peer = min((name for name in found if name not in HYBRIDS), key=found.__getitem__)
    print()
    for name, run in runs.items():
        words = f"; {run.tokens} tokens" if run.tokens else ""
        print(f"{what}, {threads} thread(s), {name}: {1e3 * found[name]:.1f} ms{words}")
    columns = dict(zip(runs, taken.T, strict=True))
    ratio = float(np.median(columns[peer] / columns[ours]))
    print(f"  {ours} is {ratio:.2f} times as fast as {peer} (aim {AIM}, floor {FLOOR})")
    assert ratio >= FLOOR


class Caption:
    """The command ``caption`` again and again, sessions open."""

    def __init__(self, path: Path, threads: int, sampling: Sampling | None) -> None:
        bundle = load_bundle(path, allow_unsigned=True, allow_older=True)
        self._session, self._sampling = Session(bundle, Limits(8 << 30, threads)), sampling
        runtime, images = self._session.seen("caption", SCENE, 1)
        generator = runtime.generator("caption", bundle.manifest.tasks.caption)
        (answer,) = generator.tokens(images, "", sampling)
        self.tokens = len(answer)
        assert sampling is None or self.tokens == WRITTEN

    def __call__(self) -> float:
        begun = time.perf_counter()
        self._session.caption(SCENE, lambda *_: None, sampling=self._sampling)
        return time.perf_counter() - begun
