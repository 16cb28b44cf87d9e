"""Language models of llama.cpp: logits, sequences that share what was read, broken files, bundles that answer."""

from __future__ import annotations

import dataclasses
import importlib
import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import edge_rsvlm
from edge_rsvlm.cli import cli
from edge_rsvlm.config.task_specs import GgufTask
from edge_rsvlm.errors import BundleError, UsageError
from edge_rsvlm.tasks.gguf import GgufGenerator
from edge_rsvlm.tasks.search import Sampling, Stop, beam_search
from edge_rsvlm.tiles.prepare import Prepared
from edge_rsvlm.types import Prompt
from tests import llama_bundles, tiny_gguf
from tests.fakes import MEMORY

CONTEXT = 64
# llama.cpp keeps keys and values in half precision.
TOLERANCE = 5e-3
SCENE = Path(edge_rsvlm.__file__).parent / "scenes" / "marina.webp"


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


@pytest.mark.parametrize("see_ahead", [False, True])
def test_images_longer_than_a_pass(model, weights, see_ahead):
    asked = prompt(images=2, visual=300)
    logits, _ = language(model, 320).start(asked, images_see_ahead=see_ahead)
    for image in range(2):
        assert off(logits[image], expected(weights, asked, image, see_ahead=see_ahead)[0]) < 2 * TOLERANCE


def test_beams_are_those_of_numpy(model, weights):
    """Whole searches: sequences are shared and parted at every token."""
    asked, stop = prompt(), Stop((tiny_gguf.END,), 6)
    answers: list[list[int]] = [[]]

    def advance(tokens_M, rows_M):
        answers[:] = [[*answers[row], token] for token, row in zip(tokens_M.tolist(), rows_M.tolist(), strict=True)]
        return np.stack([expected(weights, asked, 0, answer)[-1] for answer in answers])

    wanted = beam_search(expected(weights, asked, 0), advance, stop, beams=4, length_penalty=1.0)
    found = beam_search(*language(model, beams=4).start(asked), stop, beams=4, length_penalty=1.0)
    np.testing.assert_array_equal(found[0], wanted[0])
    assert max(map(len, answers)) > 2


def test_a_model_reads_again_as_if_it_were_new(model):
    runs = language(model)
    first, _ = runs.start(prompt(seed=1))
    runs.start(prompt(seed=2))
    again, _ = runs.start(prompt(seed=1))
    np.testing.assert_array_equal(first, again)


def test_words_before_an_image_are_read_once(model, monkeypatch):
    """A prompt that begins as the last one did goes on from there, and says what it would on its own."""
    from edge_rsvlm.engines.llama_context import Context

    passes, run_pass = [], Context.run
    monkeypatch.setattr(Context, "run", lambda *given: passes.append(given[1].native.n_tokens) or run_pass(*given))
    runs, asked = language(model, beams=3), prompt(images=2)
    fresh, _ = runs.start(asked)
    assert passes == [2, 6, 6]
    others = Prompt(asked.ids_S, asked.visual_S, asked.visual_NTD[::-1], asked.positions)
    _, advance = runs.start(others)
    advance(np.array([40, 50]), np.arange(2))
    passes.clear()
    again, advance = runs.start(asked)
    assert passes == [6, 6]
    np.testing.assert_array_equal(again, fresh)
    # Another count of images, and rows that part: all is read again.
    runs.start(prompt(images=1))
    advance = runs.start(asked)[1]
    advance(np.array([40, 50]), np.array([1, 1]))
    passes.clear()
    np.testing.assert_array_equal(runs.start(asked)[0], fresh)
    assert passes == [2, 6, 6]


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


@pytest.fixture
def seeing(model, tmp_path):
    from edge_rsvlm.engines.llama_vision import LlamaVision

    return LlamaVision(language(model, 256), tiny_gguf.write_projector(tmp_path / "mmproj.gguf"))


def picture(side: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8)


def asked_of(seeing) -> str:
    return f"<|im_start|>User:{seeing.marker}what?<end_of_utterance>\nAssistant:"


