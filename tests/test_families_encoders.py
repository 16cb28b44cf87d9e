"""Families that do not generate: graphs, manifest fragments, tokenizers and image processors against transformers."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch: not installed")
transformers = pytest.importorskip("transformers", reason="needs transformers: not installed")

from PIL import Image  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402

from edge_rsvlm.config.inputs import InputSpec  # noqa: E402
from edge_rsvlm.errors import UsageError  # noqa: E402
from edge_rsvlm.export.families import image_processors, tokenizers  # noqa: E402
from edge_rsvlm.export.families.dual_encoder import stored_scalar  # noqa: E402
from edge_rsvlm.export.families.registry import FAMILIES, family_of  # noqa: E402
from tests import tiny_checkpoints as tiny  # noqa: E402
from tests.family_checks import (  # noqa: E402
    assert_same,
    check_description,
    check_graph,
    load,
    random_feeds,
    run_torch,
)

TEXT = "A satellite photo of 2 airplanes, and ships?"
TEXTS = [{"batch": 1, "text": 3}, {"batch": 3, "text": 11}]
IMAGES = [{"batch": 1}, {"batch": 3}]
SHAPES = [{"batch": 1, "text": 4, "height": 64, "width": 96}, {"batch": 3, "text": 9, "height": 112, "width": 48}]
REGIONS = [{"batch": 1, "text": 4, "regions": 2}, {"batch": 3, "text": 9, "regions": 7}]
DUAL = ("clip", "siglip", "align", "swin_bert")
OWLS = ("owlvit", "owlv2")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Folders by builder and layout, made once."""
    made = {}

    def folder(name, layout="5x"):
        if (name, layout) not in made:
            path = tmp_path_factory.mktemp(f"{name}_{layout}")
            if layout == "5x":
                tiny.ENCODERS[name](path)
            else:
                shutil.copytree(folder(name), path, dirs_exist_ok=True)
                tiny.as_4x(path)
            made[name, layout] = path
        return made[name, layout]

    return folder


def scene(height=90, width=140, seed=3):
    """A smooth image with edges, so that filters differ."""
    random = np.random.default_rng(seed)
    small = Image.fromarray(random.integers(0, 256, (9, 14, 3), dtype=np.uint8))
    return np.asarray(small.resize((width, height), Image.Resampling.NEAREST))


def pixels(loaded, image):
    processor = image_processors.load_image_processor(loaded.source.folder)
    return processor(images=Image.fromarray(image), return_tensors="np")["pixel_values"].astype(np.float32)


def tokens(description, fields, text, masked):
    """What the device feeds: tokenizer.json alone, and the manifest's fields."""
    tokenizer = Tokenizer.from_str(description.files["tokenizer.json"].decode())
    if fields.max_length:
        tokenizer.enable_truncation(fields.max_length)
    if fields.pad_to:
        tokenizer.enable_padding(length=fields.pad_to, pad_id=fields.pad_id)
    encoding = tokenizer.encode(text, add_special_tokens=fields.add_special_tokens)
    feeds = {"input_ids": np.array([encoding.ids])}
    return feeds | ({"attention_mask": np.array([encoding.attention_mask])} if masked else {})


@pytest.mark.parametrize(
    ("name", "graph", "sizes"),
    [(name, "text_encoder", TEXTS) for name in (*DUAL, *OWLS)]
    + [(name, "image_encoder", IMAGES) for name in (*DUAL, *OWLS)]
    + [("vilt", "answer", SHAPES), ("visual_bert", "answer", REGIONS)],
)
def test_graphs_run_as_their_modules_do(checkpoints, tmp_path, name, graph, sizes):
    check_graph(load(checkpoints(name)), graph, tmp_path, sizes)


