"""Language models of llama.cpp: logits, sequences that share what was read, and files that are none."""

from __future__ import annotations

import numpy as np
import pytest

from edge_rsvlm.errors import BundleError, UsageError
from edge_rsvlm.types import Prompt
from tests import tiny_gguf

CONTEXT = 64
# llama.cpp keeps keys and values in half precision.
TOLERANCE = 5e-3


@pytest.fixture(autouse=True)
def _llama(needs):
    needs("llama_cpp")
    needs("gguf")


@pytest.fixture(scope="module")
def weights():
    return tiny_gguf.text_weights()


@pytest.fixture
def model(weights, tmp_path):
    return tiny_gguf.write_text(tmp_path / "tiny.gguf", weights)


def language(path, context: int = CONTEXT, **more):
    from edge_rsvlm.engines.llama import LlamaLanguage

    return LlamaLanguage(path, context, 1, **more)


def prompt(images: int = 1, words: int = 5, visual: int = 3, seed: int = 0) -> Prompt:
    """Two words, an image, and the other words."""
    rng = np.random.default_rng(seed)
    ids_S = rng.integers(30, 300, words + visual)
    visual_S = np.zeros(len(ids_S), bool)
    visual_S[2 : 2 + visual] = visual > 0
    embeds = rng.standard_normal((images, visual, tiny_gguf.TINY.width)).astype(np.float32)
    return Prompt(ids_S.astype(np.int64), visual_S, embeds, np.arange(len(ids_S)))


def expected(weights, wanted: Prompt, image: int, answer=(), *, see_ahead: bool = False) -> np.ndarray:
    """Logits [1 + A, V] after the prompt and after each token of the answer, by NumPy."""
    table = weights["token_embd.weight"]
    embeds = table[wanted.ids_S].copy()
    embeds[wanted.visual_S] = wanted.visual_NTD[image]
    embeds = np.concatenate([embeds, table[list(answer)]]) if len(answer) else embeds
    ahead = np.concatenate([wanted.visual_S, np.zeros(len(answer), bool)]) if see_ahead else None
    logits = tiny_gguf.reference_logits(weights, embeds, np.arange(len(embeds)), see_ahead=ahead)
    return logits[len(wanted.ids_S) - 1 :]


def off(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def test_words_alone(model, weights):
    asked = prompt(visual=0)
    logits, _ = language(model).start(asked)
    assert off(logits[0], expected(weights, asked, 0)[0]) < TOLERANCE


@pytest.mark.parametrize("see_ahead", [False, True])
def test_an_image_among_words_and_what_goes_on(model, weights, see_ahead):
    asked, answer = prompt(), [40, 77, 120]
    logits, advance = language(model).start(asked, images_see_ahead=see_ahead)
    found = [logits[0], *(advance(np.array([token]), np.array([0]))[0] for token in answer)]
    assert off(np.stack(found), expected(weights, asked, 0, answer, see_ahead=see_ahead)) < TOLERANCE


def test_images_are_apart(model, weights):
    asked = prompt(images=3)
    logits, advance = language(model).start(asked)
    for image in range(3):
        assert off(logits[image], expected(weights, asked, image)[0]) < TOLERANCE
    after = advance(np.array([50, 60, 70]), np.arange(3))
    for image, token in enumerate((50, 60, 70)):
        assert off(after[image], expected(weights, asked, image, [token])[1]) < TOLERANCE


def test_rows_that_share_a_past_and_part(model, weights):
    asked = prompt()
    _, advance = language(model, beams=3).start(asked)
    advance(np.array([40, 50, 60]), np.zeros(3, np.int64))
    # The second goes on twice, the first is forgotten.
    after = advance(np.array([70, 80, 90]), np.array([1, 2, 1]))
    for row, answer in enumerate(([50, 70], [60, 80], [50, 90])):
        assert off(after[row], expected(weights, asked, 0, answer)[2]) < TOLERANCE


def test_a_model_reads_again_as_if_it_were_new(model):
    runs = language(model)
    first, _ = runs.start(prompt(seed=1))
    runs.start(prompt(seed=2))
    again, _ = runs.start(prompt(seed=1))
    np.testing.assert_array_equal(first, again)


def test_rotary_positions_of_rows_and_columns(tmp_path):
    weights = tiny_gguf.text_weights(biased=True)
    path = tiny_gguf.write_text(tmp_path / "qwen.gguf", weights, mrope=True)
    words = prompt(visual=4)
    positions = np.array([[0, 1, 2, 2, 2, 2, 4, 5, 6], [0, 1, 2, 2, 3, 3, 4, 5, 6], [0, 1, 2, 3, 2, 3, 4, 5, 6]])
    asked = Prompt(words.ids_S, words.visual_S, words.visual_NTD, positions)
    embeds = weights["token_embd.weight"][asked.ids_S].copy()
    embeds[asked.visual_S] = asked.visual_NTD[0]
    logits, _ = language(path).start(asked)
    assert off(logits[0], tiny_gguf.reference_logits(weights, embeds, positions)[-1]) < TOLERANCE


def test_what_is_too_long_is_refused(model):
    with pytest.raises(UsageError, match="reads 63"):
        language(model).start(prompt(words=CONTEXT))
    _, advance = language(model).start(prompt(words=CONTEXT - 4, visual=3))
    advance(np.array([40]), np.array([0]))
    with pytest.raises(UsageError, match="--max-tokens"):
        advance(np.array([40]), np.array([0]))


def test_an_encoder_of_another_model_is_refused(model):
    asked = prompt()
    narrow = Prompt(asked.ids_S, asked.visual_S, asked.visual_NTD[..., :-1], asked.positions)
    with pytest.raises(BundleError, match="not of one model"):
        language(model).start(narrow)
    strange = Prompt(asked.ids_S + tiny_gguf.TINY.words, asked.visual_S, asked.visual_NTD, asked.positions)
    with pytest.raises(BundleError, match="fewer words"):
        language(model).start(strange)


@pytest.mark.parametrize(
    ("keep", "why"), [(0, "magic"), (10, "header"), (4000, "key-value pairs"), (-4000, "not within the file bounds")]
)
def test_files_that_are_no_model(model, keep, why):
    model.write_bytes(model.read_bytes()[:keep])
    with pytest.raises(BundleError, match=rf"cannot load tiny.gguf: .*{why}"):
        language(model)


def test_a_projector_sees(model, tmp_path):
    from edge_rsvlm.engines.llama_vision import LlamaVision

    seeing = LlamaVision(language(model, 256), tiny_gguf.write_projector(tmp_path / "mmproj.gguf"))
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)
    words = f"<|im_start|>User:{seeing.marker}what?"
    count = seeing.tokens(image, words)
    logits, advance = seeing.start(image, words)
    other, _ = seeing.start(255 - image, words)
    assert count < 256 and logits.shape == (1, tiny_gguf.TINY.words) and off(other, logits) > 1e-2
    again, advance = seeing.start(image, words)
    np.testing.assert_array_equal(logits, again)
    assert np.isfinite(advance(np.array([40]), np.array([0]))).all()
    assert tiny_gguf.END in seeing.ends
