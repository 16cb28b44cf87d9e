"""Retrieval: an index that grows, is exact, survives a crash, and belongs to one bundle."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from edge_rsvlm.errors import UsageError
from edge_rsvlm.sinks import index
from edge_rsvlm.sinks.index import FACTS, JOURNAL, RECORDS, VECTORS, IndexWriter, Maker, read_facts, search_index
from tests.wide import EVERYTHING, MATCH, SMALL, runner, use_engine, write_bundle, write_images

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")


MAKER = Maker("b", 1, "x")


@pytest.fixture(autouse=True)
def engine(monkeypatch, needs):
    needs("usearch")
    use_engine(monkeypatch)


def stored(folder):
    """Keys and vectors of the usearch file."""
    from usearch.index import Index

    found = Index.restore(str(folder / VECTORS))
    return np.sort(np.asarray(found.keys)).tolist(), found


def fill(folder, vectors, every=9):
    with IndexWriter(folder, MAKER) as writer:
        for i, vector in enumerate(vectors):
            writer.add(f"{i}", vector, {})
            if i % every == 0 or i == len(vectors) - 1:
                writer.commit(f"{i}")


def nearest(folder, query, top):
    return [int(hit.record["image"]) for hit in search_index(folder, read_facts(folder, MAKER), query, top)]


def unit_vectors(count, dim, seed=0):
    found = np.random.default_rng(seed).normal(size=(count, dim)).astype(np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


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
    keys, vectors = stored(tmp_path / "i")
    assert (vectors.ndim, str(vectors.dtype), keys) == (2, "ScalarKind.I8", list(range(len(keys))))
    assert len((tmp_path / "i" / RECORDS).read_text().splitlines()) == len(keys) > 10
    assert (tmp_path / "i" / JOURNAL).stat().st_size == 0
    code, out, _ = run("search", tmp_path / "i", "dark", "--json", "--top", 3, "--output", tmp_path / "o.geojson")
    found = json.loads(out)
    assert code == 0 and found["text"] == "dark" and found["searched"] == len(keys) and len(found["results"]) == 3
    scores = [hit["score"] for hit in found["results"]]
    assert scores == sorted(scores, reverse=True) and scores[0] == pytest.approx(1, abs=1e-2)
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
    with (folder / JOURNAL).open("ab") as vectors, (folder / RECORDS).open("ab") as records:
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
    for name in (RECORDS, FACTS):
        assert (folder / name).read_bytes() == (tmp_path / "at_once" / name).read_bytes()
    (keys, some), (others, all_) = stored(folder), stored(tmp_path / "at_once")
    assert keys == others
    np.testing.assert_array_equal(some.get(keys), all_.get(keys))


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
    (tmp_path / "mine" / RECORDS).write_text("my records")
    code, _, err = run("index", images / "0.png", "--to", tmp_path / "mine")
    assert code == 2 and "belongs to no index" in err
    assert (tmp_path / "mine" / RECORDS).read_text() == "my records"
    with pytest.raises(KeyboardInterrupt), IndexWriter(tmp_path / "cut", MAKER) as writer:
        writer.add("0", np.ones(2), {})  # cut off before its first image was whole
        raise KeyboardInterrupt
    assert search_index(tmp_path / "cut", read_facts(tmp_path / "cut", MAKER), np.ones(2), 3) == []
    fill(tmp_path / "cut", unit_vectors(3, 4))
    assert stored(tmp_path / "cut")[0] == [0, 1, 2]


def test_small_indexes_are_compared_whole_and_8_bits_are_close(tmp_path):
    vectors = unit_vectors(3000, 64)
    vectors[60] = vectors[20]
    fill(tmp_path / "i", vectors, every=100)
    query = unit_vectors(1, 64, seed=1)[0]
    hits = search_index(tmp_path / "i", read_facts(tmp_path / "i", MAKER), query, 3000)
    rows = [int(hit.record["image"]) for hit in hits]
    assert sorted(rows) == list(range(3000))
    np.testing.assert_allclose([hit.score for hit in hits], vectors[rows] @ query, atol=0.02)
    assert nearest(tmp_path / "i", vectors[20], 2) == [20, 60]
    with pytest.raises(UsageError, match="vectors of 64"), IndexWriter(tmp_path / "i", MAKER) as writer:
        writer.add("x", np.zeros(4), {})
    with pytest.raises(UsageError, match="vectors of 64"):
        nearest(tmp_path / "i", query[:5], 1)


def test_large_indexes_follow_a_graph(tmp_path, monkeypatch):
    monkeypatch.setattr(index, "MOST_EXACT", 100)
    vectors = unit_vectors(2000, 16)
    fill(tmp_path / "i", vectors, every=500)
    found = [set(nearest(tmp_path / "i", query, 10)) for query in vectors[:50]]
    true = [set(np.argsort(-(vectors @ query))[:10].tolist()) for query in vectors[:50]]
    assert sum(len(a & b) for a, b in zip(found, true, strict=True)) > 400  # of 500; 8 bits swap neighbours as well


class Crash(Exception):
    pass


@pytest.mark.parametrize("at", ["save", "replaced", "facts", "journal"])
def test_a_crash_while_the_journal_is_absorbed_loses_nothing(tmp_path, monkeypatch, at):
    """``at``: before the usearch file is whole, before it counts, before the facts, before the journal is emptied."""
    vectors = unit_vectors(30, 8)
    fill(tmp_path / "i", vectors[:10])
    with monkeypatch.context() as patch:
        crash(patch, at)
        with pytest.raises(Crash):
            fill_more(tmp_path / "i", vectors)
    for _ in range(2):  # as it was left, and after the next writer
        facts = read_facts(tmp_path / "i", MAKER)
        assert facts.count == 30 and len((tmp_path / "i" / RECORDS).read_text().splitlines()) == 30
        assert nearest(tmp_path / "i", vectors[25], 1) == [25]
        assert sorted(nearest(tmp_path / "i", vectors[0], 50)) == list(range(30))
        with IndexWriter(tmp_path / "i", MAKER) as writer:
            assert writer.images == {str(i) for i in range(30)}
    assert stored(tmp_path / "i")[0] == list(range(30)) and (tmp_path / "i" / JOURNAL).stat().st_size == 0
    assert not list((tmp_path / "i").glob("*.part"))


def fill_more(folder, vectors):
    with IndexWriter(folder, MAKER) as writer:
        for i in range(10, len(vectors)):
            writer.add(f"{i}", vectors[i], {})
            writer.commit(f"{i}")


def crash(patch, at):
    """At a step of absorbing, which is done once, when the block is left."""
    absorb = IndexWriter._absorb
    steps = {
        "save": (index, "_usearch_errors"), "replaced": (Path, "replace"), "facts": (IndexWriter, "_write_facts"),
        "journal": (IndexWriter, "rollback"),
    }  # fmt: skip

    def stop(*_):
        raise Crash

    def absorbing(writer):
        patch.setattr(*steps[at], stop)
        absorb(writer)

    patch.setattr(IndexWriter, "_absorb", absorbing)


def test_many_vectors_leave_the_journal_before_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(index, "ABSORBED_AT_ONCE", 16)
    vectors = unit_vectors(50, 8)
    with IndexWriter(tmp_path / "i", MAKER) as writer:
        for i, vector in enumerate(vectors):
            writer.add(f"{i}", vector, {})
            writer.commit(f"{i}")
            assert (tmp_path / "i" / JOURNAL).stat().st_size < 16 * 2 * 8
            if i in (14, 15, 40):  # a reader beside the writer
                assert nearest(tmp_path / "i", vector, 1) == [i]
    fill(tmp_path / "at_once", vectors, every=1)
    assert (tmp_path / "i" / VECTORS).read_bytes() == (tmp_path / "at_once" / VECTORS).read_bytes()


def test_without_usearch_the_verbs_say_how_to_install_it(run, images, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "usearch", None)
    monkeypatch.setitem(sys.modules, "usearch.index", None)
    for arguments in (("index", images, "--to", tmp_path / "i"), ("search", tmp_path / "i", "dark")):
        code, _, err = run(*arguments)
        assert code == 2 and "pip install 'edge-rsvlm[search]'" in err
    assert not (tmp_path / "i").exists()


def test_an_index_of_an_older_kind_is_to_be_made_again(run, images, tmp_path):
    folder = tmp_path / "i"
    run("index", images / "0.png", "--to", folder)
    facts = json.loads((folder / FACTS).read_text())
    (folder / FACTS).write_text(json.dumps(facts | {"schema_version": 1}))
    code, _, err = run("search", folder, "dark")
    assert code == 2 and "another edge-rsvlm" in err
