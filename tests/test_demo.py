"""The demo writes a report that opens from disk, with results where they belong."""

from __future__ import annotations

import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from edge_rsvlm.bundle import load_bundle
from edge_rsvlm.cli import demo_verb
from edge_rsvlm.demonstrate import SCENES, packaged_scenes
from edge_rsvlm.engines.fake import FakeSession
from edge_rsvlm.errors import UsageError
from edge_rsvlm.pipeline.session import Limits, Session
from tests.fakes import CONTENT, INPUT, MEMORY, FakeEngine, graph, write_bundle

WORDS = ["<bos>", "<eos>", "a", "dark", "bright", "<b>", "place"]
GRAPHS = {
    "prefix": ({"c1": "c1"}, {"features": "visual"}),
    "embed": ({"input_ids": "words"}, {"inputs_embeds": "embedded"}),
    "decoder": ({"inputs_embeds": "embedded"}, {"logits": "next"}),
}


class SpeakingEngine(FakeEngine):
    """Says a tile is "a bright <b> place" or "a dark <b> place", by its mean, and sees an object in its middle."""

    def open(self, graph: Path) -> FakeSession:
        speak = {"prefix.onnx": _prefix, "embed.onnx": _embed, "decoder.onnx": _decode, "detect.onnx": _see}
        return FakeSession(speak[graph.name]) if graph.name in speak else super().open(graph)


