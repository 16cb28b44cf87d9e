"""What is done to graphs before they are in 8 bits: ranges, equalisation, smoothing and rounding."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch: not installed")
pytest.importorskip("transformers", reason="needs transformers: not installed")
onnx = pytest.importorskip("onnx", reason="needs onnx: not installed")

from onnx import helper  # noqa: E402

from edge_rsvlm.export.quantize.chosen import choose_nodes  # noqa: E402
from edge_rsvlm.export.quantize.equalise import equalise  # noqa: E402
from edge_rsvlm.export.quantize.loaded import array_of, constants, readers  # noqa: E402
from edge_rsvlm.export.quantize.ranges import each_run, find_ranges  # noqa: E402
from edge_rsvlm.export.quantize.rounding import round_convolutions  # noqa: E402
from edge_rsvlm.export.quantize.settings import Int8  # noqa: E402
from edge_rsvlm.export.quantize.smooth import smooth  # noqa: E402
from edge_rsvlm.export.quantize.static import quantize_static  # noqa: E402
from tests.int8_graphs import (  # noqa: E402  # noqa: E402
    SIDE_PX,
    chain,
    loss,
    model,
    opened,
    run,
    tiles,
)

MINMAX = Int8(ranges="minmax")


def found_range(values, settings):
    """Of x, given in several calls."""
    made = model([helper.make_node("Relu", ["x"], ["y"], name="relu")], {}, {"x": ["n"]}, {"y": ["n"]})
    found = find_ranges(made, ("x", "y"), [{"x": v.astype(np.float32)} for v in values], settings)
    return {name: tuple(float(np.ravel(v)[0]) for v in data.range_value) for name, data in found.items()}


def test_ranges_of_known_numbers():
    narrow, wide = np.linspace(-1, 1, 20001), np.linspace(-2, 2, 20001)
    assert found_range([narrow, wide, narrow], MINMAX) == {"x": (-2, 2), "y": (0, 2)}
    # 5 % lie beyond on either side: half of the numbers are within [-1, 1], the others even over [-2, 2].
    low, high = found_range([narrow, wide], Int8(percentile=90))["x"]
    assert (low, high) == pytest.approx((-1.6, 1.6), abs=0.01)
    assert found_range([narrow], Int8(percentile=100))["x"] == pytest.approx((-1, 1), abs=1e-3)
    # One number far from the rest: of 2048 bins from -400 to 400 at least 128 are kept, and not many more than those.
    outlier = np.append(np.random.default_rng(0).normal(size=100_000), 400)
    low, high = found_range([outlier], Int8(ranges="entropy"))["x"]
    assert 25 <= high < 60 and low == pytest.approx(outlier.min())
    assert found_range([outlier], MINMAX)["x"][1] == 400


def test_equalisation_changes_ranges_and_no_result(tmp_path):
    made, calls = opened(chain(relu=True), tmp_path / "chain.onnx"), tiles(4)

    def channels(name):
        return np.max([np.abs(values[name]).max(axis=(0, 2, 3)) for values in each_run(made, [name], calls)], axis=0)

    before, most = run(made.SerializeToString(), calls), channels("bx")
    assert equalise(made, choose_nodes(made, ()).layers, calls) == 2
    assert loss(run(made.SerializeToString(), calls), before) < 1e-5
    assert most.max() > 20 * most[most > 0].min()
    live = channels("bx")[most > 0]
    assert len(live) > 10 and live.max() == pytest.approx(live.min(), rel=1e-3)
    bounded = opened(chain(relu=False), tmp_path / "bounded.onnx")
    assert equalise(bounded, choose_nodes(bounded, ()).layers, calls) == 0


def outlying(seed: int = 0):
    """A norm whose channel 3 is 50 times the rest, before two products; and one such product behind a GELU."""
    rng = np.random.default_rng(seed)
    tensors = {n: rng.normal(scale=0.2, size=(32, 32)).astype(np.float32) for n in ("q", "k", "up")}
    tensors |= {"scale": np.where(np.arange(32) == 3, 50, 1).astype(np.float32), "shift": np.zeros(32, np.float32)}
    tensors["up"] = tensors["up"].T.copy()
    tensors["q"][3] /= 50
    tensors["k"][:, 5] *= 50
    nodes = [
        helper.make_node("LayerNormalization", ["x", "scale", "shift"], ["h"], name="norm"),
        helper.make_node("MatMul", ["h", "q"], ["qy"], name="q"),
        helper.make_node("MatMul", ["h", "k"], ["ky"], name="k"),
        helper.make_node("Gelu", ["ky"], ["g"], name="gelu"),
        helper.make_node("Gemm", ["g", "up"], ["upy"], name="up", transB=1),
    ]
    return model(nodes, tensors, {"x": ["n", 32]}, {"qy": ["n", 32], "upy": ["n", 32]})


def rows(count, seed=0):
    return [{"x": np.random.default_rng(seed + k).normal(size=(64, 32)).astype(np.float32)} for k in range(count)]


def test_smoothing_changes_no_result_and_less_is_lost(tmp_path):
    made = opened(outlying(), tmp_path / "g.onnx")
    before = run(made.SerializeToString(), rows(2))
    assert smooth(made, choose_nodes(made, ()).layers, rows(4), 0.5) == 2
    assert loss(run(made.SerializeToString(), rows(2)), before) < 1e-5
    assert [node.op_type for node in made.graph.node].count("Mul") == 1  # GELU has no scale to fold into
    lost = []
    for share in (0.0, 0.5):
        quantize_static(tmp_path / "g.onnx", rows(8), Int8(ranges="minmax", smooth=share), tmp_path / "q.onnx", None)
        lost.append(loss(run(tmp_path / "q.onnx", rows(4, seed=50)), run(tmp_path / "g.onnx", rows(4, seed=50))))
    assert lost[1] < 0.5 * lost[0] and lost[1] < 0.05


def smooth_tiles(count: int, seed: int = 0):
    """Bright, and neighbours alike, as in an image."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(0.5, 2, size=(count, 3, 8, 8)).astype(np.float32)
    fine = rng.normal(scale=0.05, size=(count, 3, SIDE_PX, SIDE_PX)).astype(np.float32)
    return [{"tiles": tile[None]} for tile in np.kron(coarse, np.ones((4, 4), np.float32)) + fine]


