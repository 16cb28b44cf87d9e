"""Bundles of other families without a trained model: they see how bright an image is, and where bright blobs are."""

from __future__ import annotations

import hashlib
import json

import numpy as np
from click.testing import CliRunner
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

import edge_rsvlm.cli
from edge_rsvlm.engines.fake import FakeSession
from edge_rsvlm.errors import EdgeRsvlmError
from edge_rsvlm.pipeline.session import Session
from tests.fakes import CONTENT, FakeEngine, blobs, graph, manifest
from tests.scenes import UTM, write

MEMORY = {"session_bytes": 1 << 20, "tile_bytes": 1 << 20, "measured": False}
WORDS = ["[PAD]", "<bos>", "<eos>", "bright", "dark", "square", "yes", "no", "[", "]", *map(str, range(101))]
NUMBER = WORDS.index("0")
INPUT = {
    "bands": ["red", "green", "blue"],
    "ranges": {"uint8": [0, 255], "uint16": [0, 4000], "float32": [0, 1]},
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
    "tile_px": 128,
    "overlap_px": 64,
    "resolution_m": None,
    "whole_px": 256,
    "resampling": "bicubic",
    "prepare": [{"op": "resize", "size": [96, 160], "filter": "bilinear"}],
}
TOKENIZER = {"file": "tokenizer.json", "add_special_tokens": False, "max_length": 20}
TEXT = {"graph": "words", "tokenizer": TOKENIZER}
GRAPHS = {
    "eye": ({"tiles": "image"}, {"embedding": "seen"}),
    "words": ({"input_ids": "ids"}, {"embedding": "meant"}),
    "boxes": ({"tiles": "image"}, {n: n for n in ("class_embeds", "boxes", "logit_shift", "logit_scale")}),
    "answers": ({"tiles": "image", "input_ids": "ids"}, {"logits": "votes"}),
    "regions": ({"features": "regions", "input_ids": "ids"}, {"logits": "votes"}),
    "finder": ({"tiles": "image"}, {"features": "place"}),
    "embed": ({"input_ids": "ids"}, {"inputs_embeds": "embedded"}),
    "decoder": ({"inputs_embeds": "embedded"}, {"logits": "next"}),
    "maps": ({"tiles": "image"}, {"c3": "bright", "c4": "grey"}),
    "cells": ({"c3": "bright"}, {"embeddings": "meant"}),
    "pool": ({"c4": "grey"}, {"embedding": "seen"}),
}
MATCH = {
    "input": INPUT, "encoder": "eye", "text": TEXT, "label_prompt": "{label}", "score": "softmax", "logit_scale": 10.0,
    "memory": MEMORY,
}  # fmt: skip
TILES = {name: value for name, value in INPUT.items() if name != "prepare"} | {"whole_px": 0}
POOLED = MATCH | {"input": TILES, "encoder": "maps", "encoder_outputs": ["c4"], "head": "pool"}
SEGMENT = {
    "input": TILES, "encoder": "maps", "encoder_outputs": ["c3"], "head": "cells", "text": TEXT,
    "label_prompt": "{label}", "logit_scale": 10.0, "logit_bias": -8.0, "stride": 4, "threshold": 0.5,
    "min_area_m2": 0, "min_area_px": 1, "memory": MEMORY,
}  # fmt: skip
OPEN = {
    "kind": "open_vocabulary", "input": INPUT, "encoder": "boxes", "text": TEXT, "query_prompt": "{label}",
    "score_threshold": 0.5, "nms_iou": 0.5, "max_boxes_per_tile": 50, "memory": MEMORY,
}  # fmt: skip
ANSWER = {
    "kind": "answer_classes", "input": INPUT, "graph": "answers", "tokenizer": TOKENIZER, "answers": "answers.txt",
    "score": "softmax", "memory": MEMORY,
}  # fmt: skip
DECODER = {
    "kind": "onnx", "embed": "embed", "graph": "decoder", "cache": {"layers": 1, "heads": 1, "head_dim": 1}
}  # fmt: skip
GENERATE = {
    "kind": "generate", "input": INPUT, "encoder": "finder", "encoder_outputs": ["features"], "project": None,
    "decoder": DECODER, "tokenizer": TOKENIZER, "visual": {"token": None, "per_tile": 4},
    "prompt": "<bos> {text}", "positions": "sequence",
    "eos_ids": [2], "max_tokens": 12, "beams": 1, "length_penalty": 1.0,
    "boxes": {"open": "[", "close": "]", "scale": 100}, "memory": MEMORY,
}  # fmt: skip


