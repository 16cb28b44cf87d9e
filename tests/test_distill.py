"""Distillation: tiny random students come nearer to their teachers, runs resume, captions are kept, results export."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tarfile
from functools import cache

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch", reason="needs torch: not installed")
transformers = pytest.importorskip("transformers", reason="needs transformers: not installed")

from edge_rsvlm.errors import InputError, UsageError  # noqa: E402
from edge_rsvlm.export.chain import run_export  # noqa: E402
from edge_rsvlm.export.distilling import answers, captions, losses, pairs, run  # noqa: E402
from edge_rsvlm.export.distilling.data import read_data  # noqa: E402
from edge_rsvlm.export.distilling.generators import Generator  # noqa: E402
from edge_rsvlm.export.distilling.recipe import DistillRecipe, load_distill_recipe  # noqa: E402
from edge_rsvlm.export.distilling.run import distill  # noqa: E402
from edge_rsvlm.export.families.base import Source  # noqa: E402
from edge_rsvlm.export.families.registry import family_of  # noqa: E402
from edge_rsvlm.export.finetuning import loop  # noqa: E402
from edge_rsvlm.export.finetuning.samples import Encoder  # noqa: E402
from edge_rsvlm.export.recipe import Recipe  # noqa: E402
from tests import tiny_checkpoints as pairs_tiny  # noqa: E402
from tests import tiny_generators as tiny  # noqa: E402

NARROW = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
MAKERS = {
    "llava": tiny.llava,
    "llava narrow": lambda folder: tiny.llava(folder, text=NARROW),
    "smolvlm": lambda folder: tiny.idefics3(folder, smol=True),
    "idefics3": tiny.idefics3,
    "qwen2_vl": tiny.qwen,
    "qwen2_5_vl": lambda folder: tiny.qwen(folder, version="qwen2_5_vl"),
    "blip-2": tiny.blip_2,
    "clip": pairs_tiny.clip,
    "clip narrow": lambda folder: narrow_clip(folder),
    "siglip": pairs_tiny.siglip,
    "align": pairs_tiny.align,
    "swin_bert": pairs_tiny.swin_bert,
}
KINDS = {
    "generators": (
        "llava",
        "llava narrow",
        {"captions": {"max_tokens": 4}, "features": {}, "logits": {}, "labels": {}},
    ),
    "pairs": ("clip", "clip narrow", {"features": {}, "logits": {}}),
}
CAPTIONS = ("red", "two ships", "a harbour", "airplanes", "no roofs", "one road", "the colour of a ship", "green field")
NARROW_PX = 32


def narrow_clip(folder):
    """Of other widths, and of other images, than the tiny CLIP."""
    tokenizer = pairs_tiny.clip_tokenizer(folder, 24)
    ends = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    small = {"hidden_size": 24, "intermediate_size": 40}
    config = transformers.CLIPConfig(
        text_config=pairs_tiny.tower(vocab_size=len(tokenizer), max_position_embeddings=24, **ends, **{}) | small,
        vision_config=pairs_tiny.vision(image_size=NARROW_PX) | small,
        projection_dim=12,
    )
    images = transformers.CLIPImageProcessorPil(size={"shortest_edge": NARROW_PX}, crop_size=NARROW_PX)
    processor = transformers.CLIPProcessor(images, tokenizer)
    return pairs_tiny.save(folder, transformers.CLIPModel(config), processor)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The folder of a tiny checkpoint, made once."""
    return cache(lambda name: MAKERS[name](tmp_path_factory.mktemp(name.replace(" ", "_"))))


