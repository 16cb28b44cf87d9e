"""What the default model is taught: objects by kind, phrases, questions, and tiles made worse."""

from __future__ import annotations

import numpy as np
import pytest

for name in ("torch", "onnx", "onnxscript", "onnxruntime", "safetensors"):
    pytest.importorskip(name, reason=f"needs {name}: not installed")


def objects_of(boxes, names, size=(400, 400)):
    from edge_rsvlm.export.default.data.phrases import Objects

    return Objects(np.array(boxes, float), names, size)


def said(boxes, names, size=(400, 400)):
    from edge_rsvlm.export.default.data.phrases import phrases

    return {p.words: p.boxes for p in phrases(objects_of(boxes, names, size))}


def test_targets_by_kind_decode_to_their_boxes():
    from edge_rsvlm.export.default.data.objects import KINDS, SETS, targets

    boxes = np.array([[10.0, 20, 42, 60], [100, 90, 130, 110], [200, 200, 203, 203]])
    kinds = np.array([KINDS.index("airplane"), KINDS.index("car"), KINDS.index("airplane")])
    made = targets(boxes, kinds, 256, SETS[1])
    assert made.peaks[:, 0].tolist() == kinds[:2].tolist()
    for (kind, row, col), box in zip(made.peaks, boxes[:2], strict=True):
        assert made.heat[kind, row, col] == 1 and made.trust[kind, row, col] and made.sides_weight[row, col] > 0
        x, y = (col + 0.5) * 4, (row + 0.5) * 4
        left, top, right, bottom = made.sides[:, row, col]
        np.testing.assert_allclose([x - left, y - top, x + right, y + bottom], box)
    assert not made.trust[:, 50, 50].any(), "an object too small to learn is ignored, not background"
    assert made.trust[KINDS.index("fighter"), 5, 5], "this set labels every airplane of any kind"
    assert not made.trust[KINDS.index("boat"), 5, 5], "and no boats"


def test_a_set_with_unlabelled_objects_is_trusted_near_labelled_ones_only():
    from edge_rsvlm.export.default.data.objects import KINDS, SETS, targets

    simd = next(spec for spec in SETS if spec.sparse)
    made = targets(np.array([[100.0, 100, 120, 120]]), np.array([KINDS.index("car")]), 256, simd)
    assert made.trust[:, 27, 27].all() and made.trust[KINDS.index("boat"), 24, 24]
    assert not made.trust[:, 5, 5].any() and not made.trust[:, 60, 60].any()


def test_where_a_label_is_missing_nothing_of_its_kinds_is_there():
    from edge_rsvlm.export.default.data.absent import AbsentData, lacks
    from edge_rsvlm.export.default.data.objects import KINDS
    from edge_rsvlm.export.default.data.scenes import Scene, SceneSet

    named = [("road", ("cars", "pavement")), ("marina", ("ship", "cars", "airplane"))]
    scenes = [Scene("toy", label, label, labels, ()) for label, labels in named]
    missing = {kind: bool(lacks(scenes[0])[n]) for n, kind in enumerate(KINDS)}
    assert missing["airplane"] and missing["helicopter"] and missing["boat"]
    assert not missing["car"] and not missing["truck"]
    images = {name: np.full((256, 256, 3), 90, np.uint8) for name, _ in named}
    data = AbsentData(SceneSet(scenes, {"toy": images}), np.arange(2))
    assert data.usable.tolist() == [0], "the marina lacks nothing"
    tile, made = data.sample(np.random.default_rng(0))
    assert tile.shape == (5, 256, 256) and not len(made.peaks) and not made.heat.any()
    assert made.trust[KINDS.index("boat")].all() and not made.trust[KINDS.index("van")].any()


