"""Packed bundles: the same bytes every time, and archives from hostile hands, which are refused."""

from __future__ import annotations

import json
import os
import random
import stat
import struct
import zipfile
from pathlib import Path

import pytest

from edge_rsvlm.bundle import load_bundle, pack
from edge_rsvlm.bundle.signing import sign_bundle
from edge_rsvlm.errors import BundleError, UsageError
from tests import tiny_bundle
from tests.bundle_checks import loads_or_says_why, refused, sign_tiny


@pytest.fixture
def signed(tmp_path):
    return sign_tiny(tmp_path / "signed")


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
