"""Numbers of 4 bits: their packing, plain rounding, and GPTQ beside what its paper says."""

from __future__ import annotations

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="needs onnx: not installed")
torch = pytest.importorskip("torch", reason="needs torch: not installed")
ort = pytest.importorskip("onnxruntime", reason="needs onnxruntime: not installed")

from onnx import helper, numpy_helper  # noqa: E402

from edge_rsvlm.export.quantize.awq import output_error  # noqa: E402
from edge_rsvlm.export.quantize.gptq import DAMP, gptq  # noqa: E402
from edge_rsvlm.export.quantize.nbits import Blocks, pack, unpack  # noqa: E402
from edge_rsvlm.export.quantize.rtn import SHRINKS, searched_grid  # noqa: E402
from tests.int4_graphs import FLOAT, correlated, hessian_of, normal, run  # noqa: E402


def blocks_of(outputs: int, inputs: int, block: int, *, symmetric: bool, seed: int = 0) -> Blocks:
    rng, count = np.random.default_rng(seed), -(-inputs // block)
    return Blocks(
        rng.integers(0, 16, (outputs, inputs), dtype=np.uint8),
        rng.uniform(0.01, 1, (outputs, count)).astype(np.float16),
        None if symmetric else rng.integers(0, 16, (outputs, count), dtype=np.uint8),
        block, 4,
    )  # fmt: skip


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block", [16, 32, 64, 128])
@pytest.mark.parametrize("inputs", [32, 77, 128, 301])
def test_onnxruntime_reads_the_values_that_are_packed(block, inputs, symmetric):
    blocks = blocks_of(7, inputs, block, symmetric=symmetric)
    numbers, zeros = pack(blocks)
    again = unpack(numbers, blocks.scales_NG, zeros, inputs, 4)
    np.testing.assert_array_equal(again.numbers_NK, blocks.numbers_NK)
    np.testing.assert_array_equal(again.values_NK(), blocks.values_NK())
    assert again.block == block

    arrays = {"numbers": numbers, "scales": blocks.scales_NG.astype(np.float32)} | (
        {} if symmetric else {"zeros": zeros}
    )
    node = helper.make_node(
        "MatMulNBits", ["x", *arrays], ["y"], domain="com.microsoft", K=inputs, N=7, bits=4, block_size=block
    )
    graph = helper.make_graph(
        [node], "g", [helper.make_tensor_value_info("x", FLOAT, ["n", inputs])],
        [helper.make_tensor_value_info("y", FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    found = run(helper.make_model(graph, opset_imports=opsets, ir_version=10), np.eye(inputs, dtype=np.float32))
    np.testing.assert_allclose(found.T, blocks.values_NK(), rtol=1e-6, atol=1e-7)


def test_weights_on_the_grid_stay_as_they_are():
    weight_NK = 0.5 * (torch.arange(32.0).reshape(2, 16) % 16 - 8)
    grid = searched_grid(weight_NK, torch.ones(16), 16, 4)
    assert grid.scales_NG.flatten().tolist() == [0.5, 0.5]
    assert grid.round(weight_NK)[0].tolist() == list(range(16))
    np.testing.assert_array_equal(grid.blocks(grid.round(weight_NK)).values_NK(), weight_NK)


@pytest.mark.parametrize(("sign", "zero"), [(1, 0), (-1, 15)])
def test_zeros_lie_where_the_block_ends(sign, zero):
    weight_NK = sign * 0.25 * torch.arange(16.0)[None]
    grid = searched_grid(weight_NK, torch.ones(16), 16, 4, symmetric=False)
    assert (grid.scales_NG.item(), grid.zeros_NG.item()) == (0.25, zero)
    np.testing.assert_array_equal(grid.values(grid.round(weight_NK)), weight_NK)


def test_rounding_takes_the_nearest_number():
    weight_NK = torch.tensor([[0.24, 0.26, -0.74, -0.76, 1.49, -4.0, 3.5] + [0.0] * 9])
    grid = searched_grid(weight_NK, torch.ones(16), 16, 4)
    assert grid.scales_NG.item() == 0.5
    assert grid.round(weight_NK)[0, :7].tolist() == [8, 9, 7, 6, 11, 0, 15]


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_searched_range_is_no_worse_than_the_whole(monkeypatch, symmetric):
    weight_NK, importance_K = torch.from_numpy(normal(40, 96)), torch.rand(96) + 0.1
    weight_NK[3] = 0
    errors = []
    for shrinks in (SHRINKS[:1], SHRINKS):
        monkeypatch.setattr("edge_rsvlm.export.quantize.rtn.SHRINKS", shrinks)
        grid = searched_grid(weight_NK, importance_K, 32, 4, symmetric=symmetric)
        values_NK = grid.values(grid.round(weight_NK))
        assert not values_NK[3].any() and (grid.scales_NG > 0).all()
        errors.append(((values_NK - weight_NK).square() * importance_K).sum(1))
    assert (errors[1] <= errors[0] * 1.0001).all() and errors[1].sum() < 0.97 * errors[0].sum()


def dense_gptq(weight_NK, hessian_KK, grid):
    """One input after another, the inverse of what is left computed anew for each: no Cholesky, no lazy blocks."""
    weight, damped = weight_NK.numpy().astype(np.float64), hessian_KK.numpy().astype(np.float64)
    damped = damped + DAMP * np.diag(damped).mean() * np.eye(len(damped))
    left = list(np.argsort(-np.diag(hessian_KK.numpy()), kind="stable"))
    values = np.zeros_like(weight)
    while left:
        k = left[0]
        scales, zeros = (part.numpy()[:, 0] for part in grid.of_inputs(torch.tensor([k])))
        values[:, k] = (np.clip(np.round(weight[:, k] / scales + zeros), 0, 15) - zeros) * scales
        inverse = np.linalg.inv(damped[np.ix_(left, left)])
        weight[:, left] -= np.outer(weight[:, k] - values[:, k], inverse[0] / inverse[0, 0])
        left = left[1:]
    return values


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("inputs", [48, 150])
def test_gptq_is_what_the_paper_says(inputs, symmetric):
    weight_NK, hessian_KK = torch.from_numpy(normal(12, inputs)), hessian_of(correlated(400, inputs))
    grid = searched_grid(weight_NK, hessian_KK.diagonal(), 32, 4, symmetric=symmetric)
    found = grid.values(gptq(weight_NK, hessian_KK, grid)).numpy()
    wanted = dense_gptq(weight_NK, hessian_KK, grid)
    # A tie that float32 breaks the other way moves what comes after in its row.
    same = np.isclose(found, wanted, atol=1e-6).all(1)
    assert same.mean() >= 0.9


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("block", [16, 128])
def test_gptq_is_never_worse_than_rounding(block, seed):
    weight_NK, hessian_KK = torch.from_numpy(normal(24, 144, seed=seed)), hessian_of(correlated(300, 144, seed))
    grid = searched_grid(weight_NK, hessian_KK.diagonal(), block, 4)
    nearest, fitted = grid.round(weight_NK), gptq(weight_NK, hessian_KK, grid)
    errors = [output_error(grid.values(numbers) - weight_NK, hessian_KK) for numbers in (nearest, fitted)]
    assert errors[1] < 0.5 * errors[0]


def test_inputs_that_are_zero_or_equal_do_no_harm():
    x = correlated(50, 64)
    x[:, 5] = 0
    x[:, 7] = x[:, 6]
    weight_NK, hessian_KK = torch.from_numpy(normal(8, 64)), hessian_of(x)
    grid = searched_grid(weight_NK, hessian_KK.diagonal(), 32, 4)
    numbers = gptq(weight_NK, hessian_KK, grid)
    assert numbers.isfinite().all()
    np.testing.assert_array_equal(numbers[:, 5], grid.round(weight_NK)[:, 5])
    silent = gptq(weight_NK, torch.zeros(64, 64), grid)
    np.testing.assert_array_equal(silent, grid.round(weight_NK))
