"""Decoding of predictions, on sessions whose answers are known."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from edge_rsvlm.config.inputs import InputSpec, TaskMemory
from edge_rsvlm.config.task_specs import AnswerTask, DetectTask, MatchTask, OpenDetectTask
from edge_rsvlm.engines.fake import FakeSession
from edge_rsvlm.errors import BundleError
from edge_rsvlm.tasks import refer
from edge_rsvlm.tasks.answer import Answerer
from edge_rsvlm.tasks.detect import Detector, peaks
from edge_rsvlm.tasks.match import Matcher
from edge_rsvlm.tasks.open_detect import OpenDetector
from edge_rsvlm.tasks.scores import sigmoid, softmax
from edge_rsvlm.tasks.summary import summarise
from edge_rsvlm.types import Boxes

MEMORY = TaskMemory(session_bytes=1, tile_bytes=1)
TOKENIZER = {"file": "tokenizer.json", "add_special_tokens": True}
TEXT = {"graph": "text", "tokenizer": TOKENIZER}
INPUT = InputSpec(
    bands=("red", "green", "blue"), ranges={"uint8": (0, 255)}, mean=0.0, std=1.0, tile_px=32, overlap_px=0,
    resolution_m=None, whole_px=64, resampling="bilinear",
)  # fmt: skip
IMAGES = np.zeros((2, 3, 32, 32), np.float32)


class FakeTexts:
    """One token per text: its number in ``known``."""

    def __init__(self, known):
        self._known, self.asked = known, []

    def encode(self, texts):
        self.asked += texts
        ids = np.array([[self._known.index(text)] for text in texts], np.int64)
        return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


def text_session(embeddings):
    return FakeSession(lambda inputs: {"embedding": embeddings[inputs["input_ids"][:, 0]]})


def test_peaks_are_local_maxima_including_borders_and_plateaus():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 6, (2, 9, 11)).astype(np.float32) / 5
    expected = np.zeros(scores.shape, bool)
    for k, r, c in itertools.product(*map(range, scores.shape)):
        around = scores[k, max(r - 1, 0) : r + 2, max(c - 1, 0) : c + 2]
        expected[k, r, c] = scores[k, r, c] >= 0.4 and scores[k, r, c] >= around.max()
    np.testing.assert_array_equal(peaks(scores, 0.4), expected)


def test_boxes_are_distances_from_cell_centres():
    scores = np.zeros((1, 2, 8, 8), np.float32)
    ltrb = np.zeros((1, 4, 8, 8), np.float32)
    scores[0, 1, 2, 5], ltrb[0, :, 2, 5] = 0.8, (1, 2, 3, 4)
    scores[0, 0, 6, 1], ltrb[0, :, 6, 1] = 0.9, (5, 5, 5, 5)
    head = FakeSession(lambda inputs: {"scores": scores, "ltrb": ltrb})
    task = DetectTask(
        kind="heat_map", input=INPUT, encoder="e", head="h", encoder_outputs=("c1",), classes=("square", "car"),
        stride=4, score_threshold=0.5, nms_iou=0.5, max_boxes_per_tile=500, memory=MEMORY,
    )  # fmt: skip
    (boxes,) = Detector(task, head)({"c1": np.zeros((1, 1, 32, 32), np.float32)})
    np.testing.assert_allclose(boxes.xyxy_N4, [[1, 21, 11, 31], [21, 8, 25, 14]])
    assert boxes.labels_N.tolist() == [0, 1]
    assert boxes.scores_N == pytest.approx([0.9, 0.8])


def test_scores_of_huge_logits_are_finite():
    with np.errstate(all="raise", under="ignore"):
        assert sigmoid(np.array([-1000.0, 0.0, 1000.0])).tolist() == [0.0, 0.5, 1.0]
        assert softmax(np.array([[-1000.0, 1000.0], [3.0, 3.0]])).tolist() == [[0.0, 1.0], [0.5, 0.5]]


# Matching

PROMPTS = ["a photo of sea", "a photo of land", "sea"]
WORD_VECTORS = np.array([[3.0, 4.0], [0.0, 2.0], [1.0, 0.0]], np.float32)


def matcher(score="softmax", **spec):
    task = MatchTask(
        input=INPUT, encoder="e", text=TEXT, label_prompt="a photo of {label}", score=score, logit_scale=2.0,
        memory=MEMORY, **spec,
    )  # fmt: skip
    image_vectors = np.array([[5.0, 0.0], [0.0, 0.0]], np.float32)
    encoder = FakeSession(lambda inputs: {"embedding": image_vectors[: len(inputs["tiles"])]})
    session, texts = text_session(WORD_VECTORS), FakeTexts(PROMPTS)
    return Matcher(task, encoder, session, texts), session, texts


def test_embeddings_have_length_one_and_texts_are_taken_as_they_are():
    match, _, texts = matcher()
    np.testing.assert_allclose(match.images(IMAGES), [[1, 0], [0, 0]])
    np.testing.assert_allclose(match.texts(["sea"]), [[1, 0]])
    assert texts.asked == ["sea"]


def test_class_scores_follow_the_prompt_and_are_embedded_once():
    match, session, _ = matcher()
    images_ND = match.images(IMAGES[:1])
    for _ in range(2):
        scores = match.scores(images_ND, ["sea", "land"])  # cosines 0.6 and 0
    np.testing.assert_allclose(scores, softmax(np.array([[1.2, 0.0]])), rtol=1e-6)
    assert session.calls == 1
    np.testing.assert_allclose(match.scores(images_ND, ["land", "sea"]), scores[:, ::-1], rtol=1e-6)
    assert session.calls == 2


def test_sigmoid_scores_have_a_bias():
    match, _, _ = matcher("sigmoid", logit_bias=-1.0)
    scores = match.scores(match.images(IMAGES[:1]), ["sea", "land"])
    np.testing.assert_allclose(scores, 1 / (1 + np.exp([[-0.2, 1.0]])), rtol=1e-6)


def test_many_labels_are_embedded_in_parts():
    match, session, texts = matcher()
    found = match.texts(["sea", PROMPTS[1]] * 50)
    assert found.shape == (100, 2) and session.calls == 7
    np.testing.assert_allclose(found, [[1, 0], [0, 1]] * 50)
    assert len(texts.asked) == 100


def test_an_embedding_is_made_by_a_head_and_texts_by_the_output_that_the_task_names():
    seen = []
    encoder = FakeSession(lambda inputs: {"c4": inputs["tiles"][:, :2], "c5": inputs["tiles"][:, :1]})
    head = FakeSession(lambda inputs: seen.append(sorted(inputs)) or {"embedding": inputs["c4"].mean(axis=(2, 3))})
    text = FakeSession(lambda inputs: {"scene": WORD_VECTORS[inputs["input_ids"][:, 0]], "embedding": None})
    task = MatchTask(
        input=INPUT, encoder="e", encoder_outputs=("c5", "c4"), head="h", text=TEXT | {"output": "scene"},
        label_prompt="{label}", score="softmax", logit_scale=1.0, memory=MEMORY,
    )  # fmt: skip
    match = Matcher(task, encoder, text, FakeTexts(PROMPTS), head)
    tiles = np.tile(np.array([3.0, 4.0, 0.0], np.float32)[None, :, None, None], (2, 1, 8, 8))
    np.testing.assert_allclose(match.images(tiles), [[0.6, 0.8]] * 2)
    np.testing.assert_allclose(match.texts(["sea"]), [[1, 0]])
    assert seen == [["c4", "c5"]]
    for half in ({"head": None}, {"encoder_outputs": ()}):
        with pytest.raises(ValueError, match="name both, or neither"):
            MatchTask.model_validate(task.model_dump() | half)


# Open-vocabulary detection


def open_detector(outputs, queries, threshold=None, most=10):
    task = OpenDetectTask(
        kind="open_vocabulary", input=INPUT, encoder="e", text=TEXT, query_prompt="{label}", score_threshold=0.4,
        nms_iou=0.5, max_boxes_per_tile=most, memory=MEMORY,
    )  # fmt: skip
    labels = [f"label {q}" for q in range(len(queries))]
    encoder = FakeSession(lambda inputs: outputs)
    return OpenDetector(task, encoder, text_session(queries), FakeTexts(labels), labels, score_threshold=threshold)


def made_up(images=2, proposals=50, dims=8, queries=3):
    rng = np.random.default_rng(7)
    outputs = {
        "class_embeds": rng.normal(size=(images, proposals, dims)),
        "boxes": rng.uniform(0, 1, (images, proposals, 4)),
        "logit_shift": rng.normal(size=(images, proposals)),
        "logit_scale": rng.uniform(0, 4, (images, proposals)),
    }
    outputs = {name: values.astype(np.float32) for name, values in outputs.items()}
    return outputs, rng.normal(size=(queries, dims)).astype(np.float32)


def test_open_detection_box_by_box():
    outputs, queries = made_up()
    found = open_detector(outputs, queries)(IMAGES)
    for n, boxes in enumerate(found):
        expected = []
        for p in range(50):
            vector = outputs["class_embeds"][n, p]
            cosines = [vector @ q / np.linalg.norm(vector) / np.linalg.norm(q) for q in queries]
            logits = (np.array(cosines) + outputs["logit_shift"][n, p]) * outputs["logit_scale"][n, p]
            x, y, w, h = outputs["boxes"][n, p]
            if (score := 1 / (1 + np.exp(-logits.max()))) > 0.4:
                expected.append((score, logits.argmax(), (x - w / 2, y - h / 2, x + w / 2, y + h / 2)))
        expected = sorted(expected, key=lambda box: -box[0])[:10]
        np.testing.assert_allclose(boxes.scores_N, [box[0] for box in expected], rtol=1e-5)
        assert boxes.labels_N.tolist() == [box[1] for box in expected]
        np.testing.assert_allclose(boxes.xyxy_N4, [box[2] for box in expected], rtol=1e-6)


def test_a_score_must_exceed_the_threshold_and_no_box_is_no_error():
    outputs, queries = made_up()
    outputs["logit_scale"][:] = 0  # every score is one half
    assert [len(b.scores_N) for b in open_detector(outputs, queries, 0.5)(IMAGES)] == [0, 0]
    assert [b.xyxy_N4.shape for b in open_detector(outputs, queries, 0.499, most=1000)(IMAGES)] == [(50, 4)] * 2


def test_open_detection_equals_transformers(needs):
    needs("transformers")
    import torch
    from transformers import Owlv2Config
    from transformers.models.owlv2.image_processing_pil_owlv2 import Owlv2ImageProcessorPil
    from transformers.models.owlv2.modeling_owlv2 import Owlv2ClassPredictionHead, Owlv2ObjectDetectionOutput

    torch.manual_seed(0)
    head = Owlv2ClassPredictionHead(Owlv2Config(text_config={"hidden_size": 8}, vision_config={"hidden_size": 12}))
    patches, boxes, queries = torch.randn(2, 50, 12), torch.rand(2, 50, 4), torch.randn(3, 8)
    with torch.inference_mode():
        logits, _ = head(patches, queries.expand(2, -1, -1), None)
        shift, scale = head.logit_shift(patches)[..., 0], head.elu(head.logit_scale(patches))[..., 0] + 1
    expected = Owlv2ImageProcessorPil().post_process_object_detection(
        Owlv2ObjectDetectionOutput(logits=logits, pred_boxes=boxes), threshold=0.5
    )
    outputs = {
        "class_embeds": head.dense0(patches).detach().numpy(), "boxes": boxes.numpy(), "logit_shift": shift.numpy(),
        "logit_scale": scale.numpy(),
    }  # fmt: skip
    found = open_detector(outputs, queries.numpy(), 0.5, most=1000)(IMAGES)
    for ours, theirs in zip(found, expected, strict=True):
        order = torch.argsort(-theirs["scores"], stable=True)
        assert 0 < len(order) < 50
        np.testing.assert_allclose(ours.scores_N, theirs["scores"][order], rtol=1e-5)
        np.testing.assert_array_equal(ours.labels_N, theirs["labels"][order])
        np.testing.assert_allclose(ours.xyxy_N4, theirs["boxes"][order], atol=1e-6)


# Answers of one class of many


def answerer(logits, answers, score="sigmoid", image_input=INPUT, seen=None):
    task = AnswerTask(
        kind="answer_classes", input=image_input, graph="vqa", tokenizer=TOKENIZER, answers="answers.txt", score=score,
        memory=MEMORY,
    )  # fmt: skip

    def run(inputs):
        if seen is not None:
            seen.update({name: values.shape for name, values in inputs.items()})
        return {"logits": np.array(logits, np.float32)}

    return Answerer(task, FakeSession(run), FakeTexts(["how many?"]), answers)


def test_the_five_best_answers_of_each_image():
    seen = {}
    logits = [[0, 1, 2, 3, 4, 5, 6], [9, 0, 0, 0, 0, 0, 0]]
    first, second = answerer(logits, list("abcdefg"), seen=seen)(IMAGES, "how many?")
    assert [text for text, _ in first] == list("gfedc")
    assert [score for _, score in first] == pytest.approx(sigmoid(np.array([6.0, 5, 4, 3, 2])).tolist())
    assert [text for text, _ in second] == list("abcde")
    assert seen["tiles"] == IMAGES.shape and seen["input_ids"] == seen["attention_mask"] == (2, 1)


def test_few_answers_and_regions_instead_of_pixels():
    seen = {}
    (found,) = answerer([[1.0, 1.0]], ["yes", "no"], "softmax", None, seen)(
        np.zeros((1, 36, 8), np.float32), "how many?"
    )
    assert found == [("yes", 0.5), ("no", 0.5)]
    assert seen["features"] == (1, 36, 8) and "tiles" not in seen


def test_as_many_answers_as_logits_or_the_bundle_is_broken():
    with pytest.raises(BundleError, match="3 answers apart"):
        answerer([[1, 2, 3]], ["yes", "no"])(IMAGES[:1], "how many?")


def test_summary_leads_with_what_most_of_the_scene_agrees_on():
    fields, sea = "there is a piece of farmland", "the blue sea with some waves"
    assert summarise([fields], [1]) == fields
    assert summarise([fields, sea, fields], [1, 1, 1]) == f"{fields}; elsewhere, {sea}"
    assert summarise([fields, sea, fields], [10, 1, 10]) == fields
    assert summarise([], []) == ""
    assert summarise(["", "  "], [1, 1]) == ""
    assert summarise(["", sea], [9, 1]) == sea


def test_objects_are_described_by_place_kind_and_rank_among_their_kind():
    boxes = np.array([[0.0, 0, 10, 10], [50, 0, 90, 20], [20, 40, 24, 44], [90, 90, 99, 99]])
    objects = Boxes(boxes, np.array([0.5, 1, 1, 1], np.float32), np.array([0, 0, 0, 1]))
    described = refer.describe(objects, (100, 100), kinds=2)
    assert described.shape == (4, refer.feature_count(2))
    place, kind, ranks = np.split(described, [refer.PLACE, refer.PLACE + 2], axis=1)
    np.testing.assert_allclose(place[1, :6], [0.5, 0, 0.9, 0.2, 0.7, 0.1])
    assert kind.tolist() == [[0.5, 0], [1, 0], [1, 0], [0, 1]]
    left, right, top, _, largest, _ = ranks[:, :-1].reshape(4, refer.ORDERS, refer.RANKS).argmax(axis=2).T
    assert left.tolist() == [0, 2, 1, 0] and right.tolist() == [2, 0, 1, 0]
    assert top.tolist() == [0, 1, 2, 0] and largest.tolist() == [1, 0, 2, 0]
    assert ranks[3, -1] == 0, "alone of its kind"


def test_an_object_of_two_names_is_described_once_and_by_the_likelier():
    boxes = np.array([[0.0, 0, 10, 10], [1, 0, 11, 10], [50, 50, 60, 60]])
    objects = Boxes(boxes, np.array([0.4, 0.9, 0.6], np.float32), np.array([0, 1, 0]))
    assert refer.one_of_each(objects, most=5).labels_N.tolist() == [1, 0]
    assert refer.one_of_each(objects, most=1).scores_N.tolist() == [pytest.approx(0.9)]
