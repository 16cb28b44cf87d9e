"""Two dates in one radiometry, and what bands the two may compare."""

from __future__ import annotations

import numpy as np
import pytest
import rasterio

from edge_rsvlm.pipeline.outcome import Outcome
from edge_rsvlm.pipeline.scaling import scalings
from edge_rsvlm.raster.radiometry import GAIN_RANGE, LEAST_PIXELS, Samples, matched, sample_both
from edge_rsvlm.raster.reader import open_raster
from edge_rsvlm.raster.shift import Shift
from edge_rsvlm.tiles import ABSENT
from tests.fakes import parsed
from tests.scenes import UTM, write

SPEC = parsed().tasks.change.input


def scene(bands, height=700, width=900):
    return np.random.default_rng(1).integers(20, 120, (bands, height, width)).astype(np.uint8)


def test_a_linear_change_of_light_is_undone(tmp_path):
    before = scene(3)
    after = np.clip(before * 1.5 + 9, 0, 255).astype(np.uint8)
    paths = [str(write(tmp_path / f"{i}.tif", image, **UTM)) for i, image in enumerate((before, after))]
    with open_raster(paths[0]) as a, open_raster(paths[1]) as b:
        gain, offset = matched(sample_both(a, b, [0, 1, 2], [0, 1, 2]))
        np.testing.assert_allclose(gain, 1.5, rtol=0.01)
        np.testing.assert_allclose(offset, 9, atol=1)
        first, last = scalings(SPEC, [a, b], Outcome())
    for channel in range(3):
        was, now = before[channel, 5, 5] * first.gain[channel] + first.bias[channel], after[channel, 5, 5]
        assert was == pytest.approx(now * last.gain[channel] + last.bias[channel], abs=0.02)


def test_a_scene_against_itself_is_left_alone():
    values = np.random.default_rng(0).uniform(0, 255, (5000, 3)).astype(np.float32)
    gain, offset = matched(Samples(values, values))
    assert (gain == 1).all() and np.abs(offset).max() < 1e-9


def test_what_changed_clouds_and_saturation_do_not_steer_it():
    """A third of the ground changed, a tenth is under cloud, and the brightest was clipped."""
    rng = np.random.default_rng(3)
    before = rng.normal(100, 20, (20_000, 3))
    after = before * (1.4, 0.8, 1.1) + (10, 20, -15) + rng.normal(0, 2, before.shape)
    after[:6000] = rng.normal(60, 30, (6000, 3))
    after[6000:8000] = 250
    gain, offset = matched(Samples(before.astype(np.float32), np.clip(after, 0, 170).astype(np.float32)))
    np.testing.assert_allclose(gain, (1.4, 0.8, 1.1), rtol=0.03)
    np.testing.assert_allclose(before.mean(axis=0) * gain + offset, (150, 100, 95), atol=1.5)


def test_samples_are_taken_where_both_dates_show_the_same_ground(tmp_path):
    ground = scene(1, 600, 700)
    before, after = ground[:, 20:520, 20:620], ground[:, 15:515, 23:623]
    paths = [str(write(tmp_path / f"{i}.tif", image, **UTM)) for i, image in enumerate((before, after))]
    with open_raster(paths[0]) as a, open_raster(paths[1]) as b:
        samples = sample_both(a, b, [0], [0], Shift((3.2, 0.0, 0.0), (-4.9, 0.0, 0.0)))
        apart = sample_both(a, b, [0], [0])
    np.testing.assert_array_equal(samples.before_NC, samples.after_NC)
    assert 0.9 * len(apart.after_NC) < len(samples.after_NC) < len(apart.after_NC)
    assert (apart.before_NC != apart.after_NC).mean() > 0.9


def test_too_little_or_too_much_is_not_believed():
    few = np.arange(LEAST_PIXELS - 1, dtype=np.float32)[:, None]
    assert matched(Samples(few, 3 * few)) == (1, 0)
    many = np.arange(5000, dtype=np.float32)[:, None]
    assert matched(Samples(many, 50 * many))[0] == GAIN_RANGE[1]
    assert matched(Samples(0 * many, many))[0] == 1


def test_pixels_that_one_date_lacks_do_not_count(tmp_path):
    before, after = scene(1), scene(1)
    after[:, :350] = 0
    paths = [str(write(tmp_path / f"{i}.tif", image, nodata=0, **UTM)) for i, image in enumerate((before, after))]
    with open_raster(paths[0]) as a, open_raster(paths[1]) as b:
        samples = sample_both(a, b, [0], [0])
    np.testing.assert_array_equal(samples.before_NC, samples.after_NC)
    assert len(samples.after_NC) >= LEAST_PIXELS


def test_a_band_of_one_date_alone_is_left_out(tmp_path):
    four = write(tmp_path / "a.tif", scene(4), **UTM)
    with rasterio.open(four, "r+") as data:
        data.descriptions = ("B04", "B03", "B02", "B08")
    three = write(tmp_path / "b.tif", scene(3), **UTM)
    with open_raster(str(four)) as a, open_raster(str(three)) as b:
        first, last = scalings(SPEC, [a, b], Outcome())
        (alone,) = scalings(SPEC, [a], Outcome())
    nir = SPEC.bands.index("nir")
    assert first.bands[nir] == last.bands[nir] == ABSENT and alone.bands[nir] == 3