def _see(inputs):
    n, _, h, w = inputs["first"].shape
    scores = np.zeros((n, 2, h // 4, w // 4), np.float32)
    scores[:, 1, h // 8, w // 8] = 0.75
    return {"heat": scores, "sides": np.full((n, 4, h // 4, w // 4), 9.0, np.float32)}


def _prefix(inputs):
    bright = inputs["c1"][:, :3].mean(axis=(1, 2, 3)) > 0
    return {"visual": np.where(bright, 4.0, 3.0).astype(np.float32)[:, None, None]}


def _embed(inputs):
    return {"embedded": inputs["words"][..., None].astype(np.float32)}


def _decode(inputs):
    """Keys hold what was read: which of two adjectives to say, <bos>, then the words so far."""
    history = np.concatenate([inputs["past_key_values.0.key"][:, 0, :, 0], inputs["embedded"][:, :, 0]], axis=1)
    logits = np.full((len(history), 1, len(WORDS)), -9.0, np.float32)
    for n, read in enumerate(history):
        logits[n, 0, [2, int(read[0]), 5, 6, 1][min(len(read) - 2, 4)]] = 9.0
    cache = history[:, None, :, None].astype(np.float32)
    return {"next": logits, "present.0.key": cache, "present.0.value": cache}


def caption_session(folder: Path) -> Session:
    """All three tasks on fakes."""
    bundle = write_bundle(folder / "speaking")
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="a"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(str(bundle / "tokenizer.json"))
    data = json.loads((bundle / "manifest.json").read_text())
    data["graphs"] |= {name: graph(name, *sides) for name, sides in GRAPHS.items()}
    data["tasks"]["caption"] = {
        "kind": "generate", "input": INPUT, "encoder": "encoder", "encoder_outputs": ["c1"], "project": "prefix",
        "decoder": {
            "kind": "onnx", "embed": "embed", "graph": "decoder", "cache": {"layers": 1, "heads": 1, "head_dim": 1}
        }, "tokenizer": {"file": "tokenizer.json", "add_special_tokens": False},
        "visual": {"token": None, "per_tile": 1}, "prompt": "<bos>", "positions": "sequence",
        "eos_ids": [1], "max_tokens": 8, "beams": 1,
        "length_penalty": 1.0, "memory": MEMORY,
    }  # fmt: skip
    data["tasks"]["change"]["threshold"] = 0.1  # a region of some cells, of the few pixels that differ so much
    data["licence"] = "free <for> & all"
    data["files"] |= {name: _entry(bundle / name) for name in (*(f"{g}.onnx" for g in GRAPHS), "tokenizer.json")}
    (bundle / "manifest.json").write_text(json.dumps(data))
    return Session(
        load_bundle(bundle, allow_unsigned=True), Limits(memory_bytes=8 << 30),
        engine_factory=lambda threads, arena: SpeakingEngine(),
    )  # fmt: skip


def _entry(path: Path) -> dict[str, object]:
    if not path.exists():
        path.write_bytes(CONTENT)
    content = path.read_bytes()
    return {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}


class Page(HTMLParser):
    """What a page loads, links to and carries."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loaded, self.links, self.keys, self.ids = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.loaded += [given[name] for name in ("src", "srcset", "data", "poster") if name in given]
        self.links += [given["href"]] if "href" in given else []
        self.keys += [(tag, given["data-key"])] if "data-key" in given else []
        self.ids += [given["id"]] if "id" in given else []


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    session = caption_session(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_verb, "open_session", lambda *_: session)
        run = CliRunner().invoke(demo_verb.command, ["--output", str(folder / "out")])
    return folder / "out", run


def test_demo_names_what_it_wrote_and_the_page_last(demo):
    folder, run = demo
    assert (run.exit_code, run.exception) == (0, None)
    # How the dates of a pair lie on each other is said; nothing else is.
    assert all("the earlier date lay" in line or "could not be checked" in line for line in run.stderr.splitlines())
    named = [Path(line) for line in run.stdout.splitlines() if line.startswith(str(folder))]
    assert named[-1] == folder / "index.html"
    assert set(named) == {path for path in folder.rglob("*") if path.is_file()}
    expected = {f"{task}/{scene.name}{end}" for scene in packaged_scenes() for task in scene.tasks
                for end in (".geojson", ".png")}  # fmt: skip
    assert expected <= {path.relative_to(folder).as_posix() for path in named}
    assert (folder / "change/hongkong.tif").is_file()


def test_page_is_whole_and_asks_nothing_of_a_network(demo):
    folder, _ = demo
    text = (folder / "index.html").read_text("utf-8")
    page = Page(text)
    assert page.loaded and all(source.startswith("data:image/webp;base64,") for source in page.loaded)
    assert not re.search(r"https?://|@import|url\(|fetch\(", text)
    for link in page.links:
        assert link[1:] in page.ids if link.startswith("#") else (folder / link).is_file()
    assert len(text) < 3_000_000


def test_page_shows_every_result_once_in_picture_and_list(demo):
    folder, _ = demo
    page = Page((folder / "index.html").read_text("utf-8"))
    outlines = [key for tag, key in page.keys if tag == "path"]
    counts = {(s.name, t): len(json.loads((folder / t / f"{s.name}.geojson").read_text())["features"])
              for s in packaged_scenes() for t in s.tasks}  # fmt: skip
    expected = {f"{name}-{task}-{i}" for (name, task), count in counts.items() for i in range(count)}
    assert sorted(outlines) == sorted(expected)
    listed = {key for tag, key in page.keys if tag == "li"}
    assert {key for key in expected if "-caption-" not in key} <= listed
    assert counts["riverside", "change"] > 0 and counts["airport_apron", "detect"] > 0


def test_text_from_models_and_manifests_is_escaped(demo):
    text = (demo[0] / "index.html").read_text("utf-8")
    assert "free &lt;for&gt; &amp; all" in text and "&lt;b&gt; place" in text
    assert "<for>" not in text and "<b> place" not in text


def test_overlays_show_something(demo):
    folder, _ = demo
    for path in folder.rglob("*.png"):
        with Image.open(path) as overlay:
            assert min(overlay.size) >= 256 and len(overlay.convert("P").getcolors()) > 30


def test_results_on_the_map_are_in_degrees_and_others_in_pixels(demo):
    text = (demo[0] / "index.html").read_text("utf-8")
    section = {scene.name: text.split(f'id="{scene.name}"')[1].split("</section>")[0] for scene in packaged_scenes()}
    assert re.search(r"22\.2\d{4}° N, 114\.2\d{4}° E", section["hongkong"]) and " m²" in section["hongkong"]
    assert re.search(r'place">33\.\d{5}° N, 117\.\d{5}° W', section["riverside"])
    assert re.search(r'place">x \d+, y \d+ px', section["airport_apron"]) and "°" not in section["airport_apron"]


def test_a_bundle_without_a_task_shows_the_others(tmp_path, monkeypatch):
    session = Session(
        load_bundle(write_bundle(tmp_path / "b"), allow_unsigned=True), Limits(8 << 30),
        engine_factory=lambda threads, arena: SpeakingEngine(),
    )  # fmt: skip
    monkeypatch.setattr(demo_verb, "open_session", lambda *_: session)
    assert CliRunner().invoke(demo_verb.command, ["--output", str(tmp_path / "out")]).exit_code == 0
    assert not (tmp_path / "out/caption").exists() and (tmp_path / "out/index.html").is_file()


def test_what_cannot_be_written_or_does_not_fit_is_said(tmp_path, monkeypatch):
    session = caption_session(tmp_path)
    monkeypatch.setattr(demo_verb, "open_session", lambda *_: session)
    (tmp_path / "file").write_text("")
    refused = CliRunner().invoke(demo_verb.command, ["--output", str(tmp_path / "file")])
    assert isinstance(refused.exception, UsageError)
    session.limits = Limits(memory_bytes=1 << 20)
    small = CliRunner().invoke(demo_verb.command, ["--output", str(tmp_path / "out")])
    assert small.exit_code == 4 and not (tmp_path / "out/index.html").exists()


def test_packaged_scenes_are_small_and_have_sources():
    names = {path.name for path in SCENES.iterdir()} - {"scenes.json", "SOURCES.md"}
    used = {name for scene in packaged_scenes() for name in (scene.image, scene.before) if name}
    sources = (SCENES / "SOURCES.md").read_text("utf-8")
    assert names == used and all(f"`{name}`" in sources for name in names)
    assert sum(path.stat().st_size for path in SCENES.iterdir()) <= 1_500_000
    assert {task for scene in packaged_scenes() for task in scene.tasks} == {"caption", "detect", "change"}
