"""Check a bundle on a board with a GPU: build its engines, compare them with the golden probe and with ONNX Runtime,
time them, and write what was found as JSON.

    python benchmarks/device_check.py BUNDLE [--allow-unsigned] [--output check.json]

Exit code 0 where every graph built and agrees. Whoever makes edge-rsvlm has no such board: please send us the file.
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
from edge_rsvlm.engines.tensorrt import TensorRtSession
from edge_rsvlm.engines.tensorrt_device import Device, open_device
from edge_rsvlm.errors import EdgeRsvlmError
from edge_rsvlm.pipeline.built import Engine, Source, build_engines, read_plan, record, sources, stamp
from edge_rsvlm.verify import cpu_graph

Arrays = dict[str, np.ndarray]
COSINE = 0.995
"""Least cosine of an output to that of ONNX Runtime: the gate of every changed model."""
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


def probe_inputs(bundle: Bundle, name: str) -> Arrays | None:
    """Of the first golden case of a graph without an adapter."""
    for case in bundle.manifest.probe:
        if case.graph == name and case.adapter is None:
            with np.load(bundle.path(case.file), allow_pickle=False) as stored:
                return {key.removeprefix("in."): stored[key] for key in stored.files if key.startswith("in.")}
    return None


def usual_inputs(source: Source, probe: Arrays) -> Arrays:
    """The golden inputs repeated up to the sizes that the engine was tuned for."""
    return {name: np.resize(value, source.shapes[name].usual) for name, value in probe.items()}


def check(bundle: Bundle, device: Device, source: Source, engine: Engine) -> dict[str, Any]:
    """Agreement on the golden probe and at the usual sizes, and times there; ``agrees`` sums it up."""
    probe = probe_inputs(bundle, source.name)
    if probe is None:
        return {"agrees": False, "problem": "the bundle has no golden probe of it"}
    outputs = list(bundle.manifest.graphs[source.name].outputs.values())
    gpu, cpu = TensorRtSession(device, read_plan(engine), source.name), cpu_graph(source.cpu)
    usual = usual_inputs(source, probe)
    found: dict[str, Any] = {}
    for what, inputs in (("probe", probe), ("usual", usual)):
        # Three times, so that a recorded CUDA graph answers too.
        answers = [gpu.run(inputs, outputs) for _ in range(3)][-1]
        wanted = cpu.run(inputs, outputs)
        pairs = zip(outputs, answers, wanted, strict=True)
        found[f"cosine_{what}"] = {name: round(cosine(answer, value), 6) for name, answer, value in pairs}
    found["usual_shapes"] = {name: list(value.shape) for name, value in usual.items()}
    found["gpu_ms"] = timed_ms(lambda: gpu.run(usual, outputs))
    found["cpu_one_thread_ms"] = timed_ms(lambda: cpu.run(usual, outputs))
    gpu.close()
    cosines = [*found["cosine_probe"].values(), *found["cosine_usual"].values()]
    return {"agrees": min(cosines) >= COSINE, **found}


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--allow-unsigned", action="store_true")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    report: dict[str, Any] = {"platform": platform.platform(), "doctor": examine()}
    try:
        bundle = load_bundle(options.bundle, allow_unsigned=options.allow_unsigned)
        report |= {"bundle": [bundle.manifest.name, bundle.manifest_sha256], **examine_bundle(bundle)}
    except EdgeRsvlmError as exc:
        report |= {"passed": False, "problem": str(exc)}
    text = json.dumps(report, indent=1)
    if options.output:
        options.output.write_text(text + "\n")
    print(text)
    return 0 if report["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
