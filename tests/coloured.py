"""A bundle that finds coloured things by words and by examples, without a trained model.

Its head sees blobs of red, green or blue on gray ground: every cell of a blob has the vector of its colour, and the one
at its centre is a peak. Things look alike that have one colour and brighten in one direction. Words have the vectors of
the colours they name. A phrase means things of the colours that it names, the larger the surer; only the first by size
or from the left where it says so.
"""

from __future__ import annotations

import hashlib
import json

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from edge_rsvlm.engines.fake import FakeSession
from edge_rsvlm.pipeline.session import Session
from edge_rsvlm.tasks import refer
from tests import fakes
from tests.fakes import CONTENT, MEMORY, blobs, graph

COLOURS = ("red", "green", "blue")
WORDS = ("a", "photo", "of", *COLOURS, "thing")
PHRASE_WORDS = ("the", "largest", "leftmost")
SIZE = (400, 300)
STRIDE = 4
GROUND = 3
"""The dimension of vectors where there is nothing."""
INPUT = fakes.INPUT | {"bands": ["red", "green", "blue"]}
TEXT = {
    "graph": "names", "output": "thing_embedding", "vocabulary": "vocabulary.txt",
    "tokenizer": {"file": "tokenizer.json", "add_special_tokens": False},
}  # fmt: skip
DETECT = {
    "kind": "text_heat_map", "input": INPUT, "encoder": "eye", "head": "cells", "encoder_outputs": ["c1"],
    "text": TEXT, "query_prompt": "a photo of {label}", "classes": ["red", "blue"], "stride": STRIDE,
    "score_threshold": 0.5, "nms_iou": 0.5, "max_boxes_per_tile": 100, "memory": MEMORY,
    "like": {"graph": "looks", "encoder_outputs": ["c1"], "threshold": 0.4},
}  # fmt: skip
CLASSIFY = {
    "input": INPUT, "encoder": "eye", "encoder_outputs": ["c1"], "head": "mean", "text": TEXT,
    "label_prompt": "{label}", "score": "softmax", "logit_scale": 10.0, "memory": MEMORY,
}  # fmt: skip
REFER = {
    "kind": "refer", "input": INPUT, "graph": "choice", "tokenizer": TEXT["tokenizer"], "vocabulary": "phrases.txt",
    "threshold": 0.3, "most_objects": 40, "memory": MEMORY,
}  # fmt: skip
GRAPHS = {
    "eye": ({"tiles": "pixels"}, {"c1": "first"}),
    "cells": ({"c1": "first"}, {"embeddings": "vectors", "shift": "moved", "scale": "scaled", "ltrb": "sides"}),
    "looks": ({"c1": "first"}, {"features": "texture"}),
    "mean": ({"c1": "first"}, {"embedding": "vector"}),
    "names": ({"input_ids": "ids"}, {"thing_embedding": "meant", "embedding": "else"}),
    "choice": ({"input_ids": "ids", "objects": "things", "objects_mask": "real"}, {"logits": "chosen"}),
}


class Engine:
    def open(self, path):
        known = {
            "eye": lambda inputs: {"first": inputs["pixels"]}, "cells": _cells, "looks": _looks, "mean": _mean,
            "names": _names, "choice": _choice,
        }  # fmt: skip
        return FakeSession(known[path.stem])


def use_engine(monkeypatch):
    """Sessions that are opened from now on run on this engine."""
    init = Session.__init__
    engine = lambda threads, arena: Engine()  # noqa: E731
    monkeypatch.setattr(Session, "__init__", lambda self, *a, **k: init(self, *a, **({"engine_factory": engine} | k)))


def _names(inputs):
    vectors = np.zeros((len(inputs["ids"]), 4), np.float32)
    for n, ids in enumerate(inputs["ids"]):
        for token in ids:
            if WORDS[token] in COLOURS:
                vectors[n, COLOURS.index(WORDS[token])] = 2
    return {"meant": vectors, "else": -vectors}


def _mean(inputs):
    tiles = inputs["first"]
    return {"vector": np.pad((tiles.mean(axis=(2, 3)) + 1) / 2, ((0, 0), (0, 1))).astype(np.float32)}