def test_what_is_not_taught_is_nowhere_in_words_and_never_a_target():
    from edge_rsvlm.export.default.data.objects import KINDS, QUERIES, SETS
    from edge_rsvlm.export.default.data.scenes import Scene
    from edge_rsvlm.export.default.data.words import UNTAUGHT, sentences

    assert not any(UNTAUGHT.search(word) for query in QUERIES for word in query.words)
    assert all(spec.mapping.get("bus", None) is None for spec in SETS) and not any("bus" in kind for kind in KINDS)
    scene = Scene("ucm", "a", "road", (), ("Two buses on a road .", "There are bushes .", "A bus stop ."))
    assert sentences(scene) == ["there are bushes"]


def test_a_query_cannot_tell_for_a_general_kind_only_where_it_means_a_finer_one():
    import torch

    from edge_rsvlm.export.default.data.objects import KINDS, QUERIES, example_tables, query_tables
    from edge_rsvlm.export.default.stages.vision import asked

    means, unsure = query_tables()
    names = [query.words[0] for query in QUERIES]
    assert unsure[names.index("fighter")][KINDS.index("airplane")] and not unsure[names.index("airplane")].any()
    heat, trust = torch.zeros(1, len(KINDS), 4, 4), torch.ones(1, len(KINDS), 4, 4, dtype=torch.bool)
    heat[0, KINDS.index("airplane"), 1, 1] = 1
    wanted, weight = asked(heat, trust, torch.from_numpy(means), torch.from_numpy(unsure))
    plane, fighter, car = (names.index(name) for name in ("airplane", "fighter", "car"))
    assert wanted[0, plane, 1, 1] == 1 and weight[0, plane, 1, 1] == 1
    assert wanted[0, fighter, 1, 1] == 0 and weight[0, fighter, 1, 1] == 0 and weight[0, fighter, 2, 2] == 1
    assert weight[0, car, 1, 1] == 1, "an airplane is no car"
    _, unsure = example_tables()
    kind = {name: KINDS.index(name) for name in KINDS}
    assert unsure[kind["airplane"], kind["fighter"]] and unsure[kind["fighter"], kind["airplane"]]
    assert not unsure[kind["fighter"], kind["airliner"]] and not unsure[kind["airplane"], kind["airplane"]]


def test_channels_are_measured_over_all_cells_and_then_count_alike():
    import torch

    from edge_rsvlm.export.default.model.appearance import FEATURES, MAPS, Appearance
    from edge_rsvlm.export.default.model.encoder import Encoder
    from edge_rsvlm.export.default.stages.appearance import spread

    torch.manual_seed(0)
    encoder, batches = Encoder().eval(), [torch.randn(count, 5, 64, 96) for count in (3, 2)]
    mean, deviation = spread(encoder, batches)
    with torch.inference_mode():
        maps = encoder(torch.cat(batches))
        looks = Appearance()
        looks.load_state_dict({"mean": mean, "deviation": deviation})
        features = looks(*(maps[name] for name in MAPS))
    assert features.shape == (5, FEATURES, 16, 24)
    torch.testing.assert_close(features.mean(dim=(0, 2, 3)), torch.zeros(FEATURES), atol=1e-3, rtol=0)
    torch.testing.assert_close(features.std(dim=(0, 2, 3)), torch.ones(FEATURES), atol=1e-2, rtol=0)
    coarse = features[:, FEATURES - 96 :]
    assert (coarse[:, :, 4:8, 8:12] == coarse[:, :, 4:5, 8:9]).all(), "a cell of c4 is four by four here"
    flat = spread(encoder, [torch.zeros(1, 5, 32, 32)])[1]
    assert flat.min() > 0


def test_an_example_is_no_evidence_for_itself():
    import torch

    from edge_rsvlm.export.default.stages.vision import around_itself

    trust = torch.ones(2, 1, 6, 6)
    around_itself(trust, torch.tensor([1]), torch.tensor([0]), torch.tensor([5]))
    assert trust[0].all() and trust[1, 0].sum() == 36 - 4