@pytest.mark.parametrize("layout", ["5x", "4x"])
@pytest.mark.parametrize("name", DUAL)
@pytest.mark.parametrize("text", [TEXT, "ship", "water and trees " * 30])
def test_dual_encoders_equal_transformers(checkpoints, name, layout, text):
    loaded = load(checkpoints(name, layout))
    description, tasks = check_description(loaded)
    task, image = tasks.classify, scene()
    feeds = tokens(description, task.text.tokenizer, text, loaded.family.masked_text)
    image_embedding = run_torch(loaded, "image_encoder", {"tiles": pixels(loaded, image)})["unit_embedding"][0]
    text_embedding = run_torch(loaded, "text_encoder", feeds)["unit_embedding"][0]
    got = {
        "image_embedding": image_embedding,
        "text_embedding": text_embedding,
        "score": np.array([image_embedding @ text_embedding * task.logit_scale + task.logit_bias]),
    }
    assert_same(got, loaded.family.reference(loaded.source, loaded.model, image, text), 1e-4)
    assert np.linalg.norm(image_embedding) == pytest.approx(1, abs=1e-5)
    assert tasks.search == task


@pytest.mark.parametrize("name", ["clip", *OWLS])
def test_padding_and_batches_do_not_change_a_causal_text(checkpoints, name):
    """No mask is fed: what follows the end of a text is not seen."""
    loaded = load(checkpoints(name))
    description, tasks = check_description(loaded)
    fields = (tasks.classify or tasks.detect).text.tokenizer
    short = tokens(description, fields, "ship", False)["input_ids"]
    padded = np.full((2, short.shape[1] + 4), fields.pad_id)
    padded[0, : short.shape[1]] = short
    padded[1] = short[0, 0]
    padded[1, -1] = short[0, -1]
    alone = run_torch(loaded, "text_encoder", {"input_ids": short})["unit_embedding"][0]
    np.testing.assert_allclose(
        run_torch(loaded, "text_encoder", {"input_ids": padded})["unit_embedding"][0], alone, atol=1e-5
    )


def test_masked_texts_of_a_batch_equal_single_ones(checkpoints):
    for name in ("align", "swin_bert"):
        loaded = load(checkpoints(name))
        feeds = random_feeds(loaded.plan("text_encoder"), {"batch": 2, "text": 9})
        length = int(feeds["attention_mask"][1].sum())
        assert length < 9
        together = run_torch(loaded, "text_encoder", feeds)["unit_embedding"][1]
        alone = run_torch(loaded, "text_encoder", {key: value[1:, :length] for key, value in feeds.items()})
        np.testing.assert_allclose(together, alone["unit_embedding"][0], atol=1e-5)


@pytest.mark.parametrize("layout", ["5x", "4x"])
@pytest.mark.parametrize("name", OWLS)
def test_owl_scores_and_boxes_equal_transformers(checkpoints, name, layout):
    if name == "owlv2":
        pytest.importorskip("scipy", reason="needs scipy: not installed")
    loaded = load(checkpoints(name, layout))
    description, tasks = check_description(loaded)
    image, text = scene(), "a photo of a ship"
    found = run_torch(loaded, "image_encoder", {"tiles": pixels(loaded, image)})
    query = run_torch(loaded, "text_encoder", tokens(description, tasks.detect.text.tokenizer, text, False))
    cosine = found["class_embeds"][0] @ query["unit_embedding"][0]
    logits = (cosine + found["logit_shift"][0]) * found["logit_scale"][0]
    got = {"boxes": found["boxes"][0], "scores": 1 / (1 + np.exp(-logits))}
    assert_same(got, loaded.family.reference(loaded.source, loaded.model, image, text), 1e-4)
    assert tasks.ground == tasks.detect
    assert tasks.detect.query_prompt == "{label}", "words are asked for as they are, as transformers does"


def test_owlv2_without_its_processor_equals_transformers(checkpoints):
    """The same pixels into both, since its processor needs scipy."""
    loaded = load(checkpoints("owlv2"))
    feeds = random_feeds(loaded.plan("image_encoder"), {"batch": 2})
    found = run_torch(loaded, "image_encoder", feeds)
    first, last = loaded.source.config.text_config.bos_token_id, loaded.source.config.text_config.eos_token_id
    ids = np.array([[first, 20, 30, last], [first, 40, 50, last]])
    query = run_torch(loaded, "text_encoder", {"input_ids": ids})["unit_embedding"]
    with torch.inference_mode():
        want = loaded.model(
            pixel_values=torch.from_numpy(feeds["tiles"]), input_ids=torch.from_numpy(np.tile(ids, (2, 1)))
        )
    logits = found["class_embeds"] @ query.T + found["logit_shift"][..., None]
    np.testing.assert_allclose(logits * found["logit_scale"][..., None], want.logits.numpy(), atol=1e-4)
    np.testing.assert_allclose(found["boxes"], want.pred_boxes.numpy(), atol=1e-5)


