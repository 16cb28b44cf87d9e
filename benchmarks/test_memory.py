"""Memory of whole commands on rasters of repeated real imagery: flat in the raster's size, under the budget."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import rasterio
from rasterio.transform import from_origin

ROOT = Path(__file__).parents[1]
SCENE = ROOT / "edge_rsvlm" / "scenes" / "riverside_2020.tif"
EXECUTABLE = str(Path(sys.executable).parent / "edge-rsvlm")
SIDES_PX = (3_000, 12_000)
FLAT_WITHIN = 1.3
BUDGET_MIB = 512
TASKS = {"detect": 1, "caption": 1, "change": 2}


@pytest.fixture(scope="module")
def rasters(tmp_path_factory):
    """Tiled, compressed GeoTIFFs of both sizes at the scene's own ground resolution."""
    folder = tmp_path_factory.mktemp("rasters")
    with rasterio.open(SCENE) as scene:
        pixels, profile = scene.read(), scene.profile
    paths = {}
    for side in SIDES_PX:
        repeats = -(-side // pixels.shape[1])
        strip = np.tile(pixels, (1, 1, repeats))[:, :, :side]
        transform = from_origin(profile["transform"].c, profile["transform"].f, 0.6, 0.6)
        options = {"driver": "GTiff", "tiled": True, "blockxsize": 512, "blockysize": 512, "compress": "deflate"}
        paths[side] = folder / f"{side}.tif"
        with rasterio.open(
            paths[side], "w", width=side, height=side, count=4, dtype="uint8", crs=profile["crs"], transform=transform,
            **options,
        ) as out:  # fmt: skip
            for row in range(0, side, strip.shape[1]):
                rows = min(strip.shape[1], side - row)
                out.write(strip[:, :rows], window=((row, row + rows), (0, side)))
    return paths


def peak_anonymous_bytes(command: list[str]) -> int:
    """Greatest RssAnon of a command while it runs."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peak, status = 0, Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        lines = [line for line in status.read_text().splitlines() if line.startswith("RssAnon")]
        peak = max([peak, *(int(line.split()[1]) * 1024 for line in lines)])
        time.sleep(0.01)
    assert process.returncode == 0, process.stderr.read().decode()
    return peak


@pytest.mark.parametrize("task", TASKS)
def test_memory_is_flat(task, rasters, tmp_path):
    """With room to spare: under a tight budget the plan differs from raster to raster."""
    peaks = [peak_anonymous_bytes(command(task, rasters[side], tmp_path)) for side in SIDES_PX]
    print(f"{task}: " + ", ".join(f"{s} px {p / 2**20:.0f} MiB" for s, p in zip(SIDES_PX, peaks, strict=True)))
    assert peaks[1] <= FLAT_WITHIN * peaks[0]


@pytest.mark.parametrize("task", TASKS)
def test_memory_stays_under_the_budget(task, rasters, tmp_path):
    limited = [*command(task, rasters[SIDES_PX[-1]], tmp_path), "--memory", f"{BUDGET_MIB}MiB"]
    peak = peak_anonymous_bytes(limited)
    print(f"{task}: {peak / 2**20:.0f} of {BUDGET_MIB} MiB")
    assert peak <= BUDGET_MIB << 20


def command(task, raster, folder):
    return [EXECUTABLE, task, *[str(raster)] * TASKS[task], "--output", str(folder / "out.geojson")]