def test_a_projector_sees(seeing):
    """Logits by NumPy from what the projector made of the image, and the words around it."""
    weights, words = tiny_gguf.text_weights(), asked_of(seeing)
    parts = list(seeing._parts(picture(), words))
    embeds = [weights["token_embd.weight"][part.ids_T] if part.visual_TD is None else part.visual_TD for part in parts]
    whole = np.concatenate(embeds)
    assert len(whole) == seeing.tokens(picture(), words) < 256
    # Four tiles and the overview, of 16 visual tokens each.
    assert [len(part.visual_TD) for part in parts if part.visual_TD is not None] == [16] * 5
    logits, advance, read = seeing.start(picture(), words)
    np.testing.assert_array_equal(read, np.concatenate([part.ids_T for part in parts if part.visual_TD is None]))
    after = advance(np.array([40]), np.array([0]))
    embeds = np.concatenate([whole, weights["token_embd.weight"][[40]]])
    wanted = tiny_gguf.reference_logits(weights, embeds, np.arange(len(embeds)))
    assert off(np.concatenate([logits, after]), wanted[-2:]) < 2 * TOLERANCE  # more is read
    other, *_ = seeing.start(255 - picture(), words)
    assert off(other, logits) > 0.05 and tiny_gguf.END in seeing.ends


def test_a_projector_and_a_model_that_are_not_of_one(model, tmp_path):
    from edge_rsvlm.engines.llama_vision import LlamaVision

    other = tiny_gguf.write_projector(tmp_path / "mmproj.gguf", dataclasses.replace(tiny_gguf.TINY, width=32))
    with pytest.raises(BundleError, match=r"cannot see by mmproj.gguf: .*mismatch"):
        LlamaVision(language(model, 256), other)
    other.write_bytes(other.read_bytes()[:2000])
    with pytest.raises(BundleError, match=r"cannot see by mmproj.gguf: .*failed to load"):
        LlamaVision(language(model, 256), other)


def test_images_that_are_too_long_are_not_encoded(model, tmp_path):
    from edge_rsvlm.engines.llama_vision import LlamaVision

    seeing = LlamaVision(language(model, 64), tiny_gguf.write_projector(tmp_path / "mmproj.gguf"))
    with pytest.raises(UsageError, match="the model reads 63"):
        seeing.start(picture(), asked_of(seeing))


def generator(seeing, **more) -> GgufGenerator:
    file = {"file": "f", "quantization": "F32"}
    task = GgufTask.model_validate({
        "kind": "gguf", "input": llama_bundles.IN_8_BITS, "model": file, "projector": file, "context_tokens": 256,
        "prompt": llama_bundles.PROMPT, "max_tokens": 6, "memory": MEMORY, **more,
    })  # fmt: skip
    return GgufGenerator(task, seeing)


def prepared(tiles: int = 1) -> Prepared:
    pixels = np.repeat(picture().transpose(2, 0, 1)[None], tiles, axis=0)
    return Prepared(pixels.astype(np.float32), 1, tiles, (1.0, 1.0, 0.0, 0.0))


def test_answers_of_a_model_that_sees(seeing):
    asked = generator(seeing)
    answers = asked.tokens([prepared(), prepared()], "what?")
    assert len(answers[0]) <= 6 and np.array_equal(*answers)
    logits = asked.follow(prepared(), "what?", answers[0])
    np.testing.assert_array_equal(logits.argmax(1), answers[0])
    assert asked([prepared()], "what?") == [seeing.text(answers[0].tolist()).strip()]
    warm = Sampling(temperature=1.0, seed=3, max_tokens=4)
    assert len(asked.tokens([prepared()], "what?", warm)[0]) <= 4


def test_repeated_tokens_are_penalised(seeing):
    """Those of the prompt from the first token on, and each of the answer from the next."""
    answer = np.array([40, 40])
    free, less = (generator(seeing, repetition_penalty=by).follow(prepared(), "what?", answer) for by in (1.0, 2.0))
    changed = [set(np.flatnonzero(logits).tolist()) for logits in free != less]
    *_, read = seeing.start(picture(), asked_of(seeing))
    assert changed == [set(read.tolist()), {*read.tolist(), 40}] and 40 not in changed[0]
    np.testing.assert_allclose(less[1, 40], free[1, 40] * (2 if free[1, 40] < 0 else 0.5))


def test_questions_that_cannot_be_asked(seeing):
    asked = generator(seeing)
    with pytest.raises(UsageError, match="would pass for the image"):
        asked([prepared()], f"what is {seeing.marker}?")
    with pytest.raises(UsageError, match="more than this bundle answers"):
        asked([prepared()], "what?", Sampling(temperature=0.0, max_tokens=7))
    with pytest.raises(BundleError, match="splits an image itself"):
        asked([prepared(2)], "what?")


def test_marks_of_boxes_stay_in_an_answer(seeing):
    open_, close = (tiny_gguf.SPECIAL.index(f"<|box_{end}|>") for end in ("start", "end"))
    words = [open_, tiny_gguf.vocabulary().index("7"), close, tiny_gguf.SPECIAL.index("<image>")]
    assert seeing.text(words) == "7"
    assert seeing.text(words, ("<|box_start|>", "<|box_end|>")) == "<|box_start|>7<|box_end|>"