@pytest.mark.parametrize("layout", ["5x", "4x"])
@pytest.mark.parametrize(("height", "width"), [(90, 140), (200, 64), (64, 64)])
def test_vilt_equals_transformers(checkpoints, layout, height, width):
    loaded = load(checkpoints("vilt", layout))
    description, tasks = check_description(loaded)
    image = scene(height, width)
    feeds = {"tiles": pixels(loaded, image)} | tokens(description, tasks.ask.tokenizer, TEXT, True)
    got = {"logits": run_torch(loaded, "answer", feeds)["logits"][0]}
    assert_same(got, loaded.family.reference(loaded.source, loaded.model, image, TEXT), 1e-4)
    assert description.files["answers.txt"].decode().splitlines() == list(tiny.ANSWERS)
    assert tasks.ask.score == "sigmoid"


@pytest.mark.parametrize("layout", ["5x", "4x"])
@pytest.mark.parametrize("text", [TEXT, "ship", "water and trees " * 30])
def test_visual_bert_equals_transformers(checkpoints, layout, text):
    loaded = load(checkpoints("visual_bert", layout))
    description, tasks = check_description(loaded)
    want = loaded.family.reference(loaded.source, loaded.model, scene(), text)
    feeds = {"features": want["features"][None]} | tokens(description, tasks.ask.tokenizer, text, True)
    np.testing.assert_allclose(run_torch(loaded, "answer", feeds)["logits"][0], want["logits"], atol=1e-4)
    assert tasks.ask.input is None


@pytest.mark.parametrize("name", ["vilt", "visual_bert"])
def test_questions_of_a_batch_equal_single_ones(checkpoints, name):
    loaded = load(checkpoints(name))
    feeds = random_feeds(loaded.plan("answer"), {"batch": 2, "text": 9, "height": 64, "width": 48, "regions": 5})
    length = int(feeds["attention_mask"][1].sum())
    alone = {key: value[1:] for key, value in feeds.items()}
    alone |= {key: alone[key][:, :length] for key in ("input_ids", "attention_mask")}
    together = run_torch(loaded, "answer", feeds)["logits"][1]
    np.testing.assert_allclose(together, run_torch(loaded, "answer", alone)["logits"][0], atol=1e-4)


def test_unknown_models_and_heads_are_named():
    with pytest.raises(UsageError, match=r"'bert' cannot be exported.*clip.*owlv2.*visual_bert"):
        family_of(transformers.BertConfig())
    with pytest.raises(UsageError, match=r"VisualBertForPreTraining.*VisualBertForQuestionAnswering"):
        family_of(transformers.VisualBertConfig(architectures=["VisualBertForPreTraining"]))
    assert len({model_type for family in FAMILIES for model_type in family.model_types}) >= 8


def test_refusals_of_vilt_and_visual_bert(checkpoints):
    vilt, bert = load(checkpoints("vilt")), load(checkpoints("visual_bert"))
    vilt.source.config.max_image_length = 100
    with pytest.raises(UsageError, match="max_image_length"):
        vilt.family.graphs(vilt.source)
    bert.source.config.bypass_transformer = True
    with pytest.raises(UsageError, match="bypass"):
        bert.family.graphs(bert.source)


def test_a_checkpoint_without_its_logit_scale_is_refused(checkpoints):
    folder = checkpoints("siglip")
    assert stored_scalar(folder, "logit_bias") == pytest.approx(load(folder).model.logit_bias.item())
    with pytest.raises(UsageError, match="no tensor 'temperature'"):
        stored_scalar(folder, "temperature")


# Tokenizers.


