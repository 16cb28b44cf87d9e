"""Bundles from hostile hands: nothing loads but exactly what was made. Changed bytes, names, links, pickles."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import struct
import zipfile

import numpy as np
import pytest

from edge_rsvlm.bundle import load_bundle, pack
from edge_rsvlm.bundle.contents import is_plain
from edge_rsvlm.errors import BundleError
from tests import tiny_bundle
from tests.bundle_checks import refused, sign_tiny
from tests.tiny_bundle import npz


@pytest.fixture
def signed(tmp_path):
    return sign_tiny(tmp_path / "signed")


def test_a_folder_needs_explicit_trust(tmp_path):
    folder = tiny_bundle.write(tmp_path / "b")
    with pytest.raises(BundleError, match="--allow-unsigned"):
        load_bundle(folder)
    bundle = load_bundle(folder, allow_unsigned=True)
    assert bundle.path("answers.txt").read_bytes() == b"yes\nno\n"
    with pytest.raises(BundleError, match="lists no file"):
        bundle.path("other.onnx")


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
