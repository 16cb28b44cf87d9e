"""What works on this machine, and how to get what does not."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import subprocess
from typing import Any

from edge_rsvlm import __version__, profiles

GDAL_FORMATS = ("GTiff", "COG", "JP2OpenJPEG", "PNG", "JPEG", "WEBP")


def examine() -> dict[str, Any]:
    """Facts by topic; every one was looked up now."""
    return {
        "edge-rsvlm": __version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "cpu_threads": profiles.cpu_threads(),
        "memory_available_bytes": profiles.available_memory(),
        "kernels": _kernels(),
        "engines": _engines(),
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
    return engines


def _raster() -> dict[str, Any]:
    import rasterio
    from rasterio.env import GDALVersion

    with rasterio.Env() as env:
        drivers = env.drivers()
    missing = [name for name in GDAL_FORMATS if name not in drivers]
    return {"rasterio": rasterio.__version__, "gdal": str(GDALVersion.runtime()), "formats_missing": missing}


def _gpu() -> dict[str, Any]:
    """A Jetson's TensorRT lives in JetPack's own Python, which a plain virtual environment does not see."""
    if shutil.which("nvidia-smi") is None:
        return {"found": False, "note": "models run on the CPU"}
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False)
    return {
        "found": answer.returncode == 0,
        "name": answer.stdout.strip(),
        "note": "this version runs models on the CPU",
    }
