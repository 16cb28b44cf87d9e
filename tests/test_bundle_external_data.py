"""External data of ONNX files from hostile hands: nothing outside the bundle is read."""

from __future__ import annotations

import random

import pytest

from edge_rsvlm.bundle.external_data import NotOnnx, external_data
from tests import tiny_bundle
from tests.bundle_checks import refused
from tests.tiny_bundle import field, model, tensor


@pytest.mark.parametrize(
    ("external", "message"),
    [
        ({"location": "../tokenizer.json"}, "outside the files"),
        ({"location": "/etc/passwd"}, "outside the files"),
        ({"location": "x.data"}, "outside the files"),
        ({"location": "manifest.json"}, "outside the files"),
        ({"location": "*/_ORT_MEM_ADDR_/*", "offset": "64", "length": "16"}, "outside the files"),
        ({"location": "a\0b"}, "outside the files"),
        ({"location": "answers.txt", "offset": "0", "length": "8"}, "beyond the end of 'answers.txt'"),
        ({"location": "answers.txt", "offset": "8"}, "beyond the end of 'answers.txt'"),
        ({"location": "answers.txt", "offset": "9" * 19, "length": "9" * 19}, "beyond the end"),
        ({"location": "answers.txt", "offset": "-1"}, "offset or length '-1'"),
        ({"location": "answers.txt", "length": "1e1"}, "offset or length '1e1'"),
        ({"offset": "0"}, "does not say where"),
        ({}, "does not say where"),
        ({"location": "x" * 5000}, "absurd length"),
    ],
)
def test_external_data_stays_inside(tmp_path, external, message):
    contents = {**tiny_bundle.files(), "main.onnx": model(tensor("w", external))}
    refused(tiny_bundle.write(tmp_path / "b", contents), message)


def outside() -> bytes:
    return tensor("w", {"location": "../x"})


def attribute(*fields: bytes) -> bytes:
    return field(1, "a") + b"".join(fields)


def subgraph(graph: bytes) -> bytes:
    """A node with a graph in an attribute."""
    return field(1, field(5, attribute(field(6, graph))))


HIDDEN = {
    "sparse values": field(15, field(1, outside())),
    "sparse indices": field(15, field(2, outside())),
    "attribute": field(1, field(5, attribute(field(5, outside())))),
    "attributes": field(1, field(5, attribute(field(10, outside())))),
    "sparse attribute": field(1, field(5, attribute(field(22, field(1, outside()))))),
    "sparse attributes": field(1, field(5, attribute(field(23, field(2, outside()))))),
    "subgraph": subgraph(field(5, outside())),
    "subgraphs": field(1, field(5, attribute(field(11, field(5, outside()))))),
    "subgraph of a subgraph": subgraph(subgraph(field(5, outside()))),
}


@pytest.mark.parametrize("place", HIDDEN)
def test_external_data_hidden_in_a_graph(tmp_path, place):
    contents = {**tiny_bundle.files(), "main.onnx": model(graph_extra=HIDDEN[place])}
    refused(tiny_bundle.write(tmp_path / "b", contents), "outside the files")


@pytest.mark.parametrize(
    "extra",
    [
        field(7, field(5, outside())),  # a second graph is merged into the first
        field(20, field(1, field(5, outside()))),
        field(20, field(2, field(5, outside()))),
        field(25, field(7, field(5, attribute(field(5, outside()))))),
        field(25, field(11, attribute(field(5, outside())))),
    ],
)
def test_external_data_hidden_in_a_model(tmp_path, extra):
    contents = {**tiny_bundle.files(), "main.onnx": model(model_extra=extra)}
    refused(tiny_bundle.write(tmp_path / "b", contents), "outside the files")


def test_deep_subgraphs_do_not_exhaust_the_stack(tmp_path):
    graph = field(5, outside())
    for _ in range(2000):
        graph = subgraph(graph)
    contents = {**tiny_bundle.files(), "main.onnx": model(model_extra=field(7, graph))}
    refused(tiny_bundle.write(tmp_path / "b", contents), "outside the files")


@pytest.mark.parametrize(
    "content",
    [
        b"", b"fake", b"\x3a", b"\x3a\xff", b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", b"\x00\x01", b"\x3b",
        b"\x09\x01", b"\x3a\x02\x2a\x05", field(7, b"")[:-1], tiny_bundle.varint((5 << 3 | 2) + (1 << 32)) + b"\0",
    ],
)  # fmt: skip
def test_graphs_that_are_no_protobuf(tmp_path, content):
    refused(tiny_bundle.write(tmp_path / "b", tiny_bundle.files(main_onnx=content)), "is not an ONNX file")


def test_graphs_made_of_noise(tmp_path):
    chance, original = random.Random(5), model(tensor("w", {"location": "w.data"}))
    path = tmp_path / "m.onnx"
    for _ in range(500):
        data = bytearray(original)
        for _ in range(chance.randint(1, 4)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        path.write_bytes(data)
        try:
            list(external_data(path))
        except NotOnnx:
            continue


def test_field_numbers_are_those_of_onnx():
    onnx = pytest.importorskip("onnx", reason="needs onnx: not installed")
    from edge_rsvlm.bundle.external_data import _BELOW

    messages = {
        "model": "ModelProto", "training": "TrainingInfoProto", "function": "FunctionProto", "graph": "GraphProto",
        "node": "NodeProto", "attribute": "AttributeProto", "sparse": "SparseTensorProto", "tensor": "TensorProto",
    }  # fmt: skip
    names = {proto: ours for ours, proto in messages.items()}
    for ours, below in _BELOW.items():
        described = getattr(onnx, messages[ours]).DESCRIPTOR.fields
        typed = {f.number: f.message_type.name for f in described if f.message_type is not None}
        assert below == {number: names[name] for number, name in typed.items() if name in names}
    numbers = {f.name: f.number for f in onnx.TensorProto.DESCRIPTOR.fields}
    assert (numbers["external_data"], numbers["data_location"]) == (13, 14)
