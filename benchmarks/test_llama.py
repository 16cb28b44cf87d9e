"""llama.cpp through this package: tokens per second beside its own bench.

Runs alternate, so that what else the machine does meets all; ratios are medians over pairs.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs torch: not installed")
pytest.importorskip("transformers", reason="needs transformers: not installed")
pytest.importorskip("gguf", reason="needs gguf: not installed")
pytest.importorskip("llama_cpp", reason="needs llama_cpp: not installed")

from edge_rsvlm.engines.llama import LlamaLanguage
from edge_rsvlm.engines.llama_library import C
from edge_rsvlm.export.default.checkpoint import is_stages
from edge_rsvlm.export.gguf.quantizing import quantize
from edge_rsvlm.tasks.search import Stop, greedy
from edge_rsvlm.types import Prompt
from tests import tiny_gguf
from tests.gguf_models import read

WEIGHTS = Path(__file__).parents[1] / "export" / "default" / "weights"
PAIRS, READ, WRITTEN = 21, 64, 128
TOKENS_AIM, TOKENS_FLOOR = 0.97, 0.85
THREADS = (1, 2)

LLAMA_33M = tiny_gguf.Text(words=8192, width=512, inner=1536, layers=8, heads=8, kv_heads=4, head=64, context=2048)


def test_tokens_per_second_of_the_packaged_decoder(tmp_path):
    if not is_stages(WEIGHTS):
        pytest.skip("needs weights: the stages are not installed")
    read(WEIGHTS, tmp_path / "F16.gguf", "F16")
    compare_with_bench(tmp_path, "packaged decoder", "Q8_0")


def test_tokens_per_second_of_33_million_parameters(tmp_path):
    tiny_gguf.write_text(tmp_path / "F16.gguf", tiny_gguf.text_weights(LLAMA_33M), LLAMA_33M)
    compare_with_bench(tmp_path, "33 M parameters", "Q8_0", "Q4_K_M")


def compare_with_bench(folder: Path, what: str, *kinds: str) -> None:
    print()
    ratios = []
    for kind in kinds:
        quantize(folder / "F16.gguf", folder / f"{kind}.gguf", kind)
        for threads in THREADS:
            language = LlamaLanguage(folder / f"{kind}.gguf", 2 * (READ + WRITTEN), threads)
            ours, peer = Ours(language), Bench(language)
            rates = np.array([turn(ours, peer, swapped=bool(n % 2)) for n in range(PAIRS + 1)])[1:]
            ratios.append(float(np.median(rates[:, 0] / rates[:, 1])))
            our_rate, its_rate = np.median(rates, axis=0)
            speed = f"{our_rate:.0f} tokens/s, its own bench {its_rate:.0f}: {ratios[-1]:.2f} of it"
            print(f"{what}, {kind}, {threads} thread(s): {speed} (aim {TOKENS_AIM}, floor {TOKENS_FLOOR})")
    assert min(ratios) >= TOKENS_FLOOR


def turn(first, second, *, swapped: bool) -> tuple[float, float]:
    """What both give, in the order asked for."""
    if swapped:
        later = second()
        return first(), later
    return first(), second()


class Ours:
    """Greedy decoding as the runtime does it, after a prompt of ``READ`` tokens."""

    def __init__(self, language: LlamaLanguage) -> None:
        self._language = language
        nothing = np.zeros((1, 0, language.model.width), np.float32)
        self._prompt = Prompt(words(language), np.zeros(READ, bool), nothing, np.arange(READ))

    def __call__(self) -> float:
        logits_1V, advance = self._language.start(self._prompt)
        never = Stop((self._language.model.words,), WRITTEN + 1)
        begun = time.perf_counter()
        (answer,) = greedy(logits_1V, advance, never)
        taken = time.perf_counter() - begun
        assert len(answer) == WRITTEN + 1
        return WRITTEN / taken


class Bench:
    """What `llama-bench` times as "tg" (tools/llama-bench, test_gen), which the wheel does not bring: one token after
    the other, each any one, and nobody looks at the logits. The same weights in memory, its own context and defaults.
    """

    def __init__(self, language: LlamaLanguage) -> None:
        params = C.llama_context_default_params()
        params.n_ctx, params.n_threads = language.context_tokens, language.threads
        params.n_threads_batch = language.threads
        self._language, self._context = language, C.llama_init_from_model(language.model.pointer, params)
        self._read = (C.llama_token * READ)(*words(language).tolist())
        self._drawn = words(language, WRITTEN).tolist()

    def __call__(self) -> float:
        C.llama_memory_clear(C.llama_get_memory(self._context), False)
        assert C.llama_decode(self._context, C.llama_batch_get_one(self._read, READ)) == 0
        token = (C.llama_token * 1)()
        batch = C.llama_batch_get_one(token, 1)
        begun = time.perf_counter()
        for token[0] in self._drawn:
            C.llama_decode(self._context, batch)
            C.llama_synchronize(self._context)
        return WRITTEN / (time.perf_counter() - begun)

    def __del__(self) -> None:
        C.llama_free(self._context)


def words(language: LlamaLanguage, count: int = READ) -> np.ndarray:
    return np.random.default_rng(0).integers(0, language.model.words, count)
