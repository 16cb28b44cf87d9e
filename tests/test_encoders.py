"""Candidate encoders: graphs against references, norms put back and folded again, and the scores that compare them."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch: not installed")

from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from edge_rsvlm.export.default.data.scenes import Scene, SceneSet, ucm  # noqa: E402
from edge_rsvlm.export.default.encoders import compare, graphs, mobilenet_v1, mobilenet_v2, scores  # noqa: E402
from edge_rsvlm.export.default.encoders import shufflenet_v2 as shuffle  # noqa: E402
from edge_rsvlm.export.default.encoders.candidates import CANDIDATES, MAPS  # noqa: E402
from edge_rsvlm.export.default.encoders.centres import CLASSES, SETS, STRIDE, targets  # noqa: E402
from edge_rsvlm.export.default.encoders.norms import fold_norms, insert_norms  # noqa: E402
from edge_rsvlm.export.default.encoders.proxy import DenseHead, Proxy, grouped, usable_ucm  # noqa: E402
from edge_rsvlm.export.default.encoders.report import BEGIN, END, write_report  # noqa: E402
from edge_rsvlm.export.default.model.encoder import Encoder, convs_in_order  # noqa: E402

DATA = Path(__file__).parents[2] / "shared" / "data"
ENCODERS = {
    "mobilenet_v1": (mobilenet_v1.MobileNetV1, mobilenet_v1.CHANNELS),
    "mobilenet_v2": (Encoder, mobilenet_v2.CHANNELS),
    "shufflenet_v2": (shuffle.ShuffleNetV2, shuffle.CHANNELS),
}
FOLDED = ("mobilenet_v1", "mobilenet_v2")
BITS = 2e-5
"""Of the largest value of a map: float32 in another order of products, through fifty layers."""


def weights(name: str) -> Path:
    path = DATA / "backbones" / name
    if not path.is_file():
        pytest.skip(f"needs {path.name} of the data set 'backbones'")
    return path


def tiles(n: int = 2, height: int = 64, width: int = 96, seed: int = 0):
    return torch.rand(n, 5, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def untrained(name: str, seed: int = 0):
    torch.manual_seed(seed)
    module = ENCODERS[name][0]()
    for part in module.modules():  # so that no map dies out or is all the same
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight)
            if part.bias is not None:
                nn.init.normal_(part.bias, std=0.3)
    return module.eval()


def apart(one, other) -> float:
    """Largest difference of two sets of maps, as a share of the largest value of its map."""
    return max(float((one[k] - other[k]).abs().max() / one[k].abs().max()) for k in MAPS)


@torch.no_grad()
def maps_of(module, given):
    return module(given)


@pytest.mark.parametrize("name", ENCODERS)
def test_maps_have_the_channels_and_strides_that_the_table_says(name):
    maps = maps_of(untrained(name), tiles())
    for k, (level, channels) in enumerate(ENCODERS[name][1].items()):
        stride = 4 << k
        assert maps[level].shape == (2, channels, 64 // stride, 96 // stride)
    assert tuple(ENCODERS[name][1]) == MAPS


@pytest.mark.parametrize("name", FOLDED)
def test_norms_put_back_leave_the_function_as_it_was(name):
    plain = untrained(name)
    normed = insert_norms(plain, [tiles(seed=1), tiles(seed=2)])
    norms = [m for m in normed.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == len(convs_in_order(plain))
    assert all(conv.bias is None for conv in convs_in_order(normed))
    assert apart(maps_of(plain, tiles(seed=3)), maps_of(normed, tiles(seed=3))) < BITS
    assert all(conv.bias is not None for conv in convs_in_order(plain)), "the original was changed"


@pytest.mark.parametrize("name", FOLDED)
def test_measured_norms_normalise(name):
    """In training mode, on the batch they were measured on, the function is the same too: the moments are right."""
    plain, batch = untrained(name).double(), tiles(8).double()
    normed = insert_norms(plain, [batch]).double().train()
    assert apart(maps_of(plain, batch), maps_of(normed, batch)) < 1e-4


def test_norms_need_a_batch():
    with pytest.raises(ValueError, match="give at least one"):
        insert_norms(untrained("mobilenet_v2"), [])


@pytest.mark.parametrize("name", ENCODERS)
def test_folding_after_training_is_exact(name):
    module = untrained(name)
    if name in FOLDED:
        module = insert_norms(module, [tiles(4)])
    before = maps_of(module.eval(), tiles(seed=9))
    module.train()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        sum(m.square().mean() for m in module(tiles(4, seed=step)).values()).backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
    module.eval()
    folded, trained = fold_norms(module), maps_of(module, tiles(seed=9))
    assert apart(before, trained) > 1e-3, "training changed nothing"
    assert apart(trained, maps_of(folded, tiles(seed=9))) < BITS
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    assert any(isinstance(m, nn.BatchNorm2d) for m in module.modules()), "the original was changed"


def same_pads(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """(before, after) of TFLite's ComputePadding for SAME: what is odd goes after."""
    total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


