"""Candidates as ONNX graphs: exported with folded norms, quantized by the export's own INT8, run and timed.

Shapes: N tiles, H, W tile pixels.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
from torch import Tensor, nn

from edge_rsvlm.export.default.encoders.candidates import MAPS
from edge_rsvlm.export.default.encoders.scores import Encode
from edge_rsvlm.export.quantize.settings import Int8
from edge_rsvlm.export.quantize.static import quantize_static

F32 = npt.NDArray[np.float32]
OPSET = 20
LATENCY_PX, ROUNDS, WARM_UP = 384, 40, 3
PRECISIONS, THREADS = ("f32", "int8"), (1, 2)


class Maps(nn.Module):
    """The encoder with its maps as a tuple, as a graph has them."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, tiles: Tensor) -> tuple[Tensor, ...]:
        maps = self.encoder(tiles)
        return tuple(maps[name] for name in MAPS)


def export(folded: nn.Module, path: Path) -> None:
    """Write the float graph: tiles [N,5,H,W] -> c2 .. c5, with N, H and W free."""
    free = torch.export.Dim.DYNAMIC
    torch.onnx.export(
        Maps(folded).eval(), (torch.zeros(2, 5, LATENCY_PX, LATENCY_PX),), str(path), dynamo=True, opset_version=OPSET,
        dynamic_shapes=({0: free, 2: free, 3: free},), input_names=["tiles"], output_names=list(MAPS),
        external_data=False, verbose=False,
    )  # fmt: skip


def quantize(graph: Path, tiles: Sequence[F32], out: Path) -> int:
    """Static INT8 (U8S8) of ``graph``, calibrated on ``tiles`` [5,H,W]; returns its bytes."""
    return int(quantize_static(graph, [{"tiles": tile[None]} for tile in tiles], Int8(), out, None)["bytes"])


def session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Sessions are timed in turns: threads that spin after one run would slow the next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def encoder_of(path: Path) -> Encode:
    """The graph at ``path`` as a function."""
    running = session(path, 1)
    return lambda tiles: dict(zip(MAPS, running.run(list(MAPS), {"tiles": tiles}), strict=True))


def likeness(tiles: Sequence[F32], one: Encode, other: Encode) -> dict[str, float]:
    """Mean cosine of each map of two encoders, over its channels and cells."""
    found: dict[str, list[float]] = {name: [] for name in MAPS}
    for tile in tiles:
        a, b = one(tile[None]), other(tile[None])
        for name in MAPS:
            x, y = a[name].ravel(), b[name].ravel()
            found[name].append(float(x @ y / (np.linalg.norm(x) * np.linalg.norm(y))))
    return {name: statistics.fmean(values) for name, values in found.items()}


def cost(folded: nn.Module) -> dict[str, int]:
    """Parameters, and multiply-accumulates of convolutions on one tile of LATENCY_PX."""
    macs = 0

    def count(conv: nn.Conv2d, given: tuple[Tensor, ...], out: Tensor) -> None:
        nonlocal macs
        macs += out[0].numel() * conv.weight[0].numel()

    hooks = [m.register_forward_hook(count) for m in folded.modules() if isinstance(m, nn.Conv2d)]
    with torch.inference_mode():
        folded(torch.zeros(1, 5, LATENCY_PX, LATENCY_PX))
    for hook in hooks:
        hook.remove()
    return {"parameters": sum(p.numel() for p in folded.parameters()), "macs": macs}


def latency(graphs: dict[str, dict[str, Path]], reference: str) -> dict[str, dict[str, dict[str, float]]]:
    """Milliseconds of each graph, precision ("f32", "int8") and number of threads, at LATENCY_PX.

    All take turns in every round. ``ratio`` is the median over rounds of the time beside that of ``reference`` in f32
    with as many threads: what slows the machine for a while slows both.
    """
    tile = np.random.default_rng(0).uniform(-1, 1, (1, 5, LATENCY_PX, LATENCY_PX)).astype(np.float32)
    runs = {
        (name, f"{precision}_{threads}"): session(path, threads)
        for name, paths in graphs.items()
        for precision, path in paths.items()
        for threads in THREADS
    }
    times: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    for turn in range(WARM_UP + ROUNDS):
        for key, running in runs.items():
            begun = time.perf_counter()
            running.run(None, {"tiles": tile})
            if turn >= WARM_UP:
                times[key].append(1e3 * (time.perf_counter() - begun))
    return {name: {kind: _told(times, name, kind, reference) for n, kind in runs if n == name} for name in graphs}


def _told(times: dict[tuple[str, str], list[float]], name: str, kind: str, reference: str) -> dict[str, float]:
    beside = times[reference, f"f32_{kind.rpartition('_')[2]}"]
    own = times[name, kind]
    deciles = statistics.quantiles(own, n=10)
    return {
        "p20_ms": deciles[1],
        "p50_ms": statistics.median(own),
        "p80_ms": deciles[7],
        "ratio": statistics.median(a / b for a, b in zip(own, beside, strict=True)),
    }