@pytest.fixture
def data(tmp_path):
    """Eight captioned images."""
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(len(CAPTIONS)):
        noise = np.random.default_rng(number).integers(0, 256, (5, 6, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((130, 90), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    return write(folder / "train.jsonl", [{"image": f"{n}.png", "caption": c} for n, c in enumerate(CAPTIONS)])


def write(path, lines):
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    return path


def recipe_of(teacher, student, data, out, given, **changes):
    common = {"teacher": teacher, "student": student, "data": data, "out": out, "steps": 3, "batch": 4, "rate": 3e-3}
    return DistillRecipe.model_validate(common | {"losses": given} | changes)


def log_of(out):
    return json.loads((out / "training.json").read_text())


def opened(folder):
    side = run.open_side(folder)
    return side, side.model(torch.device("cpu"), torch.float32)


def generator(folder):
    side, model = opened(folder)
    return Generator(model, Encoder(side.source, side.family), torch.device("cpu"))


def token_kl(teacher, student, data):
    """The mean KL over the answers' tokens, by transformers alone."""
    found = []
    for sample in read_data(data):
        encoded = student.encoder(sample)
        with torch.no_grad():
            said, wanted = (
                side.model(**encoded.inputs).logits[0, -encoded.answer_tokens - 1 : -1] for side in (student, teacher)
            )
        wanted, said = wanted.log_softmax(-1), said.log_softmax(-1)
        found.append(torch.nn.functional.kl_div(said, wanted, log_target=True, reduction="batchmean"))
    return float(torch.stack(found).mean())


def feature_cosine(teacher, student, data):
    """The mean cosine of the visual tokens, of students as wide as the teacher."""
    found = []
    for sample in read_data(data):
        inputs = student.encoder(sample).inputs["pixel_values"]
        with torch.no_grad():
            pair = [side.model.get_image_features(pixel_values=inputs).pooler_output[0] for side in (teacher, student)]
        found.append(torch.cosine_similarity(*pair, dim=-1).mean())
    return float(torch.stack(found).mean())


def export(checkpoint, out):
    return run_export(Recipe(checkpoint=checkpoint, out=out), lambda *_: None)


def test_a_narrower_llava_learns_what_its_teacher_would_say(checkpoint, data, tmp_path):
    folders = checkpoint("llava"), checkpoint("llava narrow")
    given = {"logits": {"weight": 1.0, "temperature": 2.0}, "features": {"weight": 1.0}, "labels": {"weight": 0.0}}
    out = distill(recipe_of(*folders, data, tmp_path / "student", given, steps=30))
    teacher = generator(folders[0])
    before, after = (token_kl(teacher, generator(folder), data) for folder in (folders[1], out))
    print("KL", before, after)
    assert after < 0.5 * before
    measured = log_of(out)["losses"]
    assert list(measured) == ["total", "labels", "logits", "features"] and len(measured["total"]) == 30
    assert np.mean(measured["features"][-4:]) < 0.7 * measured["features"][0]
    assert measured["total"][0] == pytest.approx(measured["logits"][0] + measured["features"][0], rel=1e-4)
    assert not list(tmp_path.glob(".student*")) and not (tmp_path / "distill-captions.jsonl").exists()
    assert (out / "tokenizer.model").is_file() or (out / "tokenizer.json").is_file()
    assert (export(out, tmp_path / "bundle") / "manifest.json").is_file()


def test_features_alone_and_only_the_parts_that_train(checkpoint, data, tmp_path):
    folder = checkpoint("llava")
    student = tiny.as_4x(copied(folder, tmp_path / "start", torch.bfloat16))
    train = ("model.vision_tower", "model.multi_modal_projector")
    given = {"features": {"kind": "cosine"}}
    recipe = recipe_of(folder, student, data.parent, tmp_path / "student", given, steps=40, train=train)
    out = distill(recipe)
    teacher = generator(folder)
    before, after = (feature_cosine(teacher, generator(place), data) for place in (student, out))
    assert after > before + 0.2
    start, end = opened(student)[1].state_dict(), opened(out)[1].state_dict()
    changed = {name for name in start if not torch.equal(start[name], end[name])}
    assert changed and all(name.startswith(train) for name in changed)
    assert log_of(out)["samples_of_images"] == 8
    assert {tensor.dtype for tensor in run.open_side(out).checkpoint.tensors.values()} == {torch.bfloat16}
    with pytest.raises(UsageError, match=r"no parameter is named model.tower.*model.vision_tower"):
        distill(recipe.model_copy(update={"out": tmp_path / "other", "train": ("model.tower",)}))
    with pytest.raises(UsageError, match="no loss depends on"):
        distill(recipe.model_copy(update={"out": tmp_path / "other", "train": ("lm_head",)}))


def copied(folder, to, dtype=torch.float32):
    """The same checkpoint with other weights."""
    _, model = opened(folder)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.flatten()[torch.randperm(parameter.numel())].reshape(parameter.shape))
    model.to(dtype).save_pretrained(to)
    for file in folder.iterdir():
        if file.is_file() and not (to / file.name).exists() and file.suffix != ".safetensors":
            (to / file.name).write_bytes(file.read_bytes())
    return to


def unit_embeddings(folder, data):
    """Of the images and captions, by transformers alone, and the similarities."""
    side, model = opened(folder)
    encoder = pairs.PairEncoder(side.source, side.family)
    samples = read_data(data)
    with torch.no_grad():
        output = model(pixel_values=encoder.images(samples), **encoder.texts(samples))
    return output.image_embeds, output.text_embeds, output.logits_per_image


def row_kl(wanted, said):
    return float(
        torch.nn.functional.kl_div(said.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="batchmean")
    )


def test_a_narrower_clip_learns_its_teachers_similarities(checkpoint, data, tmp_path):
    folders = checkpoint("clip"), checkpoint("clip narrow")
    given = {"logits": {"weight": 1.0}, "features": {"weight": 1.0, "kind": "mse"}}
    out = distill(recipe_of(*folders, data, tmp_path / "student", given, steps=60, batch=8))
    wanted, before, after = (unit_embeddings(folder, data)[2] for folder in (*folders, out))
    assert row_kl(wanted, after) < 0.5 * row_kl(wanted, before)
    assert row_kl(wanted.T, after.T) < 0.5 * row_kl(wanted.T, before.T)
    measured = log_of(out)["losses"]
    assert measured["features"][-1] < 0.7 * measured["features"][0]
    both = 0.5 * (row_kl(wanted, before) + row_kl(wanted.T, before.T))
    assert measured["logits"][0] == pytest.approx(both, rel=1e-4)
    assert (export(out, tmp_path / "bundle") / "manifest.json").is_file()


@pytest.mark.parametrize("name", ["clip", "siglip", "align", "swin_bert"])
def test_dual_encoders_of_every_family_come_nearer(name, checkpoint, data, tmp_path):
    folder = checkpoint(name)
    student = copied(folder, tmp_path / "start")
    out = distill(recipe_of(folder, student, data, tmp_path / "student", {"features": {}, "logits": {}}, steps=12))
    wanted, before, after = (unit_embeddings(place, data) for place in (folder, student, out))
    for target, start, end in list(zip(wanted, before, after, strict=True))[:2]:
        assert torch.cosine_similarity(target, end).mean() > torch.cosine_similarity(target, start).mean()


PAIRS = [("smolvlm", "idefics3"), ("qwen2_vl", "qwen2_5_vl"), ("blip-2", "blip-2"), ("llava", "qwen2_vl")]


@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_generators_of_every_family_teach(teacher, student, checkpoint, data, tmp_path):
    folders = checkpoint(teacher), checkpoint(student)
    given = {"captions": {"max_tokens": 5}, "features": {"pool": True}, "labels": {}}
    if teacher != "llava":
        given["logits"] = {}
    out = distill(recipe_of(*folders, data, tmp_path / "student", given, steps=3, batch=8))
    log = log_of(out)
    assert log["samples"] == 16 and log["samples_of_captions"] == log["samples_of_labels"] == 8
    for name in ("captions", "labels", "features"):
        assert any(loss is not None for loss in log["losses"][name])
    assert all(np.isfinite(loss) for loss in log["losses"]["total"])
    assert log["losses"]["total"][-1] < log["losses"]["total"][0]


def test_images_come_from_archives_too(checkpoint, data, tmp_path):
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        for file in data.parent.glob("*.png"):
            tar.add(file, f"train/{file.name}")
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    named = write(tmp_path / "named.jsonl", [{**line, "image": f"train/{line['image']}"} for line in lines])
    folders = checkpoint("llava"), checkpoint("llava narrow")
    given = {"captions": {"max_tokens": 3}}
    beside = distill(recipe_of(*folders, data, tmp_path / "beside", given))
    apart = distill(recipe_of(*folders, named, tmp_path / "apart", given, images=tmp_path / "images.tar"))
    assert log_of(apart)["losses"] == log_of(beside)["losses"]
    assert len((tmp_path / "distill-captions.jsonl").read_text().splitlines()) == 8


@pytest.mark.parametrize("name", ["llava", "smolvlm", "qwen2_5_vl", "blip-2"])
def test_captions_are_those_of_transformers(name, checkpoint, data):
    teacher = generator(checkpoint(name))
    sample = read_data(write(data.parent / "ask.jsonl", [{"image": "1.png", "question": "what?", "answer": "a"}]))[0]
    config = transformers.AutoConfig.from_pretrained(checkpoint(name))
    with Image.open(sample.image) as image:
        wanted = family_of(config).reference(
            Source(checkpoint(name), config), teacher.model, np.asarray(image.convert("RGB")), "what?"
        )["tokens"]
    assert teacher.generate(sample, 0.0, 16) == wanted.tolist()


def asked_of(folder, data, **changes):
    """The requests of a recipe and their samples."""
    from edge_rsvlm.export.distilling.recipe import Captions

    side = run.open_side(folder)
    samples = read_data(data.parent)
    settings = Captions(**{"max_tokens": 6, **changes})
    wanted = captions.requests(samples, Encoder(side.source, side.family), side.sha256, settings, 3)
    return dict(zip(wanted, samples, strict=True))


ALONE = loop.Process(0, 1, torch.device("cpu"))


def test_captions_are_kept_line_by_line(checkpoint, data, tmp_path):
    folder, path = checkpoint("llava"), tmp_path / "kept.jsonl"
    wanted = asked_of(folder, data)
    teacher = cache(lambda: generator(folder))
    whole = captions.write_captions(path, wanted, teacher, ALONE, lambda *_: None)
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) == len(whole) == 8 and {asked.image for asked in whole} == {a.image for a in wanted}
    path.write_bytes(b"".join(lines[:5]) + lines[5][:20])  # killed while it wrote the sixth
    heard, asks = [], []

    def counted():
        asks.append(1)
        return teacher()

    again = captions.write_captions(path, wanted, counted, ALONE, lambda *at: heard.append(at))
    assert again == whole and path.read_bytes().splitlines(keepends=True) == lines and len(asks) == 3
    assert heard == [(5, 8), (6, 8), (7, 8), (8, 8)]

    def nobody():
        raise AssertionError("everything is there")

    assert captions.write_captions(path, wanted, nobody, ALONE, lambda *_: None) == whole
    for changes in ({"max_tokens": 7}, {"temperature": 0.5}):
        assert not captions.read_captions(path).keys() & asked_of(folder, data, **changes).keys()
    assert not captions.read_captions(path).keys() & asked_of(checkpoint("llava narrow"), data).keys()
    path.write_bytes(lines[0] + b"{}\n" + lines[1])
    with pytest.raises(InputError, match=r"kept.jsonl:2: 'teacher'"):
        captions.read_captions(path)


def test_drawn_captions_do_not_depend_on_what_came_before(checkpoint, data, tmp_path):
    folder = checkpoint("llava")
    wanted = asked_of(folder, data, temperature=1.5)
    teacher = cache(lambda: generator(folder))
    one = captions.write_captions(tmp_path / "one.jsonl", wanted, teacher, ALONE, lambda *_: None)
    backwards = dict(reversed(wanted.items()))
    assert captions.write_captions(tmp_path / "two.jsonl", backwards, teacher, ALONE, lambda *_: None) == one
    greedy = captions.write_captions(tmp_path / "one.jsonl", asked_of(folder, data), teacher, ALONE, lambda *_: None)
    assert [w.answer for w in greedy.values()] != [w.answer for w in one.values()]


class Killed(Exception):
    pass


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_goes_on(kind, checkpoint, data, tmp_path, monkeypatch):
    teacher, student, given = KINDS[kind]
    recipe = recipe_of(checkpoint(teacher), checkpoint(student), data, tmp_path / "cut", given, steps=5)
    whole = distill(recipe.model_copy(update={"out": tmp_path / "whole"}))
    monkeypatch.setattr(loop, "CHECKPOINT_EVERY_S", 0.0)
    for stop in (2, 4):

        def kill(step, done, loss, stop=stop):
            if step == stop:
                raise Killed

        with pytest.raises(Killed):
            distill(recipe, kill)
        assert not (tmp_path / "cut").exists()
    with pytest.raises(InputError, match="another recipe"):
        distill(recipe.model_copy(update={"rate": 1.0}))
    seen = []
    cut = distill(recipe, lambda step, done, loss: seen.append(step))
    assert seen == [5]
    for name, values in log_of(whole)["losses"].items():
        np.testing.assert_allclose(np.array(log_of(cut)["losses"][name], float), np.array(values, float), atol=1e-6)
    one, other = (opened(folder)[1].state_dict() for folder in (whole, cut))
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name])


