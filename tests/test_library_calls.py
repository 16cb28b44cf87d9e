"""What the engine calls of TensorRT and CUDA is what every supported version of them has: by the signatures in
``api_records``, and by the libraries that are installed."""

from __future__ import annotations

import importlib
import json
from types import SimpleNamespace

import pytest

from edge_rsvlm.engines import tensorrt_library as ours
from tests import api_record
from tests.api_record import CLASSES, FOLDER, accepts, cuda_names, cuda_offered, offered, used, wanted

TENSORRT = sorted(FOLDER.glob("tensorrt-*.json"))
CUDA = sorted(FOLDER.glob("cuda-bindings-*.json"))


def check(found):
    assert {f"{name}.{member}" for name, members in wanted().items() for member in members} == found.keys()
    for name, protocol in CLASSES.items():
        for member, value in used(protocol).items():
            signatures = found[f"{name}.{member}"]
            assert not callable(value) or any(accepts(text, value) for text in signatures), (name, member, signatures)


@pytest.mark.parametrize("record", TENSORRT, ids=lambda path: path.stem)
def test_tensorrt(record):
    check(json.loads(record.read_text()))


def test_tensorrt_for_rtx(needs):
    needs("tensorrt_rtx")
    library = importlib.import_module("tensorrt_rtx")
    check(offered(library))
    assert isinstance(library.__version__, str)
    assert used(ours.RtxConfig).keys() <= set(dir(library.IBuilderConfig)) and library.ComputeCapability.SM86


@pytest.mark.parametrize("record", CUDA, ids=lambda path: path.stem)
def test_cuda(record):
    assert json.loads(record.read_text()) == cuda_names()


def test_installed_cuda(needs):
    needs("cuda")
    assert cuda_offered(importlib.import_module(api_record.CUDA)) == cuda_names()


def test_every_version_has_a_record():
    assert [path.stem for path in (*TENSORRT, *CUDA)] == [
        "tensorrt-10.13.3", "tensorrt-10.16.1", "tensorrt-10.3.0", "tensorrt-11.4.0", "cuda-bindings-12.8.0",
        "cuda-bindings-13.5.0",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("signature", "taken"),
    [
        ("memory: int, size: int -> None", True),
        ("memory: int, size: int, more: int = ... -> None", True),
        ("memory: int -> None", False),
        ("memory: int, size: int, more: int -> None", False),
        ("memory: int, size: str -> None", False),
        ("memory: int, size: int -> bool", False),
    ],
)
def test_other_signatures_are_told_apart(signature, taken):
    assert accepts(signature, ours.Context.set_device_memory) == taken


def test_what_is_missing_is_told():
    found = offered(SimpleNamespace(Runtime=SimpleNamespace(other=1)))
    assert "Runtime.deserialize_cuda_engine" not in found
