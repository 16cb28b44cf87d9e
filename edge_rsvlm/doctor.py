"""What works on this machine, and how to get what does not."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import subprocess
from typing import Any

from edge_rsvlm import __version__, profiles
from edge_rsvlm.engines.cuda import CudaError
from edge_rsvlm.errors import UsageError

NEVER_RUN = "the makers never ran an engine on a Jetson: check yours with benchmarks/device_check.py"
GDAL_FORMATS = ("GTiff", "COG", "JP2OpenJPEG", "PNG", "JPEG", "WEBP")


def examine() -> dict[str, Any]:
    """Facts by topic; every one was looked up now."""
    engines = _engines()
    return {
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
    from edge_rsvlm.engines.tensorrt_library import load_tensorrt

    try:
        library = load_tensorrt()
    except UsageError as exc:
        return {"missing": exc.fix}
    facts = {"version": f"{library.__name__} {library.__version__}", "note": NEVER_RUN}
    try:
        gpu = open_device().gpu
    except (UsageError, CudaError) as exc:
        return facts | {"used": f"not here: {exc}"}
    return facts | {"used": f"GPU ({gpu.name}, compute capability {gpu.compute_capability})"}


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
