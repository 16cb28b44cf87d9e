"""What ``doctor`` says of a machine, and of where a bundle's parts run on it."""

from __future__ import annotations

import dataclasses
import json

import pytest
from click.testing import CliRunner

from edge_rsvlm import doctor
from edge_rsvlm.bundle import load_bundle
from edge_rsvlm.cli import cli
from edge_rsvlm.config.task_specs import GgufDecoder
from edge_rsvlm.engines import tensorrt_device, tensorrt_library
from edge_rsvlm.engines.cuda import Cuda
from edge_rsvlm.engines.tensorrt_device import device_of
from edge_rsvlm.errors import UsageError
from edge_rsvlm.pipeline.built import build_engines
from tests import tiny_bundle
from tests.fake_tensorrt import FakeCuda, FakeTensorRt

FEW_BITS = "onnx:int8"


@pytest.fixture
def bundle(tmp_path, request):
    """Graph ``main`` is there for TensorRT too; a parameter is the precision of both."""
    files = tiny_bundle.files(main_tensorrt_onnx=tiny_bundle.model())
    ends = {"inputs": {"tiles": "x"}, "outputs": {"features": "y"}, "precision": getattr(request, "param", "f32")}
    span = {"least": [1, 4], "usual": [1, 4], "most": [1, 4]}
    graphs = {
        "main": {"file": "main.onnx", **ends, "tensorrt": {"file": "main.tensorrt.onnx", "shapes": {"x": span}}},
        "second": {"file": "weights/second.onnx", **ends},
    }
    said = "compiled for SM86 by some compiler; no device ran it"
    step = {"step": "quantize", "hash": "0" * 64, "tools": {}, "metrics": {"main tensorrt": said, "bytes": 3}}
    written = tiny_bundle.write(tmp_path / "bundle", files, graphs=graphs, steps=[step])
    return load_bundle(written, allow_unsigned=True)


@pytest.fixture
def gpu(monkeypatch):
    """A machine with TensorRT and a GPU."""
    cuda = FakeCuda()
    device = device_of(FakeTensorRt(cuda), Cuda(cuda))
    monkeypatch.setattr(tensorrt_device, "open_device", lambda: device)
    monkeypatch.setattr(tensorrt_library, "load_tensorrt", lambda: device.library)
    return device


@pytest.fixture
def no_gpu(monkeypatch):
    def missing(*_):
        raise UsageError("there is none", fix="buy one")

    monkeypatch.setattr(tensorrt_device, "open_device", missing)
    monkeypatch.setattr(tensorrt_library, "load_tensorrt", missing)


def test_a_processor_wants_fewer_bits(bundle, no_gpu):
    facts = doctor.examine(bundle)
    assert facts["engines"]["tensorrt"] == {"missing": "buy one"}
    assert facts["bundle"]["runs"] == dict.fromkeys(("main", "second"), "ONNX Runtime on the CPU, f32")
    assert facts["bundle"]["checked"] == {"main tensorrt": "compiled for SM86 by some compiler; no device ran it"}
    assert FEW_BITS in facts["bundle"]["advice"]


@pytest.mark.parametrize("bundle", ["int8"], indirect=True)
def test_nothing_is_advised_where_a_bundle_suits(bundle, no_gpu):
    assert "advice" not in doctor.examine(bundle)["bundle"]


def test_a_gpu_wants_engines(bundle, gpu):
    facts = doctor.examine(bundle)
    assert facts["engines"]["tensorrt"]["used"] == "GPU (Fake GPU, compute capability 8.7)"
    assert facts["engines"]["tensorrt"]["version"] == "tensorrt 10.3.0"
    assert "engine build" in facts["bundle"]["advice"]
    build_engines(bundle, gpu, None, lambda name: None)
    found = doctor.examine(bundle)["bundle"]
    assert found["runs"] == {"main": "TensorRT on the GPU", "second": "ONNX Runtime on the CPU, f32"}
    assert found["note"].startswith("runs on Fake GPU") and "advice" not in found


def test_a_gpu_wants_graphs(bundle, gpu):
    graphs = {name: graph.model_copy(update={"tensorrt": None}) for name, graph in bundle.manifest.graphs.items()}
    plain = dataclasses.replace(bundle, manifest=bundle.manifest.model_copy(update={"graphs": graphs}))
    assert '"tensorrt"' in doctor.examine(plain)["bundle"]["advice"]


def test_what_llama_writes_needs_it(bundle):
    missing = {"llama.cpp": {"missing": "pip install it"}, "tensorrt": {"missing": "no"}}
    assert doctor._advice(bundle.manifest, "cpu", missing) != ""
    writes = bundle.manifest.tasks.caption.model_copy(update={"decoder": GgufDecoder.model_construct()})
    tasks = bundle.manifest.tasks.model_copy(update={"caption": writes})
    manifest = bundle.manifest.model_copy(update={"tasks": tasks})
    assert doctor._by_llama(manifest) == ["caption"]
    assert doctor._advice(manifest, "cpu", missing) == "its texts need llama.cpp: pip install it"


def test_on_the_command_line():
    shown = CliRunner().invoke(cli, ["doctor", "--json"])
    assert shown.exit_code == 0, shown.output
    facts = json.loads(shown.stdout)
    assert {"onnxruntime", "llama.cpp", "tensorrt"} == facts["engines"].keys()
    assert facts["bundle"]["name"].startswith("edge-rsvlm-default")
    text = CliRunner().invoke(cli, ["doctor"]).stdout
    assert all(topic in text for topic in facts)
