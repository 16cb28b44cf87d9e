"""What every export family must hold, checked the same way for all: graphs trace and run, the manifest accepts them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch: not installed")
pytest.importorskip("transformers", reason="needs transformers: not installed")

import onnxruntime  # noqa: E402
from transformers import AutoConfig  # noqa: E402

from edge_rsvlm.config.manifest import Graph  # noqa: E402
from edge_rsvlm.config.model import parse  # noqa: E402
from edge_rsvlm.config.task_specs import Tasks  # noqa: E402
from edge_rsvlm.errors import BundleError  # noqa: E402
from edge_rsvlm.export.checkpoint.reading import open_checkpoint  # noqa: E402
from edge_rsvlm.export.families.base import Arrays, Description, Family, GraphPlan, Source  # noqa: E402
from edge_rsvlm.export.families.registry import family_of  # noqa: E402
from edge_rsvlm.export.graphs import external_data  # noqa: E402
from edge_rsvlm.export.graphs.tracing import trace  # noqa: E402

MEMORY = {"session_bytes": 1, "tile_bytes": 1}


@dataclass(frozen=True)
class Loaded:
    """A checkpoint as an export sees it."""

    family: Family
    source: Source
    model: Any

    def plan(self, name: str) -> GraphPlan:
        return next(plan for plan in self.family.graphs(self.source) if plan.name == name)

    def module(self, name: str) -> Any:
        return self.plan(name).wrap(self.model).eval()


def load(folder: Path) -> Loaded:
    config = AutoConfig.from_pretrained(folder)
    family = family_of(config)
    model, info = family.model_class(config).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return Loaded(family, Source(folder, config), model.eval())


def random_feeds(plan: GraphPlan, sizes: Mapping[str, int], highest_id: int = 50, seed: int = 0) -> Arrays:
    """Random inputs of these sizes: token ids from 5 to ``highest_id``, masks that end at different places."""
    random = np.random.default_rng(seed)
    feeds = {}
    for given in plan.inputs:
        shape = tuple(sizes[part] if isinstance(part, str) else part for part in given.shape)
        if given.name == "attention_mask":
            lengths = shape[1] - np.arange(shape[0]) % max(shape[1] - 2, 1)
            feeds[given.name] = (np.arange(shape[1])[None] < lengths[:, None]).astype(np.int64)
        elif given.dtype == torch.int64:
            feeds[given.name] = random.integers(5, highest_id, shape)
        else:
            feeds[given.name] = random.normal(size=shape).astype(np.float32)
    return feeds


def export(loaded: Loaded, name: str, folder: Path) -> onnxruntime.InferenceSession:
    """The graph as an export makes it: traced without weights, then filled from the checkpoint's files."""
    checkpoint, model_class = open_checkpoint(loaded.source.folder), type(loaded.model)
    traced = trace(model_class, checkpoint.config, loaded.plan(name))
    path = folder / f"{name}.onnx"
    external_data.write(traced, checkpoint.weights(model_class), path, "f32")
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def run_torch(loaded: Loaded, name: str, feeds: Arrays) -> Arrays:
    with torch.inference_mode():
        outputs = loaded.module(name)(*(torch.from_numpy(value) for value in feeds.values()))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return {key: value.numpy() for key, value in zip(loaded.plan(name).outputs, outputs, strict=True)}


def run_onnx(session: onnxruntime.InferenceSession, feeds: Arrays) -> Arrays:
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def check_graph(loaded: Loaded, name: str, folder: Path, sizes: list[dict[str, int]]) -> onnxruntime.InferenceSession:
    """The graph runs in onnxruntime as its module does in torch, at every one of ``sizes``."""
    session = export(loaded, name, folder)
    for case, more in enumerate(sizes):
        plan = loaded.plan(name)
        feeds = random_feeds(plan, dict(plan.sizes) | more, seed=case)
        assert_same(run_onnx(session, feeds), run_torch(loaded, name, feeds), 1e-4)
    return session


def assert_same(got: Arrays, want: Arrays, tolerance: float) -> None:
    """Equal names and shapes, and values within ``tolerance`` of the greatest absolute value."""
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name].shape == value.shape, name
        assert np.isfinite(value).all(), name
        assert np.abs(got[name] - value).max(initial=0.0) <= tolerance * max(np.abs(value).max(initial=0.0), 1e-3), name


def check_description(loaded: Loaded) -> tuple[Description, Tasks]:
    """The manifest's models take the description, graphs and tasks name each other, and files are there."""
    description = loaded.family.describe(loaded.source)
    for graph, names in description.graphs.items():
        parse(Graph, names | {"file": f"{graph}.onnx", "precision": "f32"}, graph, BundleError)
        plan = loaded.plan(graph)
        assert list(names["inputs"].values()) == [given.name for given in plan.inputs]
        assert list(names["outputs"].values()) == list(plan.outputs)
    tasks = {verb: task | {"memory": MEMORY} for verb, task in description.tasks.items()}
    return description, parse(Tasks, tasks, "tasks", BundleError)
