"""Retrieval: an index that grows, is exact, survives a crash, and belongs to one bundle."""

from __future__ import annotations

import json

import numpy as np
import pytest

from edge_rsvlm.errors import UsageError
from edge_rsvlm.sinks.index import FACTS, HEADER_BYTES, RECORDS, VECTORS, IndexWriter, Maker, read_facts, search_index
from tests.wide import EVERYTHING, MATCH, SMALL, runner, use_engine, write_bundle, write_images

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")


@pytest.fixture(autouse=True)
def engine(monkeypatch):
    use_engine(monkeypatch)


@pytest.fixture
def bundle(tmp_path):
    return write_bundle(tmp_path / "bundle", **EVERYTHING)


@pytest.fixture
def run(bundle):
    return runner(bundle)


@pytest.fixture
def images(tmp_path):
    return write_images(tmp_path / "images")


def test_search_ranks_by_text_and_by_example(run, images, tmp_path):
    code, out, _ = run("index", images, "--to", tmp_path / "i")
    assert code == 0 and out.splitlines()[0] == f"{images / '0.png'}: 1 vector"
    stored = np.load(tmp_path / "i" / VECTORS)
    assert stored.dtype == np.float16 and stored.shape[1] == 2
    assert len((tmp_path / "i" / RECORDS).read_text().splitlines()) == len(stored) > 10
    code, out, _ = run("search", tmp_path / "i", "dark", "--json", "--top", 3, "--output", tmp_path / "o.geojson")
    found = json.loads(out)
    assert code == 0 and found["text"] == "dark" and found["searched"] == len(stored) and len(found["results"]) == 3
    scores = [hit["score"] for hit in found["results"]]
    assert scores == sorted(scores, reverse=True) and scores[0] == pytest.approx(1, abs=1e-3)
    features = json.loads((tmp_path / "o.geojson").read_text())["features"]
    located = ["scene" in f["properties"]["image"] for f in features]
    assert [("crs" not in f["properties"]) for f in features] == located and any(located)
    (best,) = json.loads(run("search", tmp_path / "i", "--image", images / "1.png", "--top", 1, "--json")[1])["results"]
    assert best["image"] == str(images / "1.png") and best["box"] == [0, 0, *SMALL]
    assert run("search", tmp_path / "i")[0] == 2
    assert run("search", tmp_path / "i", "dark", "--image", images / "1.png")[0] == 2


def test_an_index_grows_and_goes_on_where_it_was_cut(run, images, tmp_path):
    folder = tmp_path / "i"
    run("index", images / "0.png", images / "1.png", "--to", folder)
    whole = [(folder / name).read_bytes() for name in (VECTORS, RECORDS, FACTS)]
    with (folder / VECTORS).open("ab") as vectors, (folder / RECORDS).open("ab") as records:
        vectors.write(b"\xff" * 37)  # as a crash would leave it
        records.write(b'{"image": "half')
    assert len(json.loads(run("search", folder, "dark", "--json")[1])["results"]) == 2
    code, out, err = run("index", images / "1.png", "--to", folder)
    assert (code, out) == (0, "") and "is in the index already" in err
    assert [(folder / name).read_bytes() for name in (VECTORS, RECORDS, FACTS)] == whole
    (tmp_path / "bad.png").write_text("no image")
    code, out, _ = run("index", tmp_path / "bad.png", images, "--to", folder, "--json")
    assert code == 3 and [json.loads(line)["image"][-5:] for line in out.splitlines()] == ["2.png", "e.tif"]
    run("index", images, "--to", tmp_path / "at_once")
    for name in (VECTORS, RECORDS):
        assert (folder / name).read_bytes() == (tmp_path / "at_once" / name).read_bytes()


def test_an_index_of_another_bundle_is_refused(run, images, tmp_path):
    run("index", images / "0.png", "--to", tmp_path / "i")
    other = runner(write_bundle(tmp_path / "other", search=MATCH | {"logit_scale": 9.0}))
    for arguments in (("search", tmp_path / "i", "dark"), ("index", images / "1.png", "--to", tmp_path / "i")):
        code, _, err = other(*arguments)
        assert code == 2 and "was made by bundle 'fake' version 1" in err


@pytest.mark.parametrize("damage", ["vectors", "records", "facts", "line"])
def test_a_damaged_index_is_wrong_usage_and_no_crash(run, images, tmp_path, damage):
    folder = tmp_path / "i"
    run("index", images / "0.png", "--to", folder)
    if damage == "line":
        path = folder / RECORDS
        path.write_bytes(b"x" * path.stat().st_size)
    else:
        path = folder / {"vectors": VECTORS, "records": RECORDS, "facts": FACTS}[damage]
        path.write_bytes(path.read_bytes()[:-3])
    code, _, err = run("search", folder, "dark")
    assert code == 2 and str(folder) in err


def test_files_that_are_no_index_are_left_alone(run, images, tmp_path):
    (tmp_path / "mine").mkdir()
    np.save(tmp_path / "mine" / VECTORS, np.ones((3, 3)))
    before = (tmp_path / "mine" / VECTORS).read_bytes()
    code, _, err = run("index", images / "0.png", "--to", tmp_path / "mine")
    assert code == 2 and "belongs to no index" in err
    assert (tmp_path / "mine" / VECTORS).read_bytes() == before
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / VECTORS).write_bytes(bytes(HEADER_BYTES) + b"abc")  # cut off before its first image was whole
    (tmp_path / "cut" / RECORDS).write_bytes(b'{"ima')
    assert run("index", images / "0.png", "--to", tmp_path / "cut")[0] == 0
    assert len(np.load(tmp_path / "cut" / VECTORS)) == 1


def test_search_is_exact_over_many_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr("edge_rsvlm.sinks.index.CHUNK_BYTES", 4 * 5 * 7)
    vectors = np.random.default_rng(0).normal(size=(100, 5)).astype(np.float16)
    vectors[60] = vectors[20]
    maker = Maker("b", 1, "x")
    with IndexWriter(tmp_path / "i", maker) as writer:
        for i, vector in enumerate(vectors):
            writer.add(f"{i}", vector, {})
            if i % 9 == 0 or i == 99:
                writer.commit(f"{i}")
    query = vectors[20].astype(np.float32)
    hits = search_index(tmp_path / "i", read_facts(tmp_path / "i", maker), query, 12)
    scores = vectors.astype(np.float32) @ query
    expected = np.lexsort((np.arange(100), -scores))[:12]
    assert [int(hit.record["image"]) for hit in hits] == expected.tolist()
    with pytest.raises(UsageError, match="vectors of 5"), IndexWriter(tmp_path / "i", maker) as writer:
        writer.add("x", np.zeros(4), {})
