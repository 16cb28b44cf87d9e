"""Engines: what they do to the machine that runs them."""

from __future__ import annotations

import os
import subprocess
import sys


def test_onnxruntime_neither_reports_nor_leaves_a_device_id(needs, tmp_path):
    needs("onnxruntime")
    code = "from edge_rsvlm.engines.onnxruntime import OnnxRuntimeEngine; OnnxRuntimeEngine()"
    places = {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ORT_")} | places
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert list(tmp_path.rglob("*")) == []
