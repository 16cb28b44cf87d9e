"""How long a user waits for `--help`, beside an interpreter that does nothing. The aim is 0.3 s."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

AIM_S = 0.3


def test_help(benchmark):
    command = [str(Path(sys.executable).parent / "edge-rsvlm"), "--help"]
    benchmark(subprocess.run, command, capture_output=True, check=True)
    assert benchmark.stats.stats.median < AIM_S


def test_floor_interpreter(benchmark):
    benchmark(subprocess.run, [sys.executable, "-c", "pass"], check=True)