def test_cells_of_the_ground_are_known_from_boxes_where_boxes_are_complete():
    import torch

    from edge_rsvlm.export.default.data.objects import KINDS
    from edge_rsvlm.export.default.stages.vision import COVERED, covered_by

    heat, trust = torch.zeros(1, len(KINDS), 4, 4), torch.zeros(1, len(KINDS), 4, 4, dtype=torch.bool)
    heat[0, KINDS.index("car"), 0, 1] = 1
    trust[0, [KINDS.index("car"), KINDS.index("van")]] = True
    trust[0, :, 3, 3] = False
    known = covered_by(heat, trust)[0, list(COVERED).index("cars")]
    assert known.tolist() == [[1, 0], [0, -1]]


def test_phrases_name_one_object_only_where_it_is_clear():
    boxes = [[10, 100, 60, 150], [200, 180, 240, 220], [300, 110, 320, 130]]
    found = said(boxes, ["airplane"] * 3)
    assert found["the airplane on the left"] == (0,) and found["the rightmost airplane"] == (2,)
    assert found["the second airplane from the left"] == (1,)
    assert found["the largest airplane"] == (0,) and found["the smallest airplane"] == (2,)
    assert found["the three airplanes"] == (0, 1, 2) == found["all airplanes"]
    assert found["the airplane in the center"] == (1,) and "the airplane" not in found
    close = said([[10, 100, 60, 150], [12, 300, 62, 350]], ["airplane"] * 2)
    assert "the airplane on the left" not in close and close["the airplane at the top"] == (0,)
    assert "the largest airplane" not in close


def test_phrases_relate_to_the_only_object_of_another_kind():
    found = said([[100, 100, 120, 120], [200, 100, 220, 120], [150, 300, 180, 330]], ["car", "car", "truck"])
    assert found["the car left of the truck"] == (0,) and found["the car right of the truck"] == (1,)
    assert "the car above the truck" not in found, "both are"
    assert found["the truck"] == (2,) and "the truck next to the car" not in found
    assert "the car next to the truck" not in found, "both are nearly as far"


def test_every_phrase_is_known_beforehand(tokenizer):
    from edge_rsvlm.export.default.data.objects import CLASSES
    from edge_rsvlm.export.default.data.phrases import NAMES, every_phrase

    rng, known, found = np.random.default_rng(0), set(every_phrase()), set()
    assert tuple(NAMES) == CLASSES
    names = [name for names in NAMES.values() for name in names]
    for _ in range(600):
        count = int(rng.integers(1, 8))
        corner = rng.uniform(0, 350, (count, 2))
        some = rng.choice(names, 2, replace=False)
        found |= said(np.hstack([corner, corner + rng.uniform(5, 60, (count, 2))]), rng.choice(some, count)).keys()
    assert found <= known and len(found) > 0.9 * len(known)
    for words in known:
        assert tokenizer.decode(tokenizer.encode(words).ids) == words


def test_questions_follow_from_labels_and_classes():
    from edge_rsvlm.export.default.data.questions import THEME, asked, made, themes
    from edge_rsvlm.export.default.data.scenes import Scene

    harbor = Scene("ucm", "a", "harbor", ("ship", "water"), (), ((THEME, "harbor"), ("How many  in it?", "two")))
    typo = Scene("ucm", "b", "harbor", ("ship",), (), ((THEME, "harobr"),))
    theme = themes([harbor, harbor, typo])
    answers = {q.question: q.answer for q in made(Scene("ucm", "c", "harbor", ("ship", "water"), ()), theme)}
    assert answers[THEME] == "harbor" and answers["Does this picture contain water?"] == "yes"
    assert answers["Does this picture contain an airplane?"] == "no"
    assert answers["Does this picture contain boats?"] == "yes", "whatever people call a ship"
    assert [(q.question, q.names_its_thing) for q in asked(harbor)] == [(THEME, True), ("How many  in it?", False)]
    assert not made(Scene("rsicd", "d", "Port", (), ()), theme)


