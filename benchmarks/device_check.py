"""Check a bundle on a board with a GPU: build its engines, compare them with the golden probe and with ONNX Runtime,
time them, and write what was found as JSON.

    python benchmarks/device_check.py BUNDLE [--allow-unsigned] [--output check.json]

Exit code 0 where every graph built and agrees, 1 where one does not, else that of the error: 2 without GPU or TensorRT.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from edge_rsvlm.bundle import Bundle, load_bundle
from edge_rsvlm.doctor import examine
from edge_rsvlm.engines.onnxruntime import ort
from edge_rsvlm.engines.tensorrt import TensorRtSession
from edge_rsvlm.engines.tensorrt_device import Device, open_device
from edge_rsvlm.errors import EdgeRsvlmError
from edge_rsvlm.pipeline.built import Engine, Source, build_engines, read_plan, record, sources, stamp
from edge_rsvlm.verify import cpu_graph

Arrays = dict[str, np.ndarray]
COSINE, GOLDEN_COSINE = 0.995, 0.95
"""Least cosines of an output to that of the same graph on the CPU, and to the golden one, which others rounded."""
WARM_UP, REPEATS = 5, 50


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    """0 for what is not finite, or of another shape."""
    if one.shape != other.shape or not np.isfinite(one).all():
        return 0.0
    a, b = one.astype(np.float64).ravel(), other.astype(np.float64).ravel()
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / norm if norm else float(np.array_equal(a, b))


def timed_ms(run: Any) -> dict[str, float]:
    """Percentiles of a call, copies to and from the GPU included."""
    for _ in range(WARM_UP):
        run()
    taken = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        run()
        taken.append((time.perf_counter() - started) * 1e3)
    return {f"p{share}": round(float(np.percentile(taken, share)), 3) for share in (20, 50, 80, 99)}


def golden(bundle: Bundle, name: str) -> tuple[Arrays, Arrays] | None:
    """Inputs and outputs of the first golden case of a graph without an adapter."""
    for case in bundle.manifest.probe:
        if case.graph == name and case.adapter is None:
            with np.load(bundle.path(case.file), allow_pickle=False) as stored:
                parts = [{k[len(p) :]: stored[k] for k in stored.files if k.startswith(p)} for p in ("in.", "out.")]
            return parts[0], parts[1]
    return None


def usual_inputs(source: Source, probe: Arrays) -> Arrays:
    """The golden inputs repeated up to the sizes that the engine was tuned for."""
    return {name: np.resize(value, source.shapes[name].usual) for name, value in probe.items()}


def cosines(answers: list[np.ndarray], wanted: Arrays) -> dict[str, float]:
    return {name: round(cosine(found, wanted[name]), 6) for name, found in zip(wanted, answers, strict=True)}


def as_it_stands(file: Path, inputs: Arrays, names: list[str]) -> Arrays:
    """What a processor computes of the graph node by node: onnxruntime would fuse it for itself."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return dict(zip(names, session.run(names, inputs), strict=True))


def check(bundle: Bundle, device: Device, source: Source, engine: Engine) -> dict[str, Any]:
    """Agreement with the golden probe, and with the same graph on the CPU, there and at the usual sizes, and times;
    ``agrees`` sums it up."""
    case = golden(bundle, source.name)
    if case is None:
        return {"agrees": False, "problem": "the bundle has no golden probe of it"}
    (inputs, wanted), names = case, list(case[1])
    usual = usual_inputs(source, inputs)
    gpu, cpu = TensorRtSession(device, read_plan(engine), source.name), cpu_graph(source.cpu)
    # Three times, so that a recorded CUDA graph answers too.
    at_probe, at_usual = ([gpu.run(fed, names) for _ in range(3)][-1] for fed in (inputs, usual))
    same = {
        "cosine_probe": cosines(at_probe, as_it_stands(source.file, inputs, names)),
        "cosine_usual": cosines(at_usual, as_it_stands(source.file, usual, names)),
    }
    to_golden = cosines(at_probe, wanted)
    times = {
        "usual_shapes": {name: list(value.shape) for name, value in usual.items()},
        "gpu_ms": timed_ms(lambda: gpu.run(usual, names)),
        "cpu_one_thread_ms": timed_ms(lambda: cpu.run(usual, names)),
    }
    gpu.close()
    least = min(value for agreement in same.values() for value in agreement.values())
    agrees = least >= COSINE and min(to_golden.values()) >= GOLDEN_COSINE
    return {"agrees": agrees, **same, "cosine_golden": to_golden, **times}


def examine_bundle(bundle: Bundle) -> dict[str, Any]:
    device = open_device()
    engines = build_engines(bundle, device, None, lambda name: print(f"building {name} ...", file=sys.stderr))
    graphs = {}
    for source, engine in zip(sources(bundle), engines, strict=True):
        print(f"checking {source.name} ...", file=sys.stderr)
        graphs[source.name] = {**record(engine), **_guarded(bundle, device, source, engine)}
    facts = {
        key: value for key, value in stamp(device, sources(bundle)[0]).items() if key not in ("graph_sha256", "shapes")
    }
    return {"device": facts, "graphs": graphs, "passed": all(graph["agrees"] for graph in graphs.values())}


def _guarded(bundle: Bundle, device: Device, source: Source, engine: Engine) -> dict[str, Any]:
    """One graph that fails must not hide what the others do."""
    try:
        return check(bundle, device, source, engine)
    except EdgeRsvlmError as exc:
        return {"agrees": False, "problem": str(exc)}


def report(bundle: Path, allow_unsigned: bool) -> tuple[dict[str, Any], int]:
    """What was found, and the exit code."""
    found: dict[str, Any] = {"platform": platform.platform(), "doctor": examine()}
    try:
        loaded = load_bundle(bundle, allow_unsigned=allow_unsigned)
        found |= {"bundle": [loaded.manifest.name, loaded.manifest_sha256], **examine_bundle(loaded)}
    except EdgeRsvlmError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return found | {"passed": False, "problem": str(exc)}, exc.exit_code
    return found, 0 if found["passed"] else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--allow-unsigned", action="store_true")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    found, code = report(options.bundle, options.allow_unsigned)
    text = json.dumps(found, indent=1)
    if options.output:
        options.output.write_text(text + "\n")
    print(text)
    return code


if __name__ == "__main__":
    sys.exit(main())