@pytest.mark.parametrize("kind", KINDS)
def test_processes_share_a_batch(kind, checkpoint, data, tmp_path):
    teacher, student, given = KINDS[kind]
    recipe = recipe_of(checkpoint(teacher), checkpoint(student), data, tmp_path / "two", given, steps=2, batch=3)
    alone = distill(recipe.model_copy(update={"out": tmp_path / "alone" / "one"}))
    together(recipe)
    two = log_of(tmp_path / "two")["losses"]
    for name, values in log_of(alone)["losses"].items():
        np.testing.assert_allclose(np.array(two[name], float), np.array(values, float), rtol=1e-4, atol=1e-6)
    if kind == "generators":
        texts = [(parent / "distill-captions.jsonl").read_text() for parent in (tmp_path / "alone", tmp_path)]
        assert sorted(texts[0].splitlines()) == sorted(texts[1].splitlines()) and len(texts[0].splitlines()) == 8


def together(recipe):
    """In two processes."""
    code = (
        "import sys; from edge_rsvlm.export.distilling import run, recipe; "
        "run.distill(recipe.DistillRecipe.model_validate_json(sys.argv[1]))"
    )
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", code, recipe.model_dump_json()],
            env={**os.environ, **shared, "RANK": str(rank), "CUDA_VISIBLE_DEVICES": ""},
        )
        for rank in (0, 1)
    ]
    assert [one.wait(timeout=300) for one in runs] == [0, 0]


