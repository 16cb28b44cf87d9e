"""ONNX exports that cannot run, or are broken: each is refused by the name of what is wrong."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="needs torch: not installed")
pytest.importorskip("transformers", reason="needs transformers: not installed")
onnx = pytest.importorskip("onnx", reason="needs onnx: not installed")
pytest.importorskip("onnxscript", reason="needs onnxscript: not installed")

from onnx import TensorProto  # noqa: E402

from edge_rsvlm.errors import InputError, UsageError  # noqa: E402
from edge_rsvlm.export.onnx_folder.reading import layout, read_onnx_folder  # noqa: E402
from tests.onnx_exports import made_in  # noqa: E402
from tests.onnx_graphs import decoder_graph, vision_graph  # noqa: E402


@pytest.fixture
def copied(tmp_path, tmp_path_factory):
    """A copy of an export to break: ``copied("clip")`` returns its folder."""
    base = tmp_path_factory.getbasetemp()
    return lambda name: Path(shutil.copytree(made_in(base, name).folder, tmp_path / "copy"))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"extra": ["use_cache_branch"]}, "'use_cache_branch', which this runtime does not feed"),
        ({"extra": ["num_logits_to_keep"]}, "'num_logits_to_keep'"),
        ({"tokens": "input_ids"}, "'input_ids' is FLOAT|has no 'inputs_embeds'|'input_ids', which"),
        ({"dtype": TensorProto.FLOAT16}, "FLOAT16, not FLOAT.*_fp16"),
        ({"layers": (0, 2)}, "no key and value cache for every layer"),
        ({"layers": ()}, "for every layer: none"),
        ({"heads": "H"}, "caches are not"),
    ],
)
def test_decoders_that_cannot_run_are_refused_by_name(copied, options, problem):
    folder = copied("llava")
    decoder_graph(folder / "onnx", **options)
    with pytest.raises(UsageError, match=problem):
        read_onnx_folder(folder)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"shape": ["B", 3, 42, 42], "dtype": TensorProto.FLOAT16}, "FLOAT16"),
        ({"shape": [1, 3, 42, 42]}, "batches of 1 only"),
        ({"shape": ["B", 3, 42, 42], "extra": ["query"]}, "'pixel_values', 'query', which is not known"),
        ({"shape": ["patches", 1176]}, "not known"),
        ({"shape": ["B", "I", 3, 42, 42], "extra": ["pixel_attention_mask"], "opset": 11}, "opset 11"),
    ],
)
def test_vision_encoders_that_cannot_run_are_refused_by_name(copied, options, problem):
    folder = copied("llava")
    vision_graph(folder / "onnx", **options)
    with pytest.raises(UsageError, match=problem):
        read_onnx_folder(folder)


def test_layouts(copied, tmp_path):
    folder = copied("clip")
    assert layout(folder) == (folder / "onnx" / "model.onnx",)
    (folder / "onnx" / "model.onnx").rename(folder / "onnx" / "model_fp16.onnx")
    assert layout(folder) is None
    with pytest.raises(UsageError, match=r"no ONNX export of a known layout.*decoder_model_merged"):
        read_onnx_folder(folder)
    (folder / "onnx" / "model_fp16.onnx").rename(folder / "model.onnx")
    assert layout(folder) == (folder / "model.onnx",)
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"model_type": "clip"', '"model_type": "owlvit"'))
    with pytest.raises(UsageError, match="type 'owlvit' in this layout are not known; known types are clip, siglip"):
        read_onnx_folder(folder)


def test_broken_files_are_named(copied):
    folder = copied("clip")
    for content in (b"", b"no protobuf", (folder / "onnx" / "model.onnx").read_bytes()[:-1000]):
        (folder / "onnx" / "model.onnx").write_bytes(content)
        with pytest.raises(InputError, match=r"model\.onnx: not an ONNX file"):
            read_onnx_folder(folder)


def test_data_files_outside_of_the_folder_are_refused(copied, tmp_path):
    folder = copied("llava")
    path = folder / "onnx" / "embed_tokens.onnx"
    model = onnx.load(path)
    (tmp_path / "elsewhere").write_bytes(b"\0" * 10**6)
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../elsewhere")
    path.write_bytes(model.SerializeToString())
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="not beside it"):
        read_onnx_folder(folder).write(tmp_path / "out")