ANSWERS = {"caption": "caption", "ask": "answer"}


def run(*arguments: object):
    return CliRunner().invoke(cli, [str(a) for a in arguments], standalone_mode=False)


@pytest.mark.parametrize("kind", ["alone", "hybrid"])
def test_bundles_answer_on_the_command_line(kind, needs, tmp_path):
    needs("onnx")
    bundle = getattr(llama_bundles, kind)(tmp_path / "b")
    asked = ("--bundle", bundle, "--allow-unsigned", "--json")
    for words in (("caption", SCENE), ("ask", SCENE, "how many boats?")):
        first, again = (run(*words, *asked) for _ in range(2))
        assert first.exception is None, first.exception
        said = [json.loads(done.stdout)[ANSWERS[words[0]]] for done in (first, again)]
        assert said[0] and said[0] == said[1]


@pytest.mark.parametrize("kind", ["alone", "hybrid"])
def test_memory_stays_in_the_plan(kind, needs, tmp_path):
    """Caches are larger than all else here: of one image in the sessions, and of each more that runs beside it."""
    needs("onnx")
    bundle = getattr(llama_bundles, kind)(tmp_path / "b", context_tokens=1 << 16)
    measure = [sys.executable, "-m", "edge_rsvlm.export.proof.measure_memory", str(bundle), "caption"]
    memory = json.loads(subprocess.run(measure, capture_output=True, text=True, check=True).stdout)
    cache_bytes = (1 << 16) * tiny_gguf.CACHE_BYTES_PER_TOKEN
    assert cache_bytes < memory["session_bytes"] < 3 * cache_bytes
    if kind == "hybrid":
        assert cache_bytes / 2 < memory["tile_bytes"] < 2 * cache_bytes
    fields = json.loads((bundle / "manifest.json").read_text())
    task = fields["tasks"]["caption"]
    task |= {"memory": memory, "input": task["input"] | {"whole_px": 0}}
    llama_bundles.hashed(bundle, tasks=fields["tasks"])
    Image.fromarray(picture(8 * task["input"]["tile_px"])).save(tmp_path / "scene.png")
    watched = [sys.executable, "-c", WATCHED, str(bundle), str(tmp_path / "scene.png")]
    done = subprocess.run(watched, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    batch, planned, peak, captions = map(int, done.stdout.split())
    assert batch > 1 and captions == 64 and peak <= planned < 3 * peak


WATCHED = """
import sys, threading, time
from pathlib import Path
from edge_rsvlm.budget import process_bytes
from edge_rsvlm.bundle import load_bundle
from edge_rsvlm.pipeline.session import Limits, Session

session = Session(load_bundle(Path(sys.argv[1]), allow_unsigned=True), Limits(memory_bytes=1 << 30))
plans, admit, peak = [], session.admit, 0
session.admit = lambda needs: plans.append(admit(needs)) or plans[-1]

def watch():
    global peak
    while True:
        peak = max(peak, process_bytes())
        time.sleep(0.001)

threading.Thread(target=watch, daemon=True).start()
captions = []
session.caption(sys.argv[2], lambda record, _: captions.append(record))
print(plans[0].batch, plans[0].total_bytes, peak, len(captions))
"""


def test_a_decoder_beside_graphs_penalises_repetition(needs, tmp_path):
    """As every other one, by the field of the task."""
    needs("onnx")
    asked = ("caption", SCENE, "--allow-unsigned", "--json")
    said = []
    for penalty in (1.0, 1e6):
        bundle = llama_bundles.hybrid(tmp_path / f"{penalty}", repetition_penalty=penalty, max_tokens=40)
        said.append(json.loads(run(*asked, "--bundle", bundle).stdout)["caption"])
    assert said[0] != said[1]


def off_by_name(name: str, found: str | None):
    def version(asked: str) -> str:
        if asked == name and found is None:
            raise metadata.PackageNotFoundError(name)
        return found if asked == name else metadata.version(asked)

    return version


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (None, "which runs GGUF models, is not installed"),
        ("0.2.90", "llama-cpp-python 0.2.90 is installed, and 0.3.36"),
    ],
)
def test_a_missing_or_another_library_is_told(found, message, monkeypatch):
    from edge_rsvlm.engines import llama_library

    original = metadata.version
    with monkeypatch.context() as patch:
        patch.setattr(metadata, "version", off_by_name("llama-cpp-python", found))
        with pytest.raises(UsageError, match=message) as caught:
            importlib.reload(llama_library)
    assert "pip install 'edge-rsvlm[gguf]'" in caught.value.fix and metadata.version is original