@pytest.mark.parametrize("layout", ["5x", "4x"])
@pytest.mark.parametrize("name", ["clip", "siglip", "align", "owlvit"])
def test_tokenizer_json_gives_the_same_ids(checkpoints, name, layout):
    tokenizer = tokenizers.load_tokenizer(checkpoints(name, layout))
    made = Tokenizer.from_str(tokenizers.tokenizer_json(tokenizer).decode())
    random = np.random.default_rng(0)
    letters = list("abc xyz ABC .,;!?'\"-_ 0123456789 éüß▁ 飞机 \n\t")
    for _ in range(200):
        text = "".join(random.choice(letters, random.integers(0, 40)))
        assert made.encode(text).ids == tokenizer(text)["input_ids"], text


def test_siglip_texts_with_a_character_map(tmp_path):
    spm = pytest.importorskip("sentencepiece", reason="needs sentencepiece: not installed")
    (tmp_path / "corpus.txt").write_text("\n".join(tiny.CORPUS))
    spm.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"), model_prefix=str(tmp_path / "spiece"), vocab_size=100, pad_id=0, eos_id=1,
        unk_id=2, bos_id=-1, hard_vocab_limit=False, normalization_rule_name="nmt_nfkc", minloglevel=2,
    )  # fmt: skip
    tokenizer = transformers.SiglipTokenizer(str(tmp_path / "spiece.model"))
    made = Tokenizer.from_str(tokenizers.tokenizer_json(tokenizer).decode())
    for text in (" ﬁne　wide  ½ ", "▁ a ▁photo", "　", "Ship."):
        assert made.encode(text).ids == tokenizer(text)["input_ids"], text


def test_a_tokenizer_that_cannot_be_carried_over_is_refused(checkpoints):
    tokenizer = tokenizers.load_tokenizer(checkpoints("align"))

    class Other:
        backend_tokenizer = tokenizer.backend_tokenizer

        def __call__(self, text, add_special_tokens):
            ids = tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
            return {"input_ids": [*ids, 1] if "飞" in text else ids}

    with pytest.raises(UsageError, match=r"飞机.*instead of"):
        tokenizers.tokenizer_json(Other())
    with pytest.raises(UsageError, match="runs in Python only"):
        tokenizers.tokenizer_json(object())


def test_tokenizer_fields(checkpoints):
    clip, siglip = (tokenizers.load_tokenizer(checkpoints(name)) for name in ("clip", "siglip"))
    assert tokenizers.tokenizer_fields(clip, 500)["max_length"] == 24
    assert tokenizers.tokenizer_fields(clip, 20)["max_length"] == 20
    assert tokenizers.tokenizer_fields(clip)["pad_to"] is None
    fields = tokenizers.tokenizer_fields(siglip, 64, 64)
    assert (fields["pad_to"], fields["pad_id"], fields["max_length"]) == (64, 1, 64)


def test_a_folder_without_files_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no tokenizer could be read"):
        tokenizers.load_tokenizer(tmp_path)
    with pytest.raises(UsageError, match="no image processor could be read"):
        image_processors.load_image_processor(tmp_path)


# Image processors.

PROCESSORS = {
    "CLIPImageProcessor": {"size": {"shortest_edge": 64}, "crop_size": 64},
    "SiglipImageProcessor": {"size": {"height": 64, "width": 48}},
    "BlipImageProcessor": {"size": {"height": 64, "width": 64}, "image_mean": 0.4, "image_std": 0.2},
    "ViTImageProcessor": {"size": 64, "do_normalize": False},
    "BitImageProcessor": {"size": {"shortest_edge": 72}, "crop_size": 64, "resample": 2, "rescale_factor": 1 / 127.5},
    "ConvNextImageProcessor": {"size": {"shortest_edge": 64}, "crop_pct": 0.875},
    "EfficientNetImageProcessor": {
        "size": 80, "crop_size": 64, "do_center_crop": True, "rescale_factor": 1 / 127.5, "rescale_offset": True,
    },
    "LlavaImageProcessor": {"size": {"shortest_edge": 64}, "crop_size": 64, "do_pad": True},
    "Owlv2ImageProcessor": {"size": {"height": 64, "width": 64}},
    "ViltImageProcessor": {"size": {"shortest_edge": 64}, "size_divisor": 32},
    "Idefics3ImageProcessor": {"size": {"longest_edge": 128}, "max_image_size": {"longest_edge": 64}},
    "SmolVLMImageProcessor": {
        "size": {"longest_edge": 128}, "max_image_size": {"longest_edge": 64}, "do_image_splitting": False,
    },
}  # fmt: skip