def test_similarities_of_sigmoid_models_are_pairs():
    torch.manual_seed(0)
    teacher, student = torch.randn(2, 4, 4)
    p, q = teacher.sigmoid(), student.sigmoid()
    wanted = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum(1).mean()
    torch.testing.assert_close(losses.similarity_divergence(student, teacher, 1.0, "sigmoid"), wanted)
    assert float(losses.similarity_divergence(teacher, teacher, 3.0, "softmax")) == pytest.approx(0, abs=1e-6)


WRONG = {
    "vocabularies": ("llava", "qwen2_vl", {"logits": {}, "labels": {}}, r"one vocabulary.*use \[losses.captions\]"),
    "kinds": ("llava", "clip", {"features": {}}, "'llava' cannot teach one of 'clip'"),
    "no answers": ("llava", "llava", {"logits": {}}, "there are none; add .losses.captions"),
    "tokens": ("llava", "blip-2", {"features": {}}, r"9 visual tokens of the teacher and 5 of.*pool = true"),
    "writing": ("clip", "clip", {"captions": {}}, r"\[losses.captions\]: dual encoders write no text"),
    "scores": ("clip", "siglip", {"logits": {}}, "scores pairs by softmax, the student by sigmoid"),
    "nothing": ("clip", "clip", {"logits": {"weight": 0.0}}, "nothing to learn"),
    "family": ("clip", "owl", {"features": {}}, "'clip' cannot teach one of 'owl'"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_go_together_is_refused(case, checkpoint, data, tmp_path):
    teacher, student, given, message = WRONG[case]
    folder = pairs_tiny.owlvit(tmp_path) if student == "owl" else checkpoint(student)
    with pytest.raises(UsageError, match=message):
        distill(recipe_of(checkpoint(teacher), folder, data, tmp_path / "student", given))
    assert not (tmp_path / "student").exists()


def test_folders_of_images_have_no_answers(checkpoint, data, tmp_path):
    for name, given, message in (
        ("llava", {"labels": {}}, "needs answers, and a folder"),
        ("clip", {"logits": {}}, "images with texts, and a folder"),
    ):
        with pytest.raises(UsageError, match=message):
            distill(recipe_of(checkpoint(name), checkpoint(name), data.parent, tmp_path / "student", given))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no images in .*empty"):
        read_data(tmp_path / "empty")
    asked = write(data.parent / "ask.jsonl", [{"image": "1.png", "question": "what?", "answer": "a"}])
    with pytest.raises(InputError, match=r"ask.jsonl:1 has no caption"):
        distill(recipe_of(checkpoint("clip"), checkpoint("clip"), asked, tmp_path / "student", {"features": {}}))


def test_vocabularies_are_compared_token_by_token(checkpoint):
    encoder = generator(checkpoint("llava")).encoder
    answers.check_vocabularies(encoder, generator(checkpoint("llava narrow")).encoder)
    with pytest.raises(UsageError, match=r"'!' is number none of the one and 0 of the other"):
        answers.check_vocabularies(encoder, generator(checkpoint("smolvlm")).encoder)


def test_recipes(tmp_path):
    path = tmp_path / "DISTILL.toml"
    path.write_text(
        'version = 1\nteacher = "t"\nstudent = "s"\ndata = "d"\nout = "o"\nminutes = 2\ncaptions = "c.jsonl"\n'
        '[losses.logits]\ntemperature = 3.0\n[losses.features]\nkind = "mse"\n'
    )
    recipe = load_distill_recipe(path)
    assert (recipe.teacher, recipe.captions_file) == (tmp_path / "t", tmp_path / "c.jsonl")
    assert recipe.losses.weights == {"logits": 1.0, "features": 1.0}
    path.write_text(path.read_text().replace("temperature", "temprature"))
    with pytest.raises(UsageError, match="did you mean 'temperature'"):
        load_distill_recipe(path)
    assert recipe.images is None
    assert recipe.model_copy(update={"captions": None}).captions_file == tmp_path / "distill-captions.jsonl"
