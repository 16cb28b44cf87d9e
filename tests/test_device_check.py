"""The script that owners of a board run, with a library that runs engines without one."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from edge_rsvlm.bundle import load_bundle
from edge_rsvlm.engines.cuda import Cuda
from edge_rsvlm.engines.tensorrt_device import device_of
from edge_rsvlm.errors import UsageError
from tests import tiny_bundle
from tests.fake_tensorrt import FakeCuda, FakeTensorRt

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "device_check.py"


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("device_check", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    cuda = FakeCuda()
    monkeypatch.setattr(module, "open_device", lambda: device_of(FakeTensorRt(cuda), Cuda(cuda)))
    monkeypatch.setattr(module, "REPEATS", 3)
    return module


def bundle_with(folder, for_tensorrt):
    files = tiny_bundle.files(main_tensorrt_onnx=for_tensorrt)
    span = {"least": [1, 4], "usual": [1, 4], "most": [1, 4]}
    ends = {"inputs": {"tiles": "x"}, "outputs": {"features": "y"}, "precision": "f32"}
    graphs = {
        "main": {"file": "main.onnx", **ends, "tensorrt": {"file": "main.tensorrt.onnx", "shapes": {"x": span}}},
        "second": {"file": "weights/second.onnx", **ends},
    }
    return tiny_bundle.write(folder, files, graphs=graphs)


def other_weights():
    """The same graph with the weights in another order."""
    whole = tiny_bundle.model()
    return whole.replace(tiny_bundle.WEIGHTS.tobytes(), tiny_bundle.WEIGHTS[::-1].tobytes())


def test_engines_that_agree_pass(script, tmp_path):
    found, code = script.report(bundle_with(tmp_path / "b", tiny_bundle.model()), True)
    assert (code, found["passed"]) == (0, True)
    assert found["device"]["gpu"] == "Fake GPU" and "graph_sha256" not in found["device"]
    graph = found["graphs"]["main"]
    assert graph["cosine_golden"] == graph["cosine_probe"] == graph["cosine_usual"] == {"y": 1.0}
    assert graph["built"] and set(graph["gpu_ms"]) == {"p20", "p50", "p80", "p99"}
    assert json.loads(json.dumps(found)) == found


def test_graphs_that_compute_something_else_do_not(script, tmp_path):
    found, code = script.report(bundle_with(tmp_path / "b", other_weights()), True)
    assert (code, found["passed"], found["graphs"]["main"]["agrees"]) == (1, False, False)
    graph = found["graphs"]["main"]
    assert graph["cosine_golden"]["y"] < 0.95 and graph["cosine_probe"]["y"] == 1.0


def test_engines_that_compute_something_else_than_their_graph_do_not(script, tmp_path, monkeypatch):
    run = script.TensorRtSession.run
    monkeypatch.setattr(script.TensorRtSession, "run", lambda *given: [value[:, ::-1] for value in run(*given)])
    found, code = script.report(bundle_with(tmp_path / "b", tiny_bundle.model()), True)
    assert code == 1 and found["graphs"]["main"]["cosine_probe"]["y"] < 0.995


def test_graphs_without_a_probe_do_not(script, tmp_path):
    bundle = load_bundle(bundle_with(tmp_path / "b", tiny_bundle.model()), allow_unsigned=True)
    bare = dataclasses.replace(bundle, manifest=bundle.manifest.model_copy(update={"probe": ()}))
    found = script.examine_bundle(bare)
    assert not found["passed"] and "no golden probe" in found["graphs"]["main"]["problem"]


def test_a_machine_without_a_gpu_is_refused(script, tmp_path, monkeypatch, capsys):
    def missing():
        raise UsageError("CUDA finds no GPU here", fix="none")

    monkeypatch.setattr(script, "open_device", missing)
    output = tmp_path / "check.json"
    arguments = [str(SCRIPT), str(bundle_with(tmp_path / "b", tiny_bundle.model())), "--allow-unsigned", "--output"]
    monkeypatch.setattr("sys.argv", [*arguments, str(output)])
    assert script.main() == 2
    assert json.loads(output.read_text())["problem"].startswith("CUDA finds no GPU here")
    assert "error: CUDA finds no GPU here" in capsys.readouterr().err


def test_cosines_of_what_is_not_comparable_are_zero(script):
    one = np.float32([1, 2])
    assert script.cosine(one, np.float32([1, 2, 3])) == script.cosine(np.float32([1, np.nan]), one) == 0
    assert script.cosine(one, -one) == pytest.approx(-1) and script.cosine(0 * one, 0 * one) == 1
