"""Fewer bits by a recipe: calibrated, quantized, judged and searched for, on tiny checkpoints and packaged scenes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch", reason="the export extra is not installed")
pytest.importorskip("transformers", reason="the export extra is not installed")
pytest.importorskip("onnxscript", reason="the export extra is not installed")

from click.testing import CliRunner  # noqa: E402

import edge_rsvlm  # noqa: E402
from edge_rsvlm.cli import cli  # noqa: E402
from edge_rsvlm.errors import UsageError  # noqa: E402
from edge_rsvlm.export.quantize.search import Goal, choices_of, front, made_within, parse_goal, within  # noqa: E402
from edge_rsvlm.export.quantize.sensitivity import LayerLoss  # noqa: E402
from edge_rsvlm.scoring import accuracy_score, loss_bound  # noqa: E402
from tests import tiny_checkpoints, tiny_generators  # noqa: E402

SCENES = Path(edge_rsvlm.__file__).parent / "scenes"
PHOTOS = ("airliners.webp", "marina.webp", "overpass.webp")


def run(*arguments: object):
    return CliRunner().invoke(cli, [str(a) for a in arguments], standalone_mode=False)


def recipe(folder: Path, checkpoint: Path, target: str, **more: str) -> Path:
    path = folder / "RECIPE.toml"
    path.write_text(
        f'version = 1\ncheckpoint = "{checkpoint}"\ntarget = "{target}"\nout = "bundle"\nwork = "steps"\n'
        + "\n".join(f"{key} = {value}" for key, value in more.items())
        + f'\n[calibration]\nimages = "{SCENES}"\ncount = 4\ntexts = ["airplane", "a green field"]\n'
    )
    return path


def manifest(folder: Path) -> dict:
    return json.loads((folder / "bundle" / "manifest.json").read_text())


def test_a_dual_encoder_in_8_bits_is_calibrated_and_judged(tmp_path):
    (tmp_path / "c").mkdir()
    # Random weights magnify what rounding changes: the gate may stop them, and what it measured is recorded.
    checkpoint = tiny_checkpoints.clip(tmp_path / "c")
    made = run("export", "run", recipe(tmp_path, checkpoint, "onnx:int8"), "--allow", "accuracy")
    assert made.exception is None, made.exception
    found = manifest(tmp_path)
    assert {graph["precision"] for graph in found["graphs"].values()} == {"int8-dynamic"}
    accuracy = next(step for step in found["steps"] if step["step"] == "accuracy")
    assert accuracy["metrics"]["search of images cosine"] >= 0.98
    shown = run(
        "classify", SCENES / "marina.webp", "--labels", "harbor,field", "--bundle", tmp_path / "bundle",
        "--allow-unsigned", "--json",
    )  # fmt: skip
    assert shown.exception is None and "harbor" in shown.output
    assert run("verify", "--bundle", tmp_path / "bundle", "--allow-unsigned").exception is None


def test_static_ranges_are_calibrated_and_recorded(tmp_path):
    (tmp_path / "c").mkdir()
    wanted = recipe(tmp_path, tiny_checkpoints.clip(tmp_path / "c"), "onnx:int8", allow='["accuracy"]')
    wanted.write_text(wanted.read_text() + '\n[precision]\nimage_encoder = "int8"\n')
    made = run("export", "run", wanted)
    assert made.exception is None, made.exception
    found = manifest(tmp_path)
    assert found["graphs"]["image_encoder"]["precision"] == "int8"
    assert len(found["calibration"]["images"]) == 4 and len(found["calibration"]["sha256"]) == 64
    steps = [step["step"] for step in found["steps"]]
    assert steps == ["checkpoint", "compile_onnx", "parity", "calibrate", "quantize", "accuracy"]


def test_a_decoder_in_4_bits_answers(tmp_path):
    (tmp_path / "c").mkdir()
    tiny_generators.llava(tmp_path / "c")
    made = run("export", "run", recipe(tmp_path, tmp_path / "c", "onnx:int4", allow='["accuracy"]'))
    assert made.exception is None, made.exception
    assert manifest(tmp_path)["graphs"]["decoder"]["precision"] == "int4"
    shown = run("ask", SCENES / "marina.webp", "what?", "--bundle", tmp_path / "bundle", "--allow-unsigned")
    assert shown.exception is None


def test_another_target_goes_on_from_the_same_steps(tmp_path):
    (tmp_path / "c").mkdir()
    checkpoint = tiny_checkpoints.clip(tmp_path / "c")
    made = {}
    for target in ("onnx:f16", "onnx:int8"):
        done = run("export", "run", recipe(tmp_path, checkpoint, target, allow='["accuracy"]'))
        assert done.exception is None, done.exception
        files = [tmp_path / "steps" / step / "artifact.json" for step in ("checkpoint", "compile_onnx", "parity")]
        made[target] = [path.stat().st_mtime_ns for path in files]
    assert made["onnx:f16"] == made["onnx:int8"]


def test_what_costs_too_much_is_not_bundled(tmp_path, monkeypatch):
    from edge_rsvlm.export.proof import accuracy

    monkeypatch.setattr(accuracy, "COSINE", 1.1)
    (tmp_path / "c").mkdir()
    made = run("export", "run", recipe(tmp_path, tiny_checkpoints.clip(tmp_path / "c"), "onnx:int8"))
    assert "fewer bits cost more" in str(made.exception) and not (tmp_path / "bundle").exists()


def test_images_are_asked_for_where_ranges_need_them(tmp_path):
    (tmp_path / "c").mkdir()
    tiny_generators.llava(tmp_path / "c")
    made = run(
        "export", "run", "--checkpoint", tmp_path / "c", "--target", "onnx:int4", "--out", tmp_path / "bundle"
    )  # fmt: skip
    assert "--calibration" in str(made.exception)


def test_weights_that_are_only_rounded_need_no_images(tmp_path):
    (tmp_path / "c").mkdir()
    tiny_generators.llava(tmp_path / "c")
    path = recipe(tmp_path, tmp_path / "c", "onnx:int4", allow='["accuracy"]')
    path.write_text(path.read_text().partition("[calibration]")[0] + '[int4]\nmethod = "rtn"\n')
    made = run("export", "run", path)
    assert made.exception is None, made.exception
    found = manifest(tmp_path)
    assert found["graphs"]["decoder"]["precision"] == "int4" and found.get("calibration") is None


def test_only_graphs_that_are_named_are_made_for_tensorrt(tmp_path):
    (tmp_path / "c").mkdir()
    checkpoint = tiny_checkpoints.clip(tmp_path / "c")
    wanted = recipe(tmp_path, checkpoint, "onnx:f16", engines='["onnxruntime", "tensorrt"]', allow='["accuracy"]')
    text = wanted.read_text()
    wanted.write_text(text + '\n[tensorrt]\ngraphs = ["vision"]\n')
    assert "[tensorrt] names 'vision'" in str(run("export", "run", wanted).exception)
    wanted.write_text(text + '\n[tensorrt]\ngraphs = ["image_encoder"]\n')
    made = run("export", "run", wanted)
    assert made.exception is None, made.exception
    graphs = manifest(tmp_path)["graphs"]
    assert {name for name, graph in graphs.items() if graph["tensorrt"]} == {"image_encoder"} < set(graphs)


def test_calibration_unlike_what_judges_is_warned_about(tmp_path):
    (tmp_path / "c").mkdir()
    rng = np.random.default_rng(0)
    (tmp_path / "noise").mkdir()
    for index in range(4):
        noise = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "noise" / f"{index}.png")
    labels = tmp_path / "labels.jsonl"
    labels.write_text("".join(json.dumps({"image": name, "label": name}) + "\n" for name in PHOTOS))
    wanted = recipe(tmp_path, tiny_checkpoints.clip(tmp_path / "c"), "onnx:int8", allow='["accuracy"]')
    judged = f'[[evaluate]]\ntask = "classify"\nlabels = "labels.jsonl"\nimages = "{SCENES}"\n'
    wanted.write_text(
        wanted.read_text().replace(str(SCENES), "noise") + judged + '[precision]\nimage_encoder = "int8"\n'
    )
    made = run("export", "run", wanted)
    assert made.exception is None, made.exception
    (warning,) = manifest(tmp_path)["calibration"]["warnings"]
    assert "standard deviations" in warning and f"warning: {warning}" in made.stderr


def test_words_are_followed_on_the_images_that_judge_them(monkeypatch):
    from edge_rsvlm.bundle import load_bundle
    from edge_rsvlm.export.proof import accuracy
    from edge_rsvlm.raster.inputs import Source

    seen = []
    monkeypatch.setattr(accuracy, "_tokens", lambda verb, old, new, images, texts: seen.append(list(images)) or [])
    monkeypatch.setattr(accuracy, "_boxes", lambda old, new, images, texts: seen.append(list(images)) or [])
    monkeypatch.setattr(accuracy, "_embeddings", lambda old, new, images, texts: [])
    others, judges = ([Source(name, name)] for name in ("other", "judge"))
    packaged = load_bundle()
    accuracy.compare_answers(packaged, packaged, others, (), {"caption": judges}, lambda *_: None)
    assert seen == [judges, others]


def test_a_goal_of_size_is_met_by_a_mix(tmp_path):
    (tmp_path / "c").mkdir()
    checkpoint, limit = tiny_checkpoints.clip(tmp_path / "c"), 280_000
    wanted = recipe(tmp_path, checkpoint, "onnx:f16", goal=f'"size={limit}"', allow='["accuracy"]')
    made = run("export", "run", wanted)
    assert made.exception is None, made.exception
    assert sum(path.stat().st_size for path in (tmp_path / "bundle").rglob("*") if path.is_file()) <= limit
    kept = tmp_path / "bundle.search"
    assert {path.name for path in kept.iterdir()} >= {"layers.txt", "front.txt", "front.png", "choice.json"}
    assert "chosen" in (kept / "front.txt").read_text()
    search = next(step for step in manifest(tmp_path)["steps"] if step["step"] == "search")
    assert search["metrics"]["goal"] == f"size={limit}"


def test_llama_switches_no_adapters(tmp_path):
    (tmp_path / "c").mkdir()
    tiny_generators.llava(tmp_path / "c")
    wanted = recipe(tmp_path, tmp_path / "c", "gguf:Q8_0")
    wanted.write_text(wanted.read_text() + '[[adapters]]\npath = "lora"\nkeep = true\n')
    made = run("export", "run", wanted)
    assert "no adapters to switch" in str(made.exception) and not (tmp_path / "steps").exists()


def test_a_goal_is_not_for_llama(tmp_path):
    (tmp_path / "c").mkdir()
    tiny_generators.llava(tmp_path / "c")
    made = run("export", "run", recipe(tmp_path, tmp_path / "c", "gguf:Q8_0", goal='"size=10MiB"'))
    assert "a goal chooses among graphs" in str(made.exception) and not (tmp_path / "steps").exists()


LAYERS = [
    LayerLoss("g", "hard", 10, {"int8": 0.1, "int4": 0.4}),
    LayerLoss("g", "easy", 1000, {"int8": 0.001, "int4": 0.01}),
]


def test_the_front_falls_in_loss_as_bytes_rise():
    choices = choices_of("g", ["int8", "int4"], LAYERS, {})
    mixes = front([choices])
    sizes, losses = [mix.bytes for mix in mixes], [mix.loss for mix in mixes]
    assert sizes == sorted(sizes) and losses == sorted(losses, reverse=True) and losses[-1] == 0
    best = made_within(mixes, Goal("size", 1120), lambda mix: int(mix.bytes) + 70)
    assert best.choices[0].precision == "int8" and best.choices[0].keep == ("hard",)
    with pytest.raises(UsageError, match="the latency of the smallest is 0ms"):
        within(mixes, Goal("latency", -1))


def test_a_size_is_that_of_what_was_made():
    mixes = front([choices_of("g", ["int8", "int4"], LAYERS, {})])
    made = {mix: int(mix.bytes) + 600 for mix in mixes}  # scales and the like, of which nobody told
    for limit in sorted(made.values()):
        assert made[made_within(mixes, Goal("size", limit), made.__getitem__)] == limit
        assert made[made_within(mixes, Goal("size", limit + 1), made.__getitem__)] == limit
    with pytest.raises(UsageError, match="no mix reaches the goal"):
        made_within(mixes, Goal("size", min(made.values()) - 1), made.__getitem__)


def test_goals_are_read():
    assert parse_goal("size=12MiB") == Goal("size", 12 << 20)
    assert parse_goal("latency=50ms") == Goal("latency", 0.05)
    assert parse_goal("accuracy-loss=0.5") == Goal("accuracy-loss", 0.5)
    for wrong in ("size", "speed=3", "accuracy-loss=much"):
        with pytest.raises(UsageError):
            parse_goal(wrong)


def test_losses_are_paired():
    right = np.array([1] * 90 + [0] * 10)
    worse = right.copy()
    worse[:2] = 0
    asked = np.ones(100, int)
    before, after = accuracy_score(right, asked), accuracy_score(worse, asked)
    assert loss_bound(before, before) == 0
    # Two of a hundred: what all images share does not widen the interval.
    assert 0.02 < loss_bound(before, after) <= 0.06
