import json

import pytest

from edge_rsvlm.bundle import load_bundle
from edge_rsvlm.errors import BundleError
from tests.fakes import write_bundle


def test_a_folder_needs_explicit_trust(tmp_path):
    folder = write_bundle(tmp_path / "b")
    with pytest.raises(BundleError, match="--allow-unsigned"):
        load_bundle(folder)
    assert load_bundle(folder, allow_unsigned=True).path("encoder.onnx").read_bytes() == b"fake"


def test_altered_missing_and_foreign_files(tmp_path):
    folder = write_bundle(tmp_path / "b")
    (folder / "detect.onnx").write_bytes(b"fakE")
    with pytest.raises(BundleError, match=r"'detect.onnx'.*hash"):
        load_bundle(folder, allow_unsigned=True)
    (folder / "detect.onnx").unlink()
    with pytest.raises(BundleError, match="cannot read"):
        load_bundle(folder, allow_unsigned=True)
    folder = write_bundle(tmp_path / "c")
    data = json.loads((folder / "manifest.json").read_text())
    data["files"]["../b/probe.npz"] = data["files"]["probe.npz"]
    (folder / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(BundleError, match="outside itself"):
        load_bundle(folder, allow_unsigned=True)
    with pytest.raises(BundleError, match="lists no file"):
        load_bundle(write_bundle(tmp_path / "d"), allow_unsigned=True).path("other.onnx")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema_version": 2}'])
def test_a_manifest_that_is_none(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(BundleError):
        load_bundle(tmp_path, allow_unsigned=True)
    with pytest.raises(BundleError, match="holds a bundle"):
        load_bundle(tmp_path / "absent", allow_unsigned=True)
