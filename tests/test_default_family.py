"""The default model as one family among others: its stages, untrained, exported; every verb answers from the bundle."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

torch = pytest.importorskip("torch", reason="needs torch: not installed")
pytest.importorskip("transformers", reason="needs transformers: not installed")

import edge_rsvlm.cli  # noqa: E402
from edge_rsvlm.bundle import Rules, load_bundle  # noqa: E402
from edge_rsvlm.engines.onnxruntime import OnnxRuntimeEngine  # noqa: E402
from edge_rsvlm.errors import InputError  # noqa: E402
from edge_rsvlm.export import artifact  # noqa: E402
from edge_rsvlm.export.chain import run_export  # noqa: E402
from edge_rsvlm.export.default import thresholds  # noqa: E402
from edge_rsvlm.export.default.checkpoint import DefaultModel, is_stages, open_stages  # noqa: E402
from edge_rsvlm.export.default.data.objects import CLASSES, ObjectData, ObjectSet  # noqa: E402
from edge_rsvlm.export.default.describe import Thresholds, read_thresholds  # noqa: E402
from edge_rsvlm.export.default.family import CUT_STAGES, Default  # noqa: E402
from edge_rsvlm.export.families.base import Source  # noqa: E402
from edge_rsvlm.export.proof.accuracy import compare_answers  # noqa: E402
from edge_rsvlm.export.quantize.calibration import graphs_without_calls, record  # noqa: E402
from edge_rsvlm.export.quantize.settings import CalibrationImages  # noqa: E402
from edge_rsvlm.export.recipe import BundleFacts, Recipe  # noqa: E402
from edge_rsvlm.export.steps.quantize import quantize  # noqa: E402
from edge_rsvlm.pipeline.runtime import Runtime, cpu_engine  # noqa: E402
from edge_rsvlm.raster.inputs import list_inputs  # noqa: E402
from edge_rsvlm.verify import verify  # noqa: E402
from tests.default_stages import CUTS, WORDS, write_stages  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
FACTS = BundleFacts(name="untrained")
"""By another name it is no older version of the packaged bundle."""
GRAPHS = {
    "encoder", "detect", "appearance", "segment", "change", "match", "text", "language_prefix", "language_embed",
    "language_decoder", "refer",
}  # fmt: skip


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    return write_stages(tmp_path_factory.mktemp("stages"))


@pytest.fixture(scope="module")
def recipe(stages, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    return Recipe(checkpoint=stages, target="onnx:f32", out=folder / "bundle", work=folder / "work", bundle=FACTS)


@pytest.fixture(scope="module")
def exported(recipe):
    """The bundle in full precision."""
    run_export(recipe, lambda *_: None)
    return load_bundle(recipe.out, allow_unsigned=True, allow_older=True)


def scene(path, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (10, 12, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((240, 200)).save(path)
    return path


@pytest.fixture
def image(tmp_path):
    return scene(tmp_path / "scene.png")


@pytest.fixture
def run(exported):
    def call(verb, *arguments):
        options = ["--bundle", str(exported.folder), "--allow-unsigned"]
        done = CliRunner().invoke(edge_rsvlm.cli.cli, [verb, *map(str, arguments), *options])
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        return done

    return call


def test_graphs_compute_what_the_stages_do(stages, exported):
    manifest = exported.manifest
    assert set(manifest.graphs) == GRAPHS == {case.graph for case in manifest.probe}
    assert verify(exported.folder, Rules(allow_unsigned=True, allow_older=True)).passed
    model, source = DefaultModel.from_pretrained(stages), Source(stages, open_stages(stages).config)
    torch.manual_seed(1)
    engine = OnnxRuntimeEngine(threads=1)
    with torch.no_grad():
        for plan in Default().graphs(source):
            inputs = {given.name: example(given, plan.sizes) for given in plan.inputs}
            expected = plan.wrap(model)(*inputs.values())
            session = engine.open(exported.path(manifest.graphs[plan.name].file))
            found = session.run({name: value.numpy() for name, value in inputs.items()}, plan.outputs)
            expected = expected if isinstance(expected, tuple) else (expected,)
            for name, here, there in zip(plan.outputs, found, expected, strict=True):
                error = np.abs(here - there.numpy()).max() / max(1.0, float(there.abs().max()))
                assert error < 1e-4, f"{plan.name}.{name}: {error}"


def example(given, sizes):
    """Other sizes than those of tracing."""
    shape = [other(sizes[size], size) if isinstance(size, str) else size for size in given.shape]
    if given.name in ("attention_mask", "objects_mask"):
        mask = torch.ones(shape, dtype=torch.int64)
        mask[1:, shape[1] // 2 :] = 0
        return mask
    return torch.randint(0, 200, shape) if given.dtype == torch.int64 else torch.randn(shape)


def other(size, name):
    return size + 1 if name == "batch" else 2 * size


def test_the_manifest_says_what_is_asked_and_how(exported):
    tasks = exported.manifest.tasks
    assert tasks.detect.classes == CLASSES and tasks.detect.text.output == "query"
    assert (tasks.detect.score_threshold, tasks.detect.like.threshold, tasks.change.threshold) == (0.01, 0.5, 0.45)
    assert tasks.segment.text.output == "label" and tasks.segment.experimental
    assert tasks.segment.logit_scale == pytest.approx(10, rel=1e-3) and tasks.segment.logit_bias == -4
    assert tasks.classify == tasks.search and tasks.search.logit_scale == pytest.approx(14, rel=1e-3)
    assert tasks.caption.input == tasks.ask.input == tasks.search.input and tasks.detect.input == tasks.segment.input
    assert tasks.ground.input == tasks.detect.input and tasks.ground.most_objects == 48
    assert tasks.ask.prompt == "{image}<ask>{text}<answer>" and tasks.ask.vocabulary == "vocabulary.txt"
    assert "leftmost" in exported.path("phrases.txt").read_text().splitlines()
    assert exported.path("objects.txt").read_text().splitlines()[:4] == ["a", "aircraft", "airliner", "airliners"]
    assert exported.path("vocabulary.txt").read_text().split() == WORDS
    assert all(task.memory.measured for _, task in exported.manifest.tasks if task is not None)


def test_detects_by_words_and_by_examples(run, image):
    found = [json.loads(run("detect", image, "--json", *more).stdout) for more in (
        (), ("--query", "ship", "--query", "all trucks"), ("--like", f"{image}#40,40,30,20"),
    )]  # fmt: skip
    assert {box["label"] for box in found[0]["detections"]} <= set(CLASSES)
    assert {box["label"] for box in found[1]["detections"]} <= {"ship", "all trucks"}
    assert found[0]["coverage"] == 1.0 and found[2]["detections"], "an example is like itself"
    with pytest.raises(Exception, match="never learnt 'bus'"):
        run("detect", image, "--query", "bus")


def test_masks_classes_and_retrieval(run, image, tmp_path):
    mask = tmp_path / "mask.tif"
    assert run("segment", image, "--labels", "trees,sea", "--mask", mask).exit_code == 0 and mask.is_file()
    labels = json.loads(run("classify", image, "--labels", "airport,sea", "--json").stdout)["labels"]
    assert {name for name, _ in labels} == {"airport", "sea"} and sum(score for _, score in labels) > 0.99
    assert run("index", image, "--to", tmp_path / "index").exit_code == 0
    assert str(image) in run("search", tmp_path / "index", "many airplanes", "--json").stdout
    with pytest.raises(Exception, match="never learnt 'volcano'"):
        run("classify", image, "--labels", "volcano,sea")


def test_captions_answers_boxes_of_phrases_and_change(run, image, tmp_path):
    assert "caption" in json.loads(run("caption", image, "--json").stdout)
    assert "answer" in json.loads(run("ask", image, "does this picture contain trees?", "--json").stdout)
    found = json.loads(run("ground", image, "the airplane on the left", "--json").stdout)["detections"]
    assert {box["label"] for box in found} <= {"the airplane on the left"} and all(box["score"] >= 0.3 for box in found)
    with pytest.raises(Exception, match="never learnt 'beautiful'"):
        run("ground", image, "the beautiful airplane")
    shutil.copy(image, tmp_path / "after.png")
    assert "changed_fraction" in json.loads(run("change", image, tmp_path / "after.png", "--json").stdout)


def test_stages_that_lack_a_file_are_told(stages, tmp_path):
    assert is_stages(stages) and not is_stages(tmp_path) and not is_stages(stages / "vision")
    shutil.copytree(stages, tmp_path / "part")
    (tmp_path / "part" / "language" / "vocabulary.txt").unlink()
    with pytest.raises(InputError, match=r"language/vocabulary\.txt is not there"):
        open_stages(tmp_path / "part")
    tensors = open_stages(stages).weights(DefaultModel)
    assert tensors.keys() == DefaultModel(open_stages(stages).config).state_dict().keys()


def test_fewer_bits_are_calibrated_and_judged_by_every_task(recipe, exported, tmp_path):
    (tmp_path / "images").mkdir()
    for seed in range(3):
        scene(tmp_path / "images" / f"{seed}.png", seed)
    images = CalibrationImages(images=(tmp_path / "images",), count=2, texts=("trees", "two ships"))
    samples, _ = record(exported, images, tmp_path / "samples", lambda *_: None)
    assert not graphs_without_calls(exported.manifest, samples)

    smaller = recipe.model_copy(update={"target": "onnx:int8", "precision": {"detect": "f16"}})
    draft, probes = recipe.work / "compile_onnx" / "bundle", recipe.work / "parity" / "probes"
    quantize(smaller, draft, probes, samples, tmp_path, lambda *_: None)
    after = load_bundle(tmp_path / "bundle", allow_unsigned=True, allow_older=True)
    kinds = {name: graph.precision for name, graph in after.manifest.graphs.items()}
    static = dict.fromkeys(("encoder", "segment", "change", "match"), "int8")
    assert kinds == static | {
        "detect": "f16", "appearance": "f16", "text": "int8-dynamic", "language_prefix": "int8-dynamic",
        "language_embed": "f16", "language_decoder": "int8-dynamic", "refer": "int8-dynamic",
    }  # fmt: skip
    sources = list_inputs([str(tmp_path / "images")])
    checks = compare_answers(exported, after, sources[:1], (), {}, lambda *_: None)
    assert {check.output for check in checks} >= {"caption", "search of images", "search of texts"}
    cosines = [check.value for check in checks if check.metric == "cosine"]
    assert min(cosines) > 0.9


@pytest.fixture
def toy(tmp_path):
    """Cars and a bus, which no kind is, on four images of which all objects are labelled."""
    (tmp_path / "toy" / "train").mkdir(parents=True)
    coco = {"categories": [{"id": 1, "name": "car"}, {"id": 2, "name": "bus"}], "images": [], "annotations": []}
    for n in range(4):
        Image.new("RGB", (400, 400), (90, 90, 40 * n)).save(tmp_path / "toy" / "train" / f"{n}.png")
        coco["images"].append({"id": n, "file_name": f"{n}.png", "width": 400, "height": 400})
        for k, (category, x) in enumerate(((1, 60), (1, 160), (1, 240), (1, 330), (2, 120))):
            box = {"bbox": [x, 60 * k + 40, 30, 20], "image_id": n, "category_id": category}
            coco["annotations"].append(box | {"id": 5 * n + k, "area": 600, "iscrowd": 0})
    (tmp_path / "toy" / "train.json").write_text(json.dumps(coco))
    spec = ObjectSet("toy", "train", {"car": "car", "bus": None}, ("car",))
    return ObjectData(spec, tmp_path, tmp_path / "cache")


def test_episodes_show_one_kind_in_one_image_and_seek_it_in_another(toy):
    rng, shown = np.random.default_rng(3), []
    toy.crop = lambda name, *others, **more: shown.append(name) or ObjectData.crop(toy, name, *others, **more)
    for _ in range(5):
        episode = thresholds.draw(toy, rng)
        assert 1 <= len(episode.boxes) <= thresholds.EXAMPLES
        assert episode.boxes.min() > -1 and episode.boxes.max() < thresholds.CROP_PX + 1
        assert {box.label for box in episode.truth if not box.ignore} == {"like"}
        assert {box.label for box in episode.truth if box.ignore} <= {"like", None}
        assert shown[-2] != shown[-1]


def test_thresholds_are_steps_of_the_grid(exported, toy, monkeypatch):
    monkeypatch.setattr(thresholds, "CROPS", 2)
    monkeypatch.setattr(thresholds, "EPISODES", 2)
    runtime = Runtime(exported, cpu_engine(1, 0))
    detection = thresholds.Detection(runtime, exported.manifest.tasks.detect)
    assert thresholds.query_threshold(detection, [toy]) in thresholds.GRID
    assert thresholds.like_threshold(detection, [toy]) in thresholds.GRID


def test_what_was_trained_replaces_the_weights(tmp_path):
    from edge_rsvlm.export.default.train import STAGES, adopt

    for stage in STAGES:
        (tmp_path / "work" / stage).mkdir(parents=True)
        for name in ("artifact.json", "weights.safetensors"):
            (tmp_path / "work" / stage / name).write_text(f"new {stage}")
    (tmp_path / "weights" / STAGES[-1]).mkdir(parents=True)
    for name in ("thresholds.json", f"{STAGES[-1]}/artifact.json", f"{STAGES[-1]}/of_an_older_stage"):
        (tmp_path / "weights" / name).write_text("old")
    adopt(tmp_path / "work", tmp_path / "weights")
    texts = {p.relative_to(tmp_path / "weights").as_posix(): p.read_text() for p in tmp_path.glob("weights/*/*")}
    kept = {f"{stage}/{name}" for stage in STAGES for name in ("artifact.json", "weights.safetensors")}
    assert set(texts) == kept - {"backbone/weights.safetensors"} and "old" not in texts.values()
    assert (tmp_path / "weights" / "thresholds.json").exists()


def test_thresholds_belong_to_the_weights(stages, tmp_path):
    made = [artifact.load(stages / name) for name in CUT_STAGES]
    assert read_thresholds(stages, made) == CUTS
    other = artifact.Artifact(stages, made[0].manifest | {"hash": "0" * 64})
    with pytest.raises(InputError, match="other weights"):
        read_thresholds(stages, [other, *made[1:]])
    for text in ("{", '{"detect": 0.3}', "[]"):
        (tmp_path / "thresholds.json").write_text(text)
        with pytest.raises(InputError, match="thresholds chooses them"):
            read_thresholds(tmp_path, made)


def test_the_packaged_bundle_cuts_scores_where_the_weights_say():
    weights = Path(artifact.__file__).parent / "default" / "weights"
    if not is_stages(weights):
        pytest.skip("needs weights: the stages are not installed")
    stored = [artifact.load(weights / name) for name in CUT_STAGES]
    chosen, tasks = read_thresholds(weights, stored), load_bundle().manifest.tasks
    found = Thresholds(tasks.detect.score_threshold, tasks.detect.like.threshold, tasks.change.threshold)
    assert found == dataclasses.replace(chosen, change_by_others={})
