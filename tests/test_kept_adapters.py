"""An export whose adapters are merged, kept apart, or both."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="the export extra is not installed")
pytest.importorskip("peft", reason="the export extra is not installed")
pytest.importorskip("sentencepiece", reason="Llama's tokenizer is a sentencepiece model")

from edge_rsvlm.bundle import load_bundle  # noqa: E402
from edge_rsvlm.errors import BundleError, UsageError  # noqa: E402
from edge_rsvlm.export.chain import run_export  # noqa: E402
from edge_rsvlm.export.graphs import switching  # noqa: E402
from edge_rsvlm.export.recipe import load_recipe  # noqa: E402
from tests import tiny_generators as tiny  # noqa: E402
from tests.test_switching import save_adapter  # noqa: E402

RECIPE = """
version = 1
checkpoint = "checkpoint"
out = "out"
work = "work"
[[adapters]]
path = "merged"
weight = 0.5
[[adapters]]
path = "harbour"
keep = true
[[adapters]]
path = "strip"
keep = true
name = "run.way"
weight = 0.8
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint and three adapters; every export goes on from the work of those before."""
    from transformers import LlavaForConditionalGeneration

    folder = tmp_path_factory.mktemp("kept")
    tiny.llava(folder / "checkpoint")
    kinds = {
        "merged": {"target_modules": "all-linear", "use_dora": True},
        "harbour": {"target_modules": ["q_proj", "v_proj"]},
        "strip": {"r": 5, "target_modules": ["q_proj", "down_proj"]},
    }
    for seed, (name, config) in enumerate(kinds.items()):
        model = LlavaForConditionalGeneration.from_pretrained(folder / "checkpoint", dtype=torch.float32)
        save_adapter(model, folder / name, seed, **config)
    (folder / "recipe.toml").write_text(RECIPE)
    return folder


def test_a_wrong_factor_stops_the_export_and_its_layer_is_named(folder, monkeypatch):
    stored, count = switching._stored, iter(range(1000))
    monkeypatch.setattr(
        switching, "_stored", lambda values, precision: stored(values * (3 if next(count) == 2 else 1), precision)
    )
    with pytest.raises(BundleError, match=r"harbour: \w+: first off: model\..*\.layers\.\d\.self_attn\.[qv]_proj"):
        run_export(load_recipe(folder / "recipe.toml"), lambda *_: None)
    (folder / "work" / "compile_onnx" / "artifact.json").unlink()


def test_kept_and_merged_adapters_in_one_bundle(folder):
    bundle = load_bundle(run_export(load_recipe(folder / "recipe.toml"), lambda *_: None), allow_unsigned=True)
    assert set(bundle.manifest.adapters) == {"harbour", "run.way"}
    assert bundle.manifest.name == "checkpoint-merged"
    probed = {(case.graph, case.adapter) for case in bundle.manifest.probe}
    assert probed >= {("decoder", None), ("decoder", "harbour"), ("decoder", "run.way"), ("image", "harbour")}
    metrics = next(step.metrics for step in bundle.manifest.steps if step.step == "parity")
    assert metrics["run.way: whole token agreement"] == metrics["harbour: whole token agreement"] == 1.0
    assert metrics["run.way: decoder.logits relative error"] < 1e-4


def test_names_are_checked_before_the_work(folder):
    (folder / "twice.toml").write_text(RECIPE.replace("run.way", "Harbour"))
    steps = []
    with pytest.raises(UsageError, match="two adapters are named harbour"):
        run_export(load_recipe(folder / "twice.toml"), lambda step, *_: steps.append(step))
    assert not steps