def test_rounding_keeps_means_and_is_nearer_than_the_nearest(tmp_path):
    made, calls = opened(chain(relu=True), tmp_path / "chain.onnx"), smooth_tiles(8)
    nearest, rounded = (opened(chain(relu=True), tmp_path / "chain.onnx") for _ in range(2))
    scales = round_convolutions(rounded, choose_nodes(rounded, ()).layers, calls)
    for name, scales_O in scales.items():
        numbers = array_of(constants(rounded)[name]) / scales_O[:, None, None, None]
        assert np.abs(numbers - numbers.round()).max() < 1e-3 and np.abs(numbers).max() < 128.5
        weight = constants(nearest)[name]
        steps = (array_of(weight) / scales_O[:, None, None, None]).round()
        weight.CopyFrom(onnx.numpy_helper.from_array(steps * scales_O[:, None, None, None], name))
    new = smooth_tiles(4, seed=9)
    wanted, by_nearest, by_us = (run(m.SerializeToString(), new) for m in (made, nearest, rounded))
    assert loss(by_us, wanted) < 0.7 * loss(by_nearest, wanted)
    shift = np.abs((by_us["dy"] - wanted["dy"]).mean(axis=(0, 2, 3))).max()
    assert shift < 0.3 * np.abs((by_nearest["dy"] - wanted["dy"]).mean(axis=(0, 2, 3))).max()


def test_shared_weights_and_biases_are_not_shifted_twice(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {
        "w": rng.normal(size=(3, 3, 3, 3)).astype(np.float32),
        "v": rng.normal(size=(3, 3, 3, 3)).astype(np.float32),
    }
    tensors |= {"v2": tensors["v"], "bias": np.zeros(3, np.float32)}
    nodes = [
        helper.make_node("Conv", [given, weight, "bias"], [out], name=out, pads=[pad] * 4)
        for given, weight, out, pad in (
            ("tiles", "w", "a", 1),
            ("a", "w", "b", 1),
            ("b", "v", "c", 1),
            ("c", "v2", "d", 1),
        )
    ]
    made = opened(model(nodes, tensors, {"tiles": [1, 3, "h", "w"]}, {"d": [1, 3, "h", "w"]}), tmp_path / "g.onnx")
    scales = round_convolutions(made, choose_nodes(made, ()).layers, tiles(2))
    assert list(scales) == ["v", "v2"]
    assert np.array_equal(array_of(constants(made)["w"]), tensors["w"])
    assert [len(readers(made)[name]) for name in ("bias", "c_shifted_bias")] == [2, 1]