@pytest.mark.parametrize(
    ("answer", "named"),
    [("top left corner", {(0, 0)}), ("left and right", {(1, 0), (1, 2)}),
     ("left center and right", {(1, 0), (1, 1), (1, 2)}), ("up, center and bottom", {(0, 1), (1, 1), (2, 1)}),
     ("minor diagonal", {(0, 2), (2, 0)}), ("next to the road", None), ("everywhere", None)],
)  # fmt: skip
def test_places_that_answers_name(answer, named):
    from edge_rsvlm.export.default.data.places import cells

    assert cells(answer) == (None if named is None else frozenset(named))


@pytest.mark.parametrize("view", range(8))
def test_places_turn_with_the_image(view):
    from edge_rsvlm.export.default.data.places import Turned
    from edge_rsvlm.export.default.data.views import dihedral_boxes

    corners = {(0, 0): "top left corner", (0, 2): "upper right", (2, 0): "lower left", (2, 2): "lower right"}
    turned = Turned([*corners.values(), "up and bottom", "left and right"])
    for (row, column), answer in corners.items():
        box = np.array([[column, row, column + 1, row + 1]], np.float64)
        x, y = (int(v) for v in dihedral_boxes(box, 3, view)[0, :2])
        assert turned(answer, view) == corners[y, x]
    assert turned("left and right", view) == ("up and bottom" if view % 2 else "left and right")
    assert turned("everywhere", view) == "everywhere"
    assert turned("center", view) == ("center" if view == 0 else None), "nobody ever said so"


@pytest.mark.parametrize("name", ["noise", "blur", "haze", "jpeg"])
def test_worse_tiles_keep_their_scene(name):
    from edge_rsvlm.export.default.data import augment

    rng = np.random.default_rng(3)
    y, x = np.mgrid[:64, :64] / 63
    rgb = np.stack([x, y, (x + y) / 2]).astype(np.float32)
    worse = getattr(augment, name)(rng, rgb)
    assert worse.shape == rgb.shape and worse.dtype == np.float32 and not np.array_equal(worse, rgb)
    assert np.corrcoef(worse.ravel(), rgb.ravel())[0, 1] > 0.9


def test_what_is_invalid_stays_as_it_is_and_so_does_validity():
    from edge_rsvlm.export.default.data.augment import degraded

    tile = np.zeros((5, 32, 32), np.float32)
    tile[:3] = np.random.default_rng(0).uniform(-1, 1, (3, 32, 32))
    tile[4, :, 16:] = 1
    for seed in range(20):
        worse = degraded(np.random.default_rng(seed), tile)
        np.testing.assert_array_equal(worse[:, :, :16], tile[:, :, :16])
        np.testing.assert_array_equal(worse[3:], tile[3:])


def test_phrases_to_score_are_of_held_out_images_whose_objects_are_all_known(tmp_path):
    import json

    from edge_rsvlm.export.default.data.eval_sets import grounded
    from edge_rsvlm.export.default.data.objects import SETS
    from edge_rsvlm.export.default.splits import held_out

    simd = next(spec for spec in SETS if spec.name == "simd")
    inside = sorted(held_out("simd"))[:3]
    boxes = {inside[0]: [(1, 0), (2, 200)], inside[1]: [(1, 0), (3, 200)], inside[2]: [], "trained.webp": [(1, 0)]}
    data = {
        "categories": [{"id": 1, "name": "car"}, {"id": 2, "name": "van"}, {"id": 3, "name": "bus"}],
        "images": [{"id": n, "file_name": name, "width": 400, "height": 300} for n, name in enumerate(boxes)],
        "annotations": [
            {"image_id": n, "category_id": kind, "bbox": [x, 40, 30, 20]}
            for n, found in enumerate(boxes.values()) for kind, x in found
        ],
    }  # fmt: skip
    (tmp_path / "train.json").write_text(json.dumps(data))
    (row,) = grounded(simd, tmp_path / "train.json")
    assert row["image"] == inside[0], "one has a bus, which nobody can name"
    assert {"phrase": "car", "boxes": [[0.0, 40.0, 30.0, 20.0]]} in row["phrases"]


