"""What works on this machine, and how to get what does not."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import subprocess
from typing import Any

from edge_rsvlm import __version__, profiles
from edge_rsvlm.bundle import Bundle
from edge_rsvlm.config.manifest import Manifest
from edge_rsvlm.errors import UsageError

NEVER_RUN = "no engine has run on a GPU where this was made: check yours with benchmarks/device_check.py"
BUILD = "run `edge-rsvlm engine build`: it has graphs for this GPU"
GDAL_FORMATS = ("GTiff", "COG", "JP2OpenJPEG", "PNG", "JPEG", "WEBP")


def examine(bundle: Bundle | None = None) -> dict[str, Any]:
    """Facts by topic, also of where ``bundle`` runs; every one was looked up now."""
    engines = _engines()
    facts = {
        "edge-rsvlm": __version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "cpu_threads": profiles.cpu_threads(),
        "memory_available_bytes": profiles.available_memory(),
        "kernels": _kernels(),
        "engines": engines,
        "suitable_target": suitable(engines),
        "raster": _raster(),
        "gpu": _gpu(),
    }
    return facts if bundle is None else facts | {"bundle": _bundle(bundle, engines)}


def _kernels() -> dict[str, Any]:
    from edge_rsvlm.tiles import variants

    found = variants()
    return {"tile_gather": {"chosen": found[0], "available": list(found)}}


def _engines() -> dict[str, Any]:
    engines: dict[str, Any] = {}
    if importlib.util.find_spec("onnxruntime"):
        from edge_rsvlm.engines.onnxruntime import VERSION, ort

        engines["onnxruntime"] = {"version": VERSION, "providers": ort.get_available_providers(), "used": "CPU"}
    else:
        engines["onnxruntime"] = {"missing": "pip install onnxruntime"}
    engines["llama.cpp"] = _llama()
    engines["tensorrt"] = _tensorrt()
    return engines


def _llama() -> dict[str, Any]:
    try:
        from edge_rsvlm.engines.llama_library import VERSION
    except UsageError as exc:
        return {"missing": exc.fix}
    return {"version": f"llama-cpp-python {VERSION}", "used": "CPU"}


def suitable(engines: dict[str, Any]) -> str:
    """Which target of ``export run`` suits what is here."""
    if str(engines["tensorrt"].get("used", "")).startswith("GPU"):
        return 'onnx:int8 or onnx:f16 with engines = ["onnxruntime", "tensorrt"]'
    words = "gguf:Q4_K_M" if "version" in engines["llama.cpp"] else "onnx:int4"
    return f"onnx:int8; {words} for language models of a billion parameters and more"


def _tensorrt() -> dict[str, Any]:
    """The library, and whether engines can be built and run here; each part tells what it lacks."""
    from edge_rsvlm.engines.tensorrt_device import open_device
    from edge_rsvlm.engines.tensorrt_library import WITHOUT_GPU, load_tensorrt

    try:
        library = load_tensorrt()
    except UsageError as exc:
        return {"missing": exc.fix}
    facts = {"version": f"{library.__name__} {library.__version__}", "note": NEVER_RUN}
    try:
        gpu = open_device().gpu
    except UsageError as exc:
        compiles = "compiles what is exported; runs nothing" if library.__name__ == WITHOUT_GPU else "runs nothing"
        return facts | {"used": f"{compiles}: {exc}"}
    return facts | {"used": f"GPU ({gpu.name}, compute capability {gpu.compute_capability})"}


def _bundle(bundle: Bundle, engines: dict[str, Any]) -> dict[str, Any]:
    """Where its parts run here, what would suit this machine better, and what is known of its graphs for TensorRT."""
    from edge_rsvlm.pipeline.devices import place

    manifest, placed = bundle.manifest, place(bundle, "auto")
    on_gpu = {name for name, graph in manifest.graphs.items() if graph.tensorrt is not None and placed.device == "gpu"}
    runs = {
        name: "TensorRT on the GPU" if name in on_gpu else f"ONNX Runtime on the CPU, {graph.precision}"
        for name, graph in manifest.graphs.items()
    }
    written = dict.fromkeys(_by_llama(manifest), "llama.cpp on the CPU")
    checked = {k: v for step in manifest.steps for k, v in step.metrics.items() if k.endswith(" tensorrt")}
    return {
        "name": f"{manifest.name} {manifest.version}",
        "runs": runs | written,
        **({"checked": checked} if checked else {}),
        **({"note": placed.note} if placed.note else {}),
        **({"advice": advice} if (advice := _advice(manifest, placed.device, engines)) else {}),
    }


def _by_llama(manifest: Manifest) -> list[str]:
    """Tasks of which llama.cpp does something."""
    from edge_rsvlm.config.offered import by_llama

    return [verb for verb, task in manifest.tasks if by_llama(task)]


def _advice(manifest: Manifest, device: str, engines: dict[str, Any]) -> str:
    """What to do so that this machine runs the bundle, and runs it well; empty where nothing is."""
    if _by_llama(manifest) and "missing" in engines["llama.cpp"]:
        return f"its texts need llama.cpp: {engines['llama.cpp']['missing']}"
    if device == "gpu":
        return ""
    if str(engines["tensorrt"].get("used", "")).startswith("GPU"):
        has_graphs = any(graph.tensorrt is not None for graph in manifest.graphs.values())
        return BUILD if has_graphs else f"for the GPU, export it again: {suitable(engines)}"
    few_bits = any(graph.precision.startswith("int") for graph in manifest.graphs.values())
    return "" if few_bits or _by_llama(manifest) else f"to be faster, export it again: {suitable(engines)}"


def _raster() -> dict[str, Any]:
    import rasterio
    from rasterio.env import GDALVersion

    with rasterio.Env() as env:
        drivers = env.drivers()
    missing = [name for name in GDAL_FORMATS if name not in drivers]
    return {"rasterio": rasterio.__version__, "gdal": str(GDALVersion.runtime()), "formats_missing": missing}


def _gpu() -> dict[str, Any]:
    """What the driver says; ``engines`` tells whether TensorRT can use it."""
    if shutil.which("nvidia-smi") is None:
        return {"found": False, "note": "models run on the CPU"}
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False)
    return {
        "found": answer.returncode == 0,
        "name": answer.stdout.strip(),
        "note": "used with `edge-rsvlm engine build` and --device gpu",
    }
