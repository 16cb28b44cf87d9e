"""One ONNX encoder for masks, classes and retrieval, from a bundle on disk to results: nothing in between is a fake."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import rasterio
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from tests.fakes import graph, manifest
from tests.scenes import UTM, write
from tests.wide import LARGE, MATCH, SEGMENT, TILES, half_bright, runner

WORDS = ["[PAD]", "bright", "dark"]
TEXT = {"graph": "words", "tokenizer": {"file": "tokenizer.json", "add_special_tokens": False}}
GRAPHS = {
    "maps": ({"tiles": "pixels"}, {"c3": "fine", "c5": "coarse"}),
    "cells": ({"c3": "fine"}, {"embeddings": "cells"}),
    "pool": ({"c5": "coarse"}, {"embedding": "vector"}),
    "words": ({"input_ids": "ids"}, {"dense": "dense", "scene": "scene"}),
}
POOLED = MATCH | {
    "input": TILES, "encoder": "maps", "encoder_outputs": ["c5"], "head": "pool", "text": TEXT | {"output": "scene"},
}  # fmt: skip
TASKS = {"segment": SEGMENT | {"text": TEXT | {"output": "dense"}}, "classify": POOLED, "search": POOLED}
LIGHT = ([[0.5], [-0.5]], [0.5, 0.5])
"""From red in -1 .. 1 to how bright and how dark it is."""


def models():
    """Pools of 4 and of 32 pixels, two linear heads, and a table of words whose scene vectors change places."""
    from onnx import TensorProto, helper, numpy_helper

    def constant(name, values, dtype=np.float32):
        return numpy_helper.from_array(np.array(values, dtype), name)

    def model(nodes, inputs, outputs, constants=()):
        made = helper.make_graph(nodes, "g", inputs, outputs, list(constants))
        return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)

    def value(name, *dims, kind=TensorProto.FLOAT):
        return helper.make_tensor_value_info(name, kind, dims)

    light = constant("w", np.array(LIGHT[0])[:, :, None, None]), constant("b", LIGHT[1])
    node = helper.make_node
    pools = [
        node("Slice", ["pixels", "from", "to", "axis"], ["red"]),
        node("AveragePool", ["red"], ["fine"], kernel_shape=[4, 4], strides=[4, 4]),
        node("AveragePool", ["fine"], ["coarse"], kernel_shape=[8, 8], strides=[8, 8]),
    ]
    axes = [constant(name, [v], np.int64) for name, v in (("from", 0), ("to", 1), ("axis", 1))]
    fine, coarse = value("fine", "n", 1, "h", "w"), value("coarse", "n", 1, "y", "x")
    table = [constant("table", [[0, 0], [1, 0], [0, 1]]), constant("last", [1], np.int64)]
    words = [
        node("Gather", ["table", "ids"], ["each"]),
        node("ReduceSum", ["each", "last"], ["dense"], keepdims=0),
        node("Identity", ["dense"], ["scene"]),
    ]
    vectors = [node("Conv", ["coarse", "w", "b"], ["light"]), node("GlobalAveragePool", ["light"], ["mean"]),
               node("Flatten", ["mean"], ["vector"])]  # fmt: skip
    cells = [node("Conv", ["fine", "w", "b"], ["cells"])]
    return {
        "maps": model(pools, [value("pixels", "n", 3, "height", "width")], [fine, coarse], axes),
        "cells": model(cells, [fine], [value("cells", "n", 2, "h", "w")], light),
        "pool": model(vectors, [coarse], [value("vector", "n", 2)], light),
        "words": model(words, [value("ids", "n", "t", kind=TensorProto.INT64)],
                       [value("dense", "n", 2), value("scene", "n", 2)], table),
    }  # fmt: skip


@pytest.fixture
def run(tmp_path, needs):
    needs("onnx")
    folder = tmp_path / "bundle"
    folder.mkdir()
    for name, model in models().items():
        (folder / f"{name}.onnx").write_bytes(model.SerializeToString())
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[PAD]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    pixels = np.linspace(-1, 1, 3 * 64 * 64, dtype=np.float32).reshape(1, 3, 64, 64)
    fine = pixels[:, :1].reshape(1, 1, 16, 4, 16, 4).mean(axis=(3, 5))
    np.savez(folder / "probe.npz", **{"in.pixels": pixels, "out.fine": fine})
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    data = manifest() | {
        "graphs": {name: graph(name, *sides) for name, sides in GRAPHS.items()},
        "tasks": TASKS,
        "probe": [{"graph": "maps", "file": "probe.npz", "tolerance": 0.001}],
        "files": {n: {"sha256": hashlib.sha256(c).hexdigest(), "bytes": len(c)} for n, c in files.items()},
    }
    (folder / "manifest.json").write_text(json.dumps(data))
    return runner(folder)


def test_a_bundle_of_one_encoder_answers_every_task(run, tmp_path):
    scene = write(tmp_path / "a.tif", half_bright(LARGE, 0.6), **UTM)
    assert run("verify")[0] == 0
    plans = [json.loads(line) for line in run("plan", scene, "--json")[1].splitlines()]
    assert [plan["task"] for plan in plans] == ["classify", "segment", "search"] and all(p["fits"] for p in plans)
    code, out, err = run("segment", scene, "--labels", "dark,bright", "--json", "--mask", tmp_path / "m.tif")
    assert (code, err) == (0, "")
    assert {s["label"] for s in json.loads(out)["segments"]} == {"dark", "bright"}
    with rasterio.open(tmp_path / "m.tif") as mask:
        values = mask.read(1)
    assert (values[:, :237] == 2).all() and (values[:, 243:] == 1).all()
    assert json.loads(run("classify", scene, "--labels", "dark,bright", "--json")[1])["labels"][0][0] == "bright"


def test_retrieval_by_words_and_by_example(run, tmp_path, needs):
    needs("usearch")
    scene = write(tmp_path / "a.tif", half_bright(LARGE, 0.6), **UTM)
    assert run("index", scene, "--to", tmp_path / "i")[0] == 0
    (hit,) = json.loads(run("search", tmp_path / "i", "dark", "--top", 1, "--json")[1])["results"]
    assert hit["score"] > 0.98 and hit["box"][0] >= 240
    (hit,) = json.loads(run("search", tmp_path / "i", "--image", scene, "--top", 1, "--json")[1])["results"]
    assert hit["score"] > 0.9


def test_a_job_has_the_bytes_of_its_tasks(run, tmp_path):
    scene = write(tmp_path / "a.tif", half_bright(LARGE, 0.6), **UTM)
    labels = 'labels = ["bright", "dark"]'
    (tmp_path / "job.toml").write_text(
        f'version = 1\ntasks = ["classify", "segment"]\ninputs = ["a.tif"]\noutput = "out"\n[segment]\n{labels}\n'
        f"[classify]\n{labels}\n"
    )
    assert run("run", tmp_path / "job.toml")[0] == 0
    got = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    alone = [json.loads(run(v, scene, "--labels", "bright,dark", "--json")[1]) for v in ("classify", "segment")]
    for record in (*got, *alone):
        record.pop("timing_ms")
    assert got == alone
