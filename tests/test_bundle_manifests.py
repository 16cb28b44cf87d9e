"""Manifests from hostile hands: mutated, nested, contradictory; each is refused in one line that says why."""

from __future__ import annotations

import copy
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from edge_rsvlm.bundle.contents import decode
from edge_rsvlm.config.model import LONGEST_SHOWN
from edge_rsvlm.errors import BundleError
from tests import tiny_bundle
from tests.bundle_checks import loads_or_says_why, refused

ROOT = Path(__file__).parents[1]


def test_schema_is_published():
    made = subprocess.run(
        [sys.executable, "-m", "edge_rsvlm.config.schema"], capture_output=True, text=True, check=True
    ).stdout
    path = ROOT / "docs" / "manifest.schema.json"
    schema = json.loads(made)
    assert json.loads(path.read_text()) == schema, "run: python -m edge_rsvlm.config.schema > docs/manifest.schema.json"
    assert "newer" in schema["properties"]["version"]["description"]
    assert schema["$defs"]["MatchTask"]["additionalProperties"] is False


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
    "newer schema": (manifest_text(schema_version="5"), "schema is 5.*update edge-rsvlm"),
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


def test_duplicate_keys_are_found_quickly():
    pairs = ",".join(f'"k{n}": 0' for n in range(100_000))
    with pytest.raises(BundleError, match="'k0' twice"):
        decode(("{" + pairs + ', "k0": 1}').encode())