def _choice(inputs):
    assert (inputs["real"] == 1).all()
    ((tokens,), (things_CF,)) = inputs["ids"].tolist(), inputs["things"]
    said = {(*WORDS, *PHRASE_WORDS)[token] for token in tokens}
    place_CF, kind_CK, rank_CF = np.split(things_CF, [refer.PLACE, refer.PLACE + len(DETECT["classes"])], axis=1)
    wanted_C = np.isin(np.array(DETECT["classes"])[kind_CK.argmax(axis=1)], list(said))
    rank_CO = rank_CF[:, :-1].reshape(len(things_CF), refer.ORDERS, refer.RANKS).argmax(axis=2)
    for word, order in (("leftmost", 0), ("largest", 4)):
        wanted_C &= (rank_CO[:, order] == 0) | (word not in said)
    width_C = place_CF[:, 2] - place_CF[:, 0]
    return {"chosen": np.where(wanted_C, 10 * width_C, -4)[None].astype(np.float32)}


def _cells(inputs):
    """cosine + shift is 0.55 for the word of a peak, -0.45 for other words and far below 0 elsewhere, times 10."""
    tiles = inputs["first"]
    n, _, height, width = tiles.shape
    h, w = height // STRIDE, width // STRIDE
    vectors = np.zeros((n, 4, h, w), np.float32)
    vectors[:, GROUND] = 3
    shift, ltrb = np.full((n, 1, h, w), -1.5, np.float32), np.ones((n, 4, h, w), np.float32)
    for k, tile in enumerate(tiles):
        others = tile.sum(axis=0) - tile
        for colour in range(3):
            for x0, y0, x1, y1 in blobs(tile[colour] - others[colour] / 2 > 0.5):
                part = np.s_[y0 // STRIDE : -(-y1 // STRIDE), x0 // STRIDE : -(-x1 // STRIDE)]
                vectors[k][(slice(None), *part)] = 5 * np.eye(4)[colour][:, None, None]
                col, row = int((x0 + x1) / 2 // STRIDE), int((y0 + y1) / 2 // STRIDE)
                cx, cy = (col + 0.5) * STRIDE, (row + 0.5) * STRIDE
                shift[k, 0, row, col] = -0.45
                ltrb[k, :, row, col] = cx - x0, cy - y0, x1 - cx, y1 - cy
    return {"vectors": vectors, "moved": shift, "scaled": np.full((n, 1, h, w), 10, np.float32), "sides": ltrb}


def _looks(inputs):
    """Colours of things, and in which direction they brighten, as means over cells; 0 where there is nothing."""
    tiles = inputs["first"]
    shown_N3HW = np.stack([tiles[:, k] - (tiles.sum(axis=1) - tiles[:, k]) / 2 > 0.5 for k in range(3)], axis=1)
    light_NHW, thing_NHW = tiles.max(axis=1), shown_N3HW.any(axis=1)
    slopes = [np.zeros_like(light_NHW) for _ in range(2)]
    for axis, slope in zip((1, 2), slopes, strict=True):
        inside = thing_NHW & np.roll(thing_NHW, 1, axis)
        slope[inside] = 32 * (light_NHW - np.roll(light_NHW, 1, axis))[inside]
    maps = np.concatenate([shown_N3HW, np.stack(slopes, axis=1)], axis=1).astype(np.float32)
    n, dims, height, width = maps.shape
    cells = maps.reshape(n, dims, height // STRIDE, STRIDE, width // STRIDE, STRIDE)
    return {"texture": cells.mean(axis=(3, 5))}


def things(squares, size=SIZE):
    """Gray ground with squares (colour, col, row, side), [3, H, W]."""
    image = np.full((3, size[1], size[0]), 60, np.uint8)
    for colour, col, row, side in squares:
        image[:, row : row + side, col : col + side] = (np.arange(3) == COLOURS.index(colour))[:, None, None] * 255
    return image


def write_bundle(folder, **tasks):
    folder.mkdir(parents=True)
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate((*WORDS, *PHRASE_WORDS))}, unk_token="a"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "vocabulary.txt").write_text("\n".join(WORDS) + "\n")
    (folder / "phrases.txt").write_text("\n".join((*PHRASE_WORDS, *COLOURS)) + "\n")
    for name in (*(f"{part}.onnx" for part in GRAPHS), "probe.npz"):
        (folder / name).write_bytes(CONTENT)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    data = fakes.manifest() | {
        "graphs": {name: graph(name, *ends) for name, ends in GRAPHS.items()},
        "tasks": tasks or {"detect": DETECT, "classify": CLASSIFY, "search": CLASSIFY, "ground": REFER},
        "probe": [{"graph": "eye", "file": "probe.npz", "tolerance": 0.01}],
        "files": {n: {"sha256": hashlib.sha256(c).hexdigest(), "bytes": len(c)} for n, c in files.items()},
    }
    (folder / "manifest.json").write_text(json.dumps(data))
    return folder