@pytest.mark.parametrize("name", FOLDED)
@pytest.mark.parametrize("size", [(64, 96), (224, 224), (384, 32)])
def test_padding_is_tflite_same(name, size):
    """Every 3x3 convolution, run alone beside one that pads as TFLite's formula says."""
    wrappers = [m for m in untrained(name).modules() if getattr(m, "kernel", None) == 3]
    assert {m.stride for m in wrappers} == {1, 2}
    for wrapper in wrappers:
        conv = wrapper.conv
        x = torch.randn(1, conv.in_channels, size[0] // 8, size[1] // 8)
        (top, bottom), (left, right) = (same_pads(n, 3, wrapper.stride) for n in x.shape[2:])
        padded = F.pad(x, (left, right, top, bottom))
        wanted = F.conv2d(padded, conv.weight, conv.bias, wrapper.stride, groups=conv.groups)
        with torch.no_grad():
            assert torch.allclose(wrapper(x), F.relu6(wanted), atol=1e-5)


def test_mobilenet_v1_reads_its_file():
    path = weights("mobilenet_v1_1.0_224_quant_embedding_extractor.tflite")
    encoder = mobilenet_v1.build(path)
    stem = encoder.stem.conv.weight
    assert stem[:, :3].abs().max() > 0.1 and stem[:, 3:].abs().max() == 0
    with pytest.raises(ValueError, match="give the embedding extractor"):
        mobilenet_v1.build(weights("tf2_mobilenet_v2_1.0_224_ptq.tflite"))


def reference_shuffle(x):
    """``channel_shuffle`` of the authors' code: the two groups that the next block keeps and works on."""
    n, c, h, w = x.shape
    x = x.reshape(n * c // 2, 2, h * w).permute(1, 0, 2).reshape(2, -1, c // 2, h, w)
    return x[0], x[1]


def reference_branch(branch, x):
    """Convolutions and norms of a branch by functional calls, with ReLU after the 1x1 ones."""
    parts = list(branch)
    for conv, norm in pairwise(parts):
        if isinstance(conv, nn.Conv2d):
            pad = conv.kernel_size[0] // 2
            x = F.conv2d(x, conv.weight, None, conv.stride, pad, groups=conv.groups)
            x = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias)
            x = x if conv.groups > 1 else F.relu(x)
    return x


@torch.no_grad()
def test_shufflenet_is_the_authors_graph():
    module, x = untrained("shufflenet_v2"), tiles()
    for norm in (m for m in module.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.normal_(norm.running_mean), nn.init.uniform_(norm.running_var, 0.5, 2.0)
    y = F.max_pool2d(reference_branch(module.first_conv, x), 3, 2, 1)
    wanted = {"c2": y}
    for level, stage in (("c3", module.stage2), ("c4", module.stage3), ("c5", module.stage4)):
        y = torch.cat([reference_branch(stage[0].branch_proj, y), reference_branch(stage[0].branch_main, y)], 1)
        for block in list(stage)[1:]:
            kept, worked = reference_shuffle(y)
            y = torch.cat([kept, reference_branch(block.branch_main, worked)], 1)
        wanted[level] = y
    assert apart(wanted, module(x)) < BITS


def test_shufflenet_names_and_shapes():
    shapes = {name: tuple(value.shape) for name, value in shuffle.ShuffleNetV2().state_dict().items()}
    assert shapes["first_conv.0.weight"] == (24, 5, 3, 3)
    assert shapes["stage2.0.branch_proj.0.weight"] == (24, 1, 3, 3)
    assert shapes["stage2.0.branch_main.5.weight"] == (24, 24, 1, 1)
    assert shapes["stage3.7.branch_main.3.weight"] == (48, 1, 3, 3)
    assert shapes["stage4.0.branch_proj.2.weight"] == (96, 96, 1, 1)
    assert shapes["stage4.3.branch_main.6.running_var"] == (96,)
    assert len(shapes) == 6 * 55 and "stage4.4.branch_main.0.weight" not in shapes


@torch.no_grad()
def test_shufflenet_reads_what_its_network_read():
    """Away from the border, the first layer gives what the file's gives for blue, green, red in [0, 1]."""
    path = weights("shufflenetv2.pth")
    encoder, state = shuffle.build(path).eval(), torch.load(path, map_location="cpu", weights_only=True)
    assert set(state) == set(encoder.state_dict())
    ours = tiles(1)
    theirs = (ours[:, [2, 1, 0]] + 1) / 2
    norm = (state[f"first_conv.1.{n}"] for n in ("running_mean", "running_var", "weight", "bias"))
    wanted = F.relu(F.batch_norm(F.conv2d(theirs, state["first_conv.0.weight"], stride=2, padding=1), *norm))
    assert torch.allclose(encoder.first_conv(ours)[..., 1:, 1:], wanted[..., 1:, 1:], atol=1e-5)


def test_candidates_are_told_apart():
    names = [c.name for c in CANDIDATES]
    assert len(set(names)) == len(names)
    v2 = [c for c in CANDIDATES if c.graph == CANDIDATES[0].graph]
    assert [c.put_norms_back for c in v2] == [False, True]


def test_dense_head_and_groups():
    channels = shuffle.CHANNELS
    maps = {name: torch.zeros(2, c, 64 >> k, 64 >> k) for k, (name, c) in enumerate(channels.items())}
    assert DenseHead(channels)(maps).shape == (2, 2, 64, 64)
    planes = np.zeros((len(CLASSES), 1, 1), np.float32)
    planes[CLASSES.index("bus")], planes[CLASSES.index("boat")] = 0.7, 1.0
    assert grouped(planes).ravel().tolist() == pytest.approx([0.0, 0.7])


def test_centres_are_told_where_a_set_labels_all():
    boxes = np.array([[10.0, 20, 42, 60], [100, 90, 130, 110], [200, 200, 203, 203]])
    airbus = next(spec for spec in SETS if spec.name == "airbus_aircraft")
    heat, weight = targets(boxes, np.array([0, 3, 0]), 256, airbus)
    for (x0, y0, x1, y1), label in zip(boxes[:2], (0, 3), strict=True):
        row, col = int((y0 + y1) / 2 // STRIDE), int((x0 + x1) / 2 // STRIDE)
        assert heat[label].max() == heat[label, row, col] == weight[label, row, col] == 1
    assert weight[:, 50, 50].max() == 0, "an object too small to learn is ignored, not background"
    assert weight[0, 5, 5] == 1 and weight[3, 60, 10] == 0, "airbus labels are complete for airplanes only"


def test_average_precision_by_hand():
    right = np.array([True, False, True])
    assert scores.average_precision(np.array([0.9, 0.8, 0.7]), right) == pytest.approx((1 + 2 / 3) / 2)
    assert scores.average_precision(np.array([0.9, 0.8, 0.7]), right, total=4) == pytest.approx((1 + 2 / 3) / 4)


def test_a_box_is_found_once():
    boxes = np.array([[0.0, 0.0, 10.0, 10.0], [20.0, 20.0, 30.0, 30.0]])
    peaks = [(0.9, 5.0, 5.0), (0.8, 6.0, 6.0), (0.7, 25.0, 25.0), (0.6, 50.0, 50.0)]
    assert scores._matched(peaks, boxes) == [True, False, True, False]


def test_peaks_are_centres_of_cells_on_trusted_ground():
    logits, weight = torch.full((8, 8), -9.0), np.ones((8, 8), np.float32)
    logits[2, 5], logits[6, 1] = 2.0, 3.0
    weight[6, 1] = 0.0
    ((score, x, y),) = scores._peaks(logits, weight)
    assert (x, y) == (22.0, 10.0) and score == pytest.approx(1 / (1 + math.exp(-2)))


def test_dense_scores_of_a_head_that_knows():
    """Maps that hold the answer give a precision of 1, and maps that hold nothing one of 0."""
    tile = scores.DenseTile(
        np.zeros((5, 64, 64), np.float32), np.zeros((2, 16, 16), np.float32), np.ones((2, 16, 16), np.float32),
        np.array([[4.0, 4.0, 20.0, 20.0], [40.0, 40.0, 52.0, 52.0]]), np.array([0, 1]),
    )  # fmt: skip
    tile.heat[0, 3, 3] = tile.heat[1, 11, 11] = 1.0

    class Told(nn.Module):
        def __init__(self):
            super().__init__()
            self.lateral = {"c2": None}

        def forward(self, maps):
            return maps["c2"]

    class Head:
        dense = Told()

    def answer(gain):
        return lambda x: {"c2": gain * (2 * tile.heat[None] - 1).repeat(len(x), axis=0)}

    knows, blind = (scores.dense_scores(Head(), [tile] * 3, answer(g)) for g in (8.0, -8.0))
    assert (knows["ap_airplane"], knows["ap_vehicle"]) == (1.0, 1.0) and knows["heat_loss"] < 0.01
    assert blind["ap_airplane"] < 0.1 and blind["heat_loss"] > 5


def test_ridge_finds_classes_that_a_line_separates():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 300)
    features = (np.eye(3)[labels] * 4 + rng.normal(size=(300, 3))).astype(np.float32)
    fitted = scores.Ridge(features[:200], labels[:200], [f"{i}" for i in range(200)])
    assert fitted.top1(features[200:], labels[200:]) > 0.9
    shuffled = scores.Ridge(features[:200], rng.permutation(labels[:200]), [f"{i}" for i in range(200)])
    assert shuffled.top1(features[200:], labels[200:]) < 0.6


def test_validation_images_and_their_places_are_not_trained_on(tmp_path):
    if not (DATA / "ucm_captions").is_dir():
        pytest.skip("needs the data set 'ucm_captions'")
    scenes = ucm(DATA, tmp_path)
    usable, held = usable_ucm(scenes), compare.validation(scenes)
    assert not set(usable) & set(held) and len(held) == 210
    assert 1500 < len(usable) < 1680, "images of a validation image's place are left out too"


def test_cost_by_hand():
    module = nn.Sequential(nn.Conv2d(5, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 1, 1, groups=8))
    cells = (graphs.LATENCY_PX // 2) ** 2
    assert graphs.cost(module) == {"parameters": 5 * 8 * 9 + 8 + 8 * 9 + 8, "macs": cells * (8 * 5 * 9 + 8 * 9)}


def test_exported_graph_gives_the_maps(tmp_path):
    folded = fold_norms(untrained("shufflenet_v2"))
    graphs.export(folded, tmp_path / "g.onnx")
    given = tiles(3, 128, 64)
    found = graphs.encoder_of(tmp_path / "g.onnx")(given.numpy())
    assert apart(maps_of(folded, given), {k: torch.from_numpy(v) for k, v in found.items()}) < BITS


def test_scene_scores_of_logits_that_know():
    class Passes(nn.Module):
        def forward(self, x):
            return {"c5": x}

    channels = {"c2": 1, "c3": 1, "c4": 1, "c5": 21}
    model = Proxy(Passes(), channels, [3 * torch.eye(21)[:, :, None, None] + 1]).eval()
    with torch.no_grad():
        model.scene["ucm_scene"].weight.copy_(torch.eye(21))
        model.scene["ucm_scene"].bias.zero_()

    scenes = [Scene("ucm_val", f"{i}", f"{i:02}", ("sea",) if i % 2 else ("trees",), ()) for i in range(21)]
    found = scores.scene_scores(model, SceneSet(scenes, {}), np.arange(21), 3 * np.eye(21, dtype=np.float32) + 1)
    inputs = (3 * torch.eye(21) + 1 - model.centre) * model.gain
    assert inputs.mean(dim=0).abs().max() < 1e-4 and float(inputs.std(dim=0).sum()) == pytest.approx(320, rel=0.01)
    assert found["scene_top1"] == 1.0 and found["scene_log_loss"] < 0.01 and 0 < found["labels_map"] <= 1


def result(name: str, graph: str) -> dict:
    accuracy = {
        "probe_top1": 0.9, "scene_top1": 0.91, "scene_log_loss": 0.3, "labels_map": 0.8, "heat_loss": 1.2,
        "ap_airplane": 0.7, "ap_vehicle": 0.4,
    }  # fmt: skip
    return {
        "name": name, "graph": graph, "minutes": 1, "probe": {"top1": 0.88}, "training": {"steps": 5.0},
        "f32": accuracy, "int8": accuracy | {"scene_top1": 0.90}, "cosine": {"c2": 0.999, "c5": 0.99},
        "parameters": 10**6, "macs": 10**8, "bytes": {"f32": 4 * 10**6, "int8": 10**6},
    }  # fmt: skip


def test_report_keeps_what_stands_around_its_tables(tmp_path):
    path = tmp_path / "encoders.md"
    path.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    times = {f"{p}_{t}": {"p50_ms": 10.0 * t, "ratio": 0.5} for p in graphs.PRECISIONS for t in graphs.THREADS}
    results = [result("a", "A"), result("b", "A"), result("c", "C")]
    write_report(path, results, {"A": times, "C": times})
    text = path.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| INT8: change of scene top-1, points | -1.0 | -1.0 | -1.0 |" in text
    assert "| cost | A | C |" in text and "20.0 (0.50x)" in text
    path.write_text("no marks")
    with pytest.raises(ValueError, match="add the lines"):
        write_report(path, results, {"A": times, "C": times})


def test_a_result_is_measured_once(tmp_path):
    made = []
    for _ in range(2):
        assert compare.once(tmp_path / "r.json", lambda: made.append(1) or {"x": 1}) == {"x": 1}
    assert made == [1]
