"""Bundles from hostile hands: nothing loads but exactly what was made."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import random
import stat
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from edge_rsvlm.bundle import load_bundle, pack
from edge_rsvlm.bundle.contents import decode, is_plain
from edge_rsvlm.bundle.external_data import NotOnnx, external_data
from edge_rsvlm.bundle.signatures import new_key, trust
from edge_rsvlm.bundle.signing import sign_bundle
from edge_rsvlm.config.model import LONGEST_SHOWN
from edge_rsvlm.errors import BundleError, UsageError
from tests import tiny_bundle
from tests.tiny_bundle import field, model, npz, tensor

ROOT = Path(__file__).parents[1]


@pytest.fixture
def signed(tmp_path):
    """A bundle signed by a trusted key."""
    new_key("ours")
    trust("ours")
    return sign_bundle(tiny_bundle.write(tmp_path / "signed"), "ours")


def refused(path, message="."):
    with pytest.raises(BundleError, match=message) as caught:
        load_bundle(path, allow_unsigned=True)
    assert ";" in str(caught.value) and len(str(caught.value)) < 1000
    str(caught.value).encode()  # can be printed
    return str(caught.value)


def test_a_folder_needs_explicit_trust(tmp_path):
    folder = tiny_bundle.write(tmp_path / "b")
    with pytest.raises(BundleError, match="--allow-unsigned"):
        load_bundle(folder)
    bundle = load_bundle(folder, allow_unsigned=True)
    assert bundle.path("answers.txt").read_bytes() == b"yes\nno\n"
    with pytest.raises(BundleError, match="lists no file"):
        bundle.path("other.onnx")


def test_schema_is_published():
    made = subprocess.run(
        [sys.executable, "-m", "edge_rsvlm.config.schema"], capture_output=True, text=True, check=True
    ).stdout
    path = ROOT / "docs" / "manifest.schema.json"
    schema = json.loads(made)
    assert json.loads(path.read_text()) == schema, "run: python -m edge_rsvlm.config.schema > docs/manifest.schema.json"
    assert "newer" in schema["properties"]["version"]["description"]
    assert schema["$defs"]["MatchTask"]["additionalProperties"] is False


# A byte anywhere.


def flipped(data: bytes, at: int, mask: int) -> bytes:
    return data[:at] + bytes([data[at] ^ mask]) + data[at + 1 :]


def positions(size: int, most: int, chance: random.Random) -> list[int]:
    return sorted(chance.sample(range(size), min(size, most)))


def test_one_changed_byte_of_any_file_is_refused(signed):
    chance = random.Random(1)
    for path in sorted(p for p in signed.rglob("*") if p.is_file()):
        original = path.read_bytes()
        for at in positions(len(original), 60, chance):
            path.write_bytes(flipped(original, at, 1 << chance.randrange(8)))
            with pytest.raises(BundleError):
                load_bundle(signed)
        for changed in (original + b"\0", original[:-1], b""):
            path.write_bytes(changed)
            with pytest.raises(BundleError):
                load_bundle(signed)
        path.write_bytes(original)
    load_bundle(signed)


def test_one_changed_byte_of_the_packed_file_is_refused(signed, tmp_path):
    chance = random.Random(2)
    path = tmp_path / "b.ersvlm"
    pack(signed, path)
    load_bundle(path)  # that it is unpacked already helps no altered one
    original = path.read_bytes()
    for at in [*positions(len(original), 300, chance), *range(len(original) - 100, len(original))]:
        path.write_bytes(flipped(original, at, 1 << chance.randrange(8)))
        with pytest.raises(BundleError):
            load_bundle(path, allow_unsigned=True)
    for changed in (original + b"\0", original[:-1], b"\0" + original, b"", original[: len(original) // 2]):
        path.write_bytes(changed)
        refused(path)
    path.write_bytes(original)
    load_bundle(path)


# Manifests.


def mutated(value, chance):
    """The JSON tree with one random change somewhere."""
    value = copy.deepcopy(value)
    parent, key = None, None
    here = value
    while isinstance(here, (dict, list)) and here and (parent is None or chance.random() < 0.8):
        parent = here
        key = chance.choice(list(here) if isinstance(here, dict) else range(len(here)))
        here = parent[key]
    strange = [
        None, True, -1, 0, 2**70, 10**400, 1e308, 1.5, "", "x", "\ud800", "\0", "../x", "ü" * 50, [], {}, [[]],
        {"a": {"b": []}}, {"kind": "generate"}, {"op": "resize"}, ["x"] * 50, {"": ""}, here, [here], {"x": here},
    ]  # fmt: skip
    action = chance.randrange(4)
    if action == 0:
        del parent[key]
    elif action == 1 and isinstance(parent, dict):
        parent[chance.choice(["x", "kind", "", "\ud800", "file", str(key) + "s"])] = parent.pop(key)
    else:
        parent[key] = chance.choice(strange)
    return value


def loads_or_says_why(path):
    try:
        load_bundle(path, allow_unsigned=True, allow_older=True)
    except BundleError as exc:
        text = str(exc)
        text.encode()
        assert ";" in text and "\n" not in text and len(text) < 1500 and text.isprintable()
        return False
    return True


def test_a_thousand_mutated_manifests(tmp_path):
    chance = random.Random(3)
    folder = tiny_bundle.write(tmp_path / "b")
    path = folder / "manifest.json"
    original = json.loads(path.read_text())
    kept = 0
    for _ in range(1000):
        path.write_text(json.dumps(mutated(original, chance)))
        kept += loads_or_says_why(folder)
    assert kept < 400  # a changed description is still a manifest; most changes are not


def test_a_thousand_mutated_manifest_bytes(tmp_path):
    chance = random.Random(4)
    folder = tiny_bundle.write(tmp_path / "b")
    path = folder / "manifest.json"
    original = path.read_bytes()
    pieces = [b"{", b"}", b"[", b'"', b",", b"\\", b"\0", b"\xff", b"NaN", b"1e999", b"-", b"\\ud800", b"null"]
    for _ in range(1000):
        data = bytearray(original)
        for _ in range(chance.randint(1, 3)):
            at = chance.randrange(len(data))
            end = at + chance.choice([0, 0, 1, 20])
            data[at:end] = chance.choice([*pieces, bytes([chance.randrange(256)]), bytes(data[at : at + 60]) * 2])
        path.write_bytes(data)
        loads_or_says_why(folder)


def manifest_text(**changed: str) -> str:
    """The tiny manifest with raw JSON texts for some keys."""
    parts = {key: json.dumps(value) for key, value in tiny_bundle.manifest(tiny_bundle.files()).items()} | changed
    return "{" + ",".join(f"{json.dumps(key)}:{text}" for key, text in parts.items()) + "}"


DEEP = 100_000
HOSTILE = {
    "empty": ("", "not JSON"),
    "open": ("{", "not JSON"),
    "list": ("[]", "should be a valid dictionary"),
    "null": ("null", "should be a valid dictionary"),
    "deep list": ("[" * DEEP, "nested too deep"),
    "deep object": ('{"a":' * DEEP, "nested too deep"),
    "deep value": (manifest_text(tasks="[" * 900 + "]" * 900), "tasks"),
    "NaN": (manifest_text(version="NaN"), "NaN is not a number"),
    "infinity": (manifest_text(accuracy="-Infinity"), "-Infinity is not a number"),
    "too large": (manifest_text(version="1e999"), "too large"),
    "huge integer": (manifest_text(version="9" * 5000), "not JSON"),
    "negative": (manifest_text(version="-1"), "version"),
    "surrogate": (manifest_text(name='"\\ud800"'), "surrogate"),
    "surrogate key": (manifest_text(**{"\ud800": "1"}), "surrogate"),
    "duplicate": (manifest_text(name='"a", "name": "b"'), "the key 'name' twice"),
    "duplicate file": (manifest_text(files='{"a": 1, "a": 1}'), "the key 'a' twice"),
    "many keys": (manifest_text(**{f"k{n}": "0" for n in range(100_000)}), "not permitted"),
    "long key": (manifest_text(**{"k" * 1_000_000: "0"}), "not permitted"),
    "escape codes": (manifest_text(**{"\x1b[2J": "0"}), r"\\x1b\[2J"),
    "older schema": (manifest_text(schema_version="1"), "schema is 1.*export the bundle again"),
    "newer schema": (manifest_text(schema_version="4"), "schema is 4.*update edge-rsvlm"),
    "no schema": (manifest_text(schema_version="null"), "schema_version"),
    "unknown kind": (manifest_text(tasks='{"detect": {"kind": "heatmap"}}'), "'heatmap'; did you mean 'heat_map'"),
    "no kind": (manifest_text(tasks='{"ask": {}}'), "no kind; add it"),
    "unknown key": (manifest_text(tasks='{"clasify": {}}'), "did you mean 'classify'"),
    "unlisted graph": (manifest_text(graphs="{}", probe="[]"), "refers to a graph"),
    "unlisted file": (manifest_text(probe='[{"graph": "main", "file": "b.npz", "tolerance": 1}]'), "a file 'b.npz'"),
    "UTF-16": (manifest_text().encode("utf-16"), "not JSON"),
    "invalid UTF-8": (manifest_text().encode().replace(b"for tests", b"for \xff"), "not JSON"),
    "huge": (b" " * (17 << 20), "larger than"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_manifests(tmp_path, case):
    content, message = HOSTILE[case]
    folder = tiny_bundle.write(tmp_path / "b")
    (folder / "manifest.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(folder, message)


def test_long_foreign_text_is_cut(tmp_path):
    folder = tiny_bundle.write(tmp_path / "b")
    (folder / "manifest.json").write_text(manifest_text(**{"k" * 10_000: "0"}))
    assert "k" * (LONGEST_SHOWN + 1) not in refused(folder)


def test_known_keys_are_of_the_right_place(tmp_path):
    data = tiny_bundle.manifest(tiny_bundle.files())
    task = data["tasks"]["detect"]
    task["kind"], task["nms_io"] = "heat_map", task.pop("nms_iou")
    folder = tiny_bundle.write(tmp_path / "b")
    (folder / "manifest.json").write_text(json.dumps(data | {"tasks": {"detect": task}}))
    refused(folder)
    task["kind"] = "open_vocabulary"
    task["nms_iou"] = 0.5
    (folder / "manifest.json").write_text(json.dumps(data | {"tasks": {"detect": task}}))
    refused(folder, r"'tasks.detect.open_vocabulary.nms_io'.*did you mean 'nms_iou'")


def test_absent_and_strange_folders(tmp_path):
    refused(tmp_path / "absent", "name a folder or a file")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "manifest.json").mkdir()
    refused(tmp_path / "b", "not a regular file")


# Names and files.


@pytest.mark.parametrize(
    "name",
    [
        "", ".", "..", "../x", "a/../x", "a//x", "/x", "a/", "./x", "a\\x", "C:x", "C:/x", "a\0x", "a\nx", "\u202ex",
        "\ud800", "x" * 256,
    ],
)  # fmt: skip
def test_names_that_are_no_plain_path(tmp_path, name):
    assert not is_plain(name)
    contents = tiny_bundle.files()
    data = tiny_bundle.manifest({**contents, name: b"x"})
    folder = tiny_bundle.write(tmp_path / "b", contents)
    (folder / "manifest.json").write_text(json.dumps(data))
    refused(folder)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("a.txt", "A.TXT"), ("straße", "STRASSE"), ("é", "e\u0301"), ("Manifest.json", "b"), ("manifest.SIG", "b"),
        ("a", "A/b"),
    ],
)  # fmt: skip
def test_names_that_some_systems_take_for_one(tmp_path, first, second):
    contents = {**tiny_bundle.files(), first: b"x", second: b"x"}
    folder = tiny_bundle.write(tmp_path / "b", contents)
    refused(folder, "one file where case does not count|both a file and a folder")


def test_names_in_other_scripts(tmp_path):
    contents = {**tiny_bundle.files(), "weights/日本 ü.txt": b"x"}
    folder = tiny_bundle.write(tmp_path / "b", contents)
    load_bundle(folder, allow_unsigned=True)
    pack(folder, tmp_path / "b.ersvlm")
    load_bundle(tmp_path / "b.ersvlm", allow_unsigned=True)


def test_missing_and_unlisted_files_and_links(tmp_path):
    folder = tiny_bundle.write(tmp_path / "b")
    answers = folder / "answers.txt"
    content = answers.read_bytes()
    answers.unlink()
    refused(folder, "'answers.txt' is missing")
    (tmp_path / "elsewhere").write_bytes(content)
    answers.symlink_to(tmp_path / "elsewhere")
    refused(folder, "'answers.txt' is a symbolic link")
    answers.unlink()
    os.mkfifo(answers)
    refused(folder, "'answers.txt' is a special file")
    answers.unlink()
    answers.write_bytes(content)
    for extra in ("x", "weights/.hidden", "deep/er/x.py"):
        path = folder / extra
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
        refused(folder, f"does not list '{extra}'")
        path.unlink()
    (folder / "link").symlink_to(tmp_path)
    refused(folder, "'link' is a symbolic link")
    (folder / "link").unlink()
    load_bundle(folder, allow_unsigned=True)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("value", [print, {"a": [1, 2.5]}, np.float32(1), [os.system, ("true",)]])
def test_pickles_of_every_protocol(tmp_path, protocol, value):
    contents = {**tiny_bundle.files(), "weights/data.bin": pickle.dumps(value, protocol)}
    refused(tiny_bundle.write(tmp_path / "b", contents), "'weights/data.bin' must not be here")


def zipped(**members: bytes) -> bytes:
    stored = io.BytesIO()
    with zipfile.ZipFile(stored, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return stored.getvalue()


PICKLED = {
    "named.pkl": b"harmless",
    "named.PT": b"harmless",
    "named.pkl.gz": b"harmless",
    "torch.bin": zipped(**{"archive/data.pkl": b"x", "archive/version": b"3"}),
    "hidden.npz": zipped(**{"a.npy": pickle.dumps({"a": 1})}),
    "objects.npz": npz(a=np.zeros(2), b=np.array([{"a": 1}], dtype=object)),
    "objects.npy": npz(a=np.array([None], dtype=object))[40:],
    "struct.npz": npz(b=np.zeros(1, dtype=[("a", "f4"), ("b", "O")])),
    "header.npz": zipped(**{"a.npy": b"\x93NUMPY\x01\x00\xff\x00{'descr': "}),
    "damaged.npz": npz(a=np.zeros(2))[:-30],
    "directory.npz": zipped(a=b"x")[:-10] + struct.pack("<LLH", 0xFFFFFF0, 0, 0),
}


@pytest.mark.parametrize("name", PICKLED)
def test_pickles_in_other_clothes(tmp_path, name):
    content = PICKLED[name]
    if name == "objects.npy":
        content = npz_member(npz(a=np.array([None], dtype=object)))
    contents = {**tiny_bundle.files(), name: content}
    refused(tiny_bundle.write(tmp_path / "b", contents), f"'{name}' must not be here")


def npz_member(stored: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(stored)) as archive:
        return archive.read(archive.namelist()[0])


def test_weights_are_taken_for_no_pickle(tmp_path):
    chance = np.random.default_rng(0)
    contents = tiny_bundle.files()
    for n in range(200):
        contents[f"w{n}.bin"] = chance.integers(0, 256, chance.integers(1, 60), dtype=np.uint8).tobytes()
    contents |= {f"c{value}.bin": bytes([value]) * 1000 for value in range(256)}
    contents |= {"words.txt": b"cat\ndog\nNone\n.", "vocab.txt": b"I\nS\n'a'\np0\n", "f16.bin": b"\x80\x3c" * 500}
    load_bundle(tiny_bundle.write(tmp_path / "b", contents), allow_unsigned=True)


# External data.


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


# One file.


def test_packing_is_deterministic_and_read_only(signed, tmp_path):
    first, second = tmp_path / "1.ersvlm", tmp_path / "2.ersvlm"
    pack(signed, first)
    for path in signed.rglob("*"):
        os.utime(path, (0, 0))
        path.chmod(path.stat().st_mode & ~0o022)
    pack(signed, second)
    assert first.read_bytes() == second.read_bytes()
    one, again = load_bundle(first), load_bundle(second)
    assert one.folder == again.folder and one.trusted_by == "ours"
    assert one.manifest_sha256 == load_bundle(signed).manifest_sha256
    modes = {stat.S_IMODE(p.stat().st_mode) for p in one.folder.rglob("*")}
    assert modes == {0o444, 0o555} and stat.S_IMODE(one.folder.stat().st_mode) == 0o555
    assert [p.name for p in one.folder.parent.iterdir() if p.name != ".lock"] == [one.folder.name]


def test_signing_a_file_in_place(signed, tmp_path):
    path = tmp_path / "b.ersvlm"
    pack(tiny_bundle.write(tmp_path / "plain"), path)
    with pytest.raises(BundleError, match="no signature"):
        load_bundle(path)
    sign_bundle(path, "ours")
    assert load_bundle(path).trusted_by == "ours"


def test_an_altered_unpacked_folder_is_refused(signed, tmp_path):
    path = tmp_path / "b.ersvlm"
    pack(signed, path)
    folder = load_bundle(path).folder
    (folder / "answers.txt").chmod(0o644)
    (folder / "answers.txt").write_bytes(b"no\nyes\n")
    with pytest.raises(BundleError, match=f"remove {folder}"):
        load_bundle(path)


def test_files_beyond_four_gigabytes_use_the_larger_directory(signed, tmp_path, monkeypatch):
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 300)
    pack(signed, tmp_path / "b.ersvlm")
    raw = (tmp_path / "b.ersvlm").read_bytes()
    assert b"PK\x06\x06" in raw and b"PK\x06\x07" in raw
    assert load_bundle(tmp_path / "b.ersvlm").trusted_by == "ours"
    huge = raw.replace(raw[raw.index(b"PK\x06\x06") :][40:48], struct.pack("<Q", 1 << 40))
    (tmp_path / "b.ersvlm").write_bytes(huge)
    refused(tmp_path / "b.ersvlm", "its directory is too large")


def test_a_read_only_device_goes_on_with_what_it_knows(signed, tmp_path, monkeypatch):
    pack(signed, tmp_path / "b.ersvlm")
    load_bundle(tmp_path / "b.ersvlm")

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("edge_rsvlm.bundle.home.tempfile.mkstemp", refuse)
    monkeypatch.setattr("edge_rsvlm.bundle.archive.tempfile.mkdtemp", refuse)
    load_bundle(tmp_path / "b.ersvlm")
    new = tmp_path / "c.ersvlm"
    new.write_bytes(foreign(tmp_path / "d").read_bytes())
    with pytest.raises(UsageError, match="EDGE_RSVLM_HOME"):
        load_bundle(new, allow_unsigned=True)


def test_nothing_is_unpacked_that_nobody_trusts(tmp_path, home):
    path = tmp_path / "b.ersvlm"
    pack(tiny_bundle.write(tmp_path / "plain"), path)
    with pytest.raises(BundleError, match="no signature"):
        load_bundle(path)
    assert [p.name for p in (home / "cache" / "bundles").iterdir()] == [".lock"]


def test_only_whole_folders_are_packed(tmp_path):
    folder = tiny_bundle.write(tmp_path / "b")
    (folder / "extra").write_bytes(b"")
    with pytest.raises(BundleError, match="'extra'"):
        pack(folder, tmp_path / "b.ersvlm")
    (folder / "extra").unlink()
    with pytest.raises(UsageError, match="cannot write"):
        pack(folder, tmp_path / "absent" / "b.ersvlm")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b"]


def foreign(
    path: Path, compression=zipfile.ZIP_DEFLATED, edit=None, folders=False, comment=b"", **contents: bytes
) -> Path:
    """The tiny bundle zipped by other means; ``edit`` may change members and add more."""
    inside = {**tiny_bundle.files(), **contents}
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.comment = comment
        if folders:
            archive.writestr("weights/", b"")
        archive.writestr("manifest.json", json.dumps(tiny_bundle.manifest(inside)))
        for name, data in inside.items():
            archive.writestr(name, data)
        if edit:
            edit(archive)
    return path


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_archives_of_other_tools(tmp_path, compression):
    path = foreign(tmp_path / "b.ersvlm", compression, folders=True)
    assert load_bundle(path, allow_unsigned=True).manifest.name == "tiny"


def member(name: str, mode: int = 0o100644) -> zipfile.ZipInfo:
    made = zipfile.ZipInfo("placeholder")
    made.filename = made.orig_filename = name  # past what the constructor cleans
    made.external_attr = mode << 16
    return made


ADDED = {
    "parent": (lambda z: z.writestr(member("../x"), b"x"), "no plain path"),
    "deep parent": (lambda z: z.writestr(member("weights/../../x"), b"x"), "no plain path"),
    "absolute": (lambda z: z.writestr(member("/x"), b"x"), "no plain path"),
    "drive": (lambda z: z.writestr(member("C:\\x"), b"x"), "no plain path"),
    "backslash": (lambda z: z.writestr(member("..\\x"), b"x"), "no plain path"),
    "NUL": (lambda z: z.writestr(member("answers.txt\0x"), b"x"), "no plain path"),
    "unlisted": (lambda z: z.writestr("x", b"x"), "does not list 'x'"),
    "unlisted folder": (lambda z: z.writestr("x/", b""), "no plain path|does not list"),
    "case": (lambda z: z.writestr("ANSWERS.txt", b"x"), "one file where case does not count"),
    "link": (lambda z: z.writestr(member("x", 0o120777), b"/etc"), "symbolic link"),
    "device": (lambda z: z.writestr(member("x", 0o020644), b""), "special file"),
    "second manifest": (lambda z: z.writestr(member("Manifest.json"), b"x"), "one file where case"),
    "bzip2": (lambda z: z.writestr("x", b"x", zipfile.ZIP_BZIP2), "neither stored nor deflated"),
}


@pytest.mark.parametrize("trick", ADDED)
def test_archive_tricks(tmp_path, trick):
    edit, message = ADDED[trick]
    refused(foreign(tmp_path / "b.ersvlm", edit=edit), message)
    assert not (tmp_path / "x").exists()


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", ["answers.txt", "manifest.json"])
def test_members_that_come_twice(tmp_path, name):
    def again(archive):
        data = archive.read(name) if name != "manifest.json" else json.dumps(tiny_bundle.manifest(tiny_bundle.files()))
        archive.writestr(name, data)

    stored = tmp_path / "b.ersvlm"
    with zipfile.ZipFile(foreign(stored)) as archive:
        members = {n: archive.read(n) for n in archive.namelist()}
    with zipfile.ZipFile(stored, "w") as archive:
        for each, data in [*members.items(), (name, members[name])]:
            archive.writestr(each, data)
    refused(stored, "one file where case does not count")


def test_bombs(tmp_path):
    def declare(path, actual, claimed, listed):
        """A member that unpacks to ``actual`` zeros, claims another size, and is listed with a third."""
        contents = tiny_bundle.files()
        data = tiny_bundle.manifest(contents)
        data["files"]["bomb"] = {"sha256": "0" * 64, "bytes": listed}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("manifest.json", json.dumps(data))
            for name, content in contents.items():
                archive.writestr(name, content)
            archive.writestr("bomb", bytes(actual))
        raw = path.read_bytes()
        path.write_bytes(raw.replace(struct.pack("<L", actual), struct.pack("<L", claimed)))
        return path

    mib = 1 << 20
    refused(declare(tmp_path / "a", 8 * mib, 8 * mib, 10), "'bomb' has 8388608 bytes, not 10")
    refused(declare(tmp_path / "b", 8 * mib, 10, 10), "'bomb'")
    refused(declare(tmp_path / "c", 65 * mib, 65 * mib, 65 * mib), "would become")
    refused(declare(tmp_path / "d", 8 * mib, 9 * mib, 9 * mib), "'bomb'")


def test_damaged_archives(tmp_path):
    refused(foreign(tmp_path / "a", comment=b"hello"), "altered after it was packed")
    whole = foreign(tmp_path / "b").read_bytes()
    chance = random.Random(6)
    for cut in (0, 1, 21, 22, len(whole) - 1):
        (tmp_path / "c").write_bytes(whole[:cut])
        refused(tmp_path / "c", "not a bundle file")
    for _ in range(100):
        data = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            data[chance.randrange(len(data) - 700, len(data))] = chance.randrange(256)
        (tmp_path / "c").write_bytes(data)
        loads_or_says_why(tmp_path / "c")
    with zipfile.ZipFile(tmp_path / "d", "w") as archive:
        archive.writestr("b/manifest.json", b"{}")
    refused(tmp_path / "d", "holds no manifest.json at its top")


def test_a_crash_while_unpacking_leaves_no_rubbish(signed, tmp_path, home):
    left = home / "cache" / "bundles" / ".unpacking-old"
    left.mkdir(parents=True)
    (left / "x").write_bytes(b"x")
    pack(signed, tmp_path / "b.ersvlm")
    load_bundle(tmp_path / "b.ersvlm")
    assert not left.exists()


def test_duplicate_keys_are_found_quickly():
    pairs = ",".join(f'"k{n}": 0' for n in range(100_000))
    with pytest.raises(BundleError, match="'k0' twice"):
        decode(("{" + pairs + ', "k0": 1}').encode())