def made_processor(folder, kind, settings, nested):
    """Written by hand in one of the two layouts, and read back."""
    written = settings | {"image_processor_type": kind}
    if nested:
        (folder / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "ViTImageProcessor"}))
        (folder / "processor_config.json").write_text(json.dumps({"image_processor": written}))
    else:
        (folder / "preprocessor_config.json").write_text(json.dumps(written))
        (folder / "processor_config.json").write_text(json.dumps({"processor_class": "SomeProcessor"}))
    return image_processors.load_image_processor(folder)


@pytest.mark.parametrize("nested", [False, True], ids=["preprocessor_config", "processor_config"])
@pytest.mark.parametrize("kind", PROCESSORS)
def test_steps_make_the_pixels_of_the_processor(tmp_path, kind, nested):
    from edge_rsvlm.tiles.prepare import prepare

    if kind == "Owlv2ImageProcessor":
        pytest.importorskip("scipy", reason="needs scipy: not installed")
    processor = made_processor(tmp_path, kind, PROCESSORS[kind], nested)
    spec = InputSpec.model_validate(image_processors.input_spec(processor))
    for height, width in ((90, 140), (201, 77), (64, 64), (50, 40)):
        image = scene(height, width)
        want = processor(images=Image.fromarray(image), return_tensors="np")["pixel_values"].astype(np.float32)
        want = want.reshape(-1, *want.shape[-3:])
        got = prepare(image, spec.prepare, spec.mean, spec.std).pixels_KCHW
        assert got.shape == want.shape, (height, width)
        np.testing.assert_allclose(got, want, atol=1e-5, err_msg=f"{height} x {width}")
        fixed = image_processors.fixed_size(image_processors.prepare_steps(processor))
        assert fixed in (None, want.shape[-2:])


def test_input_spec_of_clip_and_qwen():
    clip = transformers.CLIPImageProcessorPil()
    spec = image_processors.input_spec(clip, overlap_share=0.25)
    assert (spec["tile_px"], spec["overlap_px"], spec["whole_px"], spec["resampling"]) == (224, 56, 1024, "bicubic")
    assert spec["mean"] == pytest.approx(clip.image_mean) and spec["std"] == pytest.approx(clip.image_std)
    qwen = transformers.Qwen2VLImageProcessorPil(min_pixels=3136, max_pixels=100352)
    spec = image_processors.input_spec(qwen)
    assert spec["prepare"] == [
        {"op": "smart_resize", "multiple": 28, "min_pixels": 3136, "max_pixels": 100352, "filter": "bicubic"}
    ]
    assert spec["tile_px"] == 308  # 316 px square is as much as max_pixels; cut down to the multiple
    assert image_processors.fixed_size(spec["prepare"]) is None
    assert image_processors.input_spec(transformers.Owlv2ImageProcessorPil())["whole_px"] == 1920


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (lambda: transformers.CLIPImageProcessorPil(do_resize=False), "does not resize"),
        (lambda: transformers.CLIPImageProcessorPil(resample=4), "filter 4"),
        (lambda: transformers.CLIPImageProcessorPil(size={"shortest_edge": 5, "longest_edge": 9}), "is not known"),
        (lambda: transformers.CLIPImageProcessorPil(do_pad=True), "pads images"),
        (lambda: transformers.MobileViTImageProcessorPil(), "MobileViTImageProcessor, which is not known"),
        (lambda: transformers.Idefics3ImageProcessorPil(size={"longest_edge": 5000}), "longest_edge"),
    ],
)
def test_processors_that_cannot_be_expressed_are_refused(processor, message):
    with pytest.raises(UsageError, match=message):
        image_processors.input_spec(processor())


def test_a_dual_encoder_with_images_of_any_shape_is_refused(checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints("clip", "4x"), tmp_path / "clip")
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(settings | {"do_center_crop": False}))
    loaded = load(folder)
    with pytest.raises(UsageError, match="one size only"):
        loaded.family.graphs(loaded.source)