class WideEngine(FakeEngine):
    """Graphs that see brightness and bright blobs in the prepared image, whose values run from -1 to 1."""

    def open(self, graph):
        known = {"eye": _eye, "words": _words, "boxes": _boxes, "answers": _answers, "regions": _regions,
                 "finder": _finder, "embed": _embed, "decoder": _decode, "maps": _maps, "cells": _cells,
                 "pool": _pool}  # fmt: skip
        return FakeSession(known[graph.stem]) if graph.stem in known else super().open(graph)


def _brightness(image):
    return (image.mean(axis=(1, 2, 3)) + 1) / 2


def _eye(inputs):
    share = _brightness(inputs["image"])
    return {"seen": np.stack([share, 1 - share], axis=1).astype(np.float32)}


def _maps(inputs):
    image = inputs["image"]
    return {"bright": (image[:, :1] + 1) / 2, "grey": (image.mean(axis=1, keepdims=True) + 1) / 2}


def _cells(inputs):
    """Of 4 x 4 pixels, how bright and how dark they are."""
    n, _, h, w = inputs["bright"].shape
    share = inputs["bright"].reshape(n, h // 4, 4, w // 4, 4).mean(axis=(2, 4))
    return {"meant": np.stack([share, 1 - share], axis=1)}


def _pool(inputs):
    share = inputs["grey"].mean(axis=(1, 2, 3))
    return {"seen": np.stack([share, 1 - share], axis=1)}


def _words(inputs):
    ids = inputs["ids"]
    found = [[1.0, 0.0] if WORDS.index("dark") not in row else [0.0, 1.0] for row in ids]
    known = np.isin(ids, [WORDS.index(w) for w in ("bright", "dark", "square")]).any(axis=1)
    return {"meant": np.where(known[:, None], found, -np.ones((1, 2))).astype(np.float32)}


def _boxes(inputs):
    """A proposal for each of at most 8 bright blobs, which are of class [1, 0]."""
    image = inputs["image"]
    n, _, h, w = image.shape
    classes, boxes = np.full((n, 8, 2), -1, np.float32), np.zeros((n, 8, 4), np.float32)
    for k in range(n):
        for p, (x0, y0, x1, y1) in enumerate(blobs(image[k, 0] > 0.2)[:8]):
            classes[k, p] = 1, 0
            boxes[k, p] = (x0 + x1) / 2 / w, (y0 + y1) / 2 / h, (x1 - x0) / w, (y1 - y0) / h
    return {"class_embeds": classes, "boxes": boxes, "logit_shift": np.full((n, 8), -0.5, np.float32),
            "logit_scale": np.full((n, 8), 10, np.float32)}  # fmt: skip


def _answers(inputs):
    """Is it what the question's last word says? yes or no."""
    share = _brightness(inputs["image"])
    asked = np.where((inputs["ids"] == WORDS.index("dark")).any(axis=1), 1 - share, share)
    return {"votes": np.stack([asked, 1 - asked, np.zeros(len(share))], axis=1).astype(np.float32) * 8}


def _regions(inputs):
    total = inputs["regions"].sum(axis=(1, 2))
    return {"votes": np.stack([total, -total, 0 * total], axis=1).astype(np.float32)}


def _finder(inputs):
    """The first bright blob in percent of the image, as four visual tokens [N, 4, 1]."""
    image = inputs["image"]
    _, _, h, w = image.shape
    place = np.zeros((len(image), 4, 1), np.float32)
    for k in range(len(image)):
        for x0, y0, x1, y1 in blobs(image[k, 0] > 0.2)[:1]:
            place[k, :, 0] = np.rint(100 * np.array([x0 / w, y0 / h, x1 / w, y1 / h]))
    return {"place": place}


def _embed(inputs):
    return {"embedded": inputs["ids"][..., None].astype(np.float32)}


def _decode(inputs):
    """Says "[ x0 y0 x1 y1 ]", or only the end where nothing was found; answers a question that ends in bright alone."""
    past = inputs["past_key_values.0.key"][:, 0, :, 0]
    history = np.concatenate([past, inputs["embedded"][:, :, 0]], axis=1)
    logits = np.zeros((len(history), 1, len(WORDS)), np.float32)
    prompt = 6  # four of the place, <bos>, one word
    for n, read in enumerate(history):
        at = len(read) - prompt
        sentence = ["[", *(WORDS[NUMBER + int(v)] for v in read[:4]), "]", "<eos>"] if read[:4].any() else ["<eos>"]
        if WORDS[int(read[prompt - 1])] == "bright":
            sentence = ["yes" if read[:4].any() else "no", "<eos>"]
        logits[n, 0, WORDS.index(sentence[min(at, len(sentence) - 1)])] = 9.0
    cache = history[:, None, :, None].astype(np.float32)
    return {"next": logits, "present.0.key": cache, "present.0.value": cache}


def write_bundle(folder, **tasks):
    folder.mkdir(parents=True)
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[PAD]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "answers.txt").write_text("yes\nno\nmaybe\n")
    said = [value for task in tasks.values() for value in (*task.values(), *task.get("decoder", {}).values())]
    used = {value for value in said if isinstance(value, str) and value in GRAPHS}
    used |= {"words"} if any("text" in task for task in tasks.values()) else set()
    for name in used:
        (folder / f"{name}.onnx").write_bytes(CONTENT)
    (folder / "probe.npz").write_bytes(CONTENT)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    data = manifest() | {
        "graphs": {name: graph(name, *GRAPHS[name]) for name in used},
        "tasks": tasks,
        "probe": [{"graph": min(used), "file": "probe.npz", "tolerance": 0.01}],
        "files": {n: {"sha256": hashlib.sha256(c).hexdigest(), "bytes": len(c)} for n, c in files.items()},
    }
    (folder / "manifest.json").write_text(json.dumps(data))
    return folder


