"""What graphs are fed while a bundle runs over images, and how like those images are to others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch: not installed")
pytest.importorskip("transformers", reason="needs transformers: not installed")
onnx = pytest.importorskip("onnx", reason="needs onnx: not installed")

from PIL import Image  # noqa: E402

import edge_rsvlm  # noqa: E402
from edge_rsvlm.bundle import load_bundle  # noqa: E402
from edge_rsvlm.export.quantize.calibration import record  # noqa: E402
from edge_rsvlm.export.quantize.likeness import likeness, resolution_warning  # noqa: E402
from edge_rsvlm.export.quantize.settings import CalibrationImages  # noqa: E402
from edge_rsvlm.pipeline.session import Limits, Session  # noqa: E402
from edge_rsvlm.raster.inputs import list_inputs  # noqa: E402
from tests import fakes  # noqa: E402

SCENES = Path(edge_rsvlm.__file__).parent / "scenes"


@pytest.fixture
def images(tmp_path):
    """Six of four tiles each, too dark for the fake detector to find anything."""
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for index in range(6):
        Image.fromarray(rng.integers(0, 100, (160, 160, 3), np.uint8)).save(tmp_path / "images" / f"{index}.png")
    return CalibrationImages(images=tmp_path / "images", count=6)


def recorded(folder, name, images, **how):
    bundle = load_bundle(fakes.write_bundle(folder / "bundle"), allow_unsigned=True)
    samples, calibration = record(bundle, images, folder / name, lambda *_: None, fakes.FakeEngine(), **how)
    return (
        samples,
        calibration,
        {str(p.relative_to(folder / name)): p.read_bytes() for p in sorted((folder / name).rglob("*.npz"))},
    )


def test_calibration_is_what_graphs_were_fed_and_the_same_twice(images, tmp_path):
    samples, calibration, first = recorded(tmp_path, "a", images)
    _, again, second = recorded(tmp_path, "b", images)
    assert first == second and calibration == again
    assert list(calibration.images) == [f"{images.images[0].name}/{index}.png" for index in range(6)], (
        "not where they lie"
    )
    assert set(samples.of("encoder")[0]) == {"pixels"} and set(samples.of("change")[0]) == {"earlier", "later"}
    encoder = samples.of("encoder")
    assert all(call["pixels"].dtype == np.float32 and call["pixels"].shape == (1, 5, 128, 128) for call in encoder)
    heads = [call["first"] for call in samples.of("detect")]
    assert any(np.array_equal(heads[0], call["pixels"]) for call in encoder)  # the fake encoder gives the tile itself


def test_calibration_keeps_to_its_disk(images, tmp_path):
    samples, _, everything = recorded(tmp_path, "all", images)
    size = sum(len(data) for name, data in everything.items() if name.startswith("encoder"))
    bound = size // 3
    few, _, kept = recorded(tmp_path, "few", images, most_bytes=bound)
    assert 0 < sum(len(data) for name, data in kept.items() if name.startswith("encoder")) <= bound
    assert 0 < len(few.of("encoder")) < len(samples.of("encoder"))
    assert kept.items() <= everything.items()


def test_likeness_of_images():
    session = Session(load_bundle(), Limits(1 << 32))
    sources = sorted(list_inputs([str(SCENES)]), key=lambda source: source.name)
    photos, flights = ([s for s in sources if s.name.endswith(end)] for end in ("webp", "tif"))
    assert likeness(session, photos, photos) == 0
    assert likeness(session, photos, flights) > 0.1
    assert resolution_warning(session, photos) is None


def test_images_that_judge_do_not_calibrate(images, tmp_path):
    (tmp_path / "held_out.txt").write_text("# never calibrated on\n2.png\n4.png\n")
    allowed = images.model_copy(update={"without": (tmp_path / "held_out.txt",)})
    _, calibration, _ = recorded(tmp_path, "some", allowed)
    assert [Path(name).name for name in calibration.images] == ["0.png", "1.png", "3.png", "5.png"]