def test_questions_to_score_say_their_kind():
    from edge_rsvlm.export.default.data.eval_sets import questions
    from edge_rsvlm.export.default.data.questions import THEME
    from edge_rsvlm.export.default.data.scenes import Scene

    asked = ((THEME, "harbor"), ("How many boats in the picture?", "two"), ("Is it?", "yes"))
    rows = questions([Scene("ucm", "a", "harbor", (), (), asked), Scene("ucm", "b", "harbor", (), ())])
    assert [q["type"] for q in rows[0]["questions"]] == ["theme", "count", "other"] and len(rows) == 1


def test_layouts_keep_what_a_phrase_means_however_the_detector_errs(tokenizer):
    from edge_rsvlm.export.default.data.objects import CLASSES
    from edge_rsvlm.export.default.stages.refer import DEFAULTS, BatchMaker, Layout

    plane, car = CLASSES.index("airplane"), CLASSES.index("car")
    boxes = np.array([[0.1, 0.2, 0.15, 0.25], [0.5, 0.2, 0.6, 0.3], [0.8, 0.5, 0.83, 0.53]])
    layout = Layout(boxes, np.array([plane, plane, car]), (1.0, 0.6))
    config = DEFAULTS | {"layouts": 40, "made_up": 0.3, "absent": 0.0}
    maker = BatchMaker([layout], tokenizer, config, np.random.default_rng(1))
    batch = maker()
    known, meant = batch["objects_mask"] == 1, batch["meant"] == 1
    assert (meant & ~known).sum() == 0 and (meant.sum(dim=1) > 0).all(), "every phrase means something"
    assert batch["objects"][~known].abs().sum() == 0
    turned = [maker._flipped(layout) for _ in range(20)]
    for other in turned:
        assert (other.boxes[:, :2] < other.boxes[:, 2:]).all() and (
            other.boxes[:, 2:] <= np.array(other.size) + 1e-9
        ).all()
    assert len({other.size for other in turned}) == 2


def test_a_phrase_for_what_is_not_there_means_nothing(tokenizer):
    from edge_rsvlm.export.default.data.objects import CLASSES
    from edge_rsvlm.export.default.stages.refer import DEFAULTS, BatchMaker, Layout

    layout = Layout(np.array([[0.1, 0.2, 0.15, 0.25], [0.5, 0.2, 0.6, 0.3]]), np.zeros(2, np.int64), (1.0, 0.6))
    maker = BatchMaker([layout], tokenizer, DEFAULTS | {"layouts": 40, "absent": 1.0}, np.random.default_rng(1))
    assert not maker()["meant"].any()
    said = [phrase.words for _ in range(40) if (phrase := maker._absent(layout))]
    head = [words.split(" the ")[0] for words in said]
    assert len(said) > 20 and not any(CLASSES[0] in words or "plane" in words for words in head)


def test_padding_changes_no_choice(tokenizer):
    import torch

    from edge_rsvlm.export.default.model.refer import Refer
    from edge_rsvlm.export.default.stages.match import tokens

    torch.manual_seed(0)
    model = Refer(tokenizer.get_vocab_size(), 9).eval()
    objects, mask = torch.randn(2, 4, 9), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    texts = tokens(tokenizer, ["trees", "many cars in a parking lot"])
    alone = tokens(tokenizer, ["trees"])
    with torch.inference_mode():
        both = model(**texts, objects=objects, objects_mask=mask)
        one = model(**alone, objects=objects[:1, :2], objects_mask=mask[:1, :2])
    torch.testing.assert_close(both[:1, :2], one, atol=1e-5, rtol=1e-4)