EVERYTHING = {"detect": OPEN, "ground": GENERATE, "ask": ANSWER, "classify": MATCH, "search": MATCH}


SMALL = (240, 144)  # looked at whole
LARGE = (400, 300)  # and in tiles


def half_bright(size, share):
    """Bright from the left as far as ``share`` of the width, and black beyond."""
    image = np.zeros((3, size[1], size[0]), np.uint8)
    image[:, :, : int(size[0] * share)] = 255
    return image


def use_engine(monkeypatch):
    """Sessions that are opened from now on run on this engine."""
    init = Session.__init__
    engine = lambda threads, arena: WideEngine()  # noqa: E731
    monkeypatch.setattr(Session, "__init__", lambda self, *a, **k: init(self, *a, **({"engine_factory": engine} | k)))


def runner(bundle):
    """Runs a verb; returns (exit code, stdout, stderr)."""

    def call(verb, *arguments):
        command = [verb, *map(str, arguments), "--bundle", str(bundle), "--allow-unsigned"]
        done = CliRunner().invoke(edge_rsvlm.cli.cli, command)
        if isinstance(done.exception, EdgeRsvlmError):
            return done.exception.exit_code, done.stdout, f"error: {done.exception}"
        if done.exception and not isinstance(done.exception, SystemExit):
            raise done.exception
        return done.exit_code, done.stdout, done.stderr

    return call


def write_images(folder):
    """Ever brighter images; the last is a located scene in tiles."""
    folder.mkdir()
    for i, share in enumerate((0.1, 0.5, 0.9)):
        write(folder / f"{i}.png", half_bright(SMALL, share), "PNG")
    write(folder / "scene.tif", half_bright(LARGE, 0.6), **UTM)
    return folder
