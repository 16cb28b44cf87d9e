"""The command line: exit codes, one line per problem, and files that are right."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import rasterio
from click.testing import CliRunner
from PIL import Image

import edge_rsvlm.cli
from edge_rsvlm.budget import MIB
from edge_rsvlm.errors import EdgeRsvlmError
from edge_rsvlm.pipeline.session import Session
from tests.fakes import fake_engine, write_bundle
from tests.scenes import SIZE, SQUARES, UTM, pixels, write


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a verb with the fake bundle; returns (exit code, stdout, stderr)."""
    write_bundle(tmp_path / "bundle")
    init = Session.__init__
    monkeypatch.setattr(
        Session, "__init__", lambda self, *a, **k: init(self, *a, **({"engine_factory": fake_engine} | k))
    )

    def call(verb, *arguments, bundle=True):
        options = ["--bundle", str(tmp_path / "bundle"), "--allow-unsigned"] if bundle else []
        done = CliRunner().invoke(edge_rsvlm.cli.cli, [verb, *map(str, arguments), *options])
        if isinstance(done.exception, EdgeRsvlmError):  # main() makes a line and a code of it
            return done.exception.exit_code, done.stdout, f"error: {done.exception}"
        if done.exception and not isinstance(done.exception, SystemExit):
            raise done.exception
        return done.exit_code, done.stdout, done.stderr

    return call


@pytest.fixture
def scene(tmp_path):
    return write(tmp_path / "scene ü.tif", pixels(), **UTM)


def test_json_has_boxes_in_pixels_and_geojson_places(run, scene, tmp_path):
    code, out, err = run("detect", scene, "--json", "--output", tmp_path / "out.geojson")
    assert (code, err) == (0, "")
    record = json.loads(out)
    assert record["image"] == str(scene) and record["coverage"] == 1
    assert sorted(tuple(d["box"]) for d in record["detections"]) == sorted((c, r, s, s) for c, r, s in SQUARES)
    assert {d["label"] for d in record["detections"]} == {"square"}
    features = json.loads((tmp_path / "out.geojson").read_text())["features"]
    assert len(features) == len(SQUARES)
    for feature in features:
        assert "crs" not in feature["properties"] and feature["properties"]["image"] == str(scene)
        assert all(14.9 < lon < 15.1 and 47 < lat < 48 for lon, lat in feature["geometry"]["coordinates"][0])


def test_text_for_people(run, scene):
    assert run("detect", scene)[1] == f"{scene}: {len(SQUARES)} square\n"
    assert run("detect", scene, "--query", "car")[1] == f"{scene}: nothing found\n"


def test_a_wrong_word_is_wrong_usage_and_the_nearest_is_named(run, scene):
    code, _, err = run("detect", scene, "--query", "sqare")
    assert code == 2 and "did you mean 'square'" in err


def test_one_bad_input_does_not_stop_the_others(run, scene, tmp_path):
    (tmp_path / "bad.tif").write_text("no image")
    (tmp_path / "empty").mkdir()
    code, out, err = run("detect", tmp_path / "bad.tif", scene, tmp_path / "empty", tmp_path / "no.png", "--json")
    assert code == 3
    assert [json.loads(line)["image"] for line in out.splitlines()] == [str(scene)]
    lines = err.splitlines()
    assert len(lines) == 3 and all(line.startswith("error: ") for line in lines)
    for name, line in zip(("bad.tif", "empty", "no.png"), lines, strict=True):
        assert name in line


def test_many_inputs_write_one_file_each_and_none_for_the_failed(run, scene, tmp_path):
    (tmp_path / "bad.tif").write_text("no image")
    write(tmp_path / "plain.png", pixels(), "PNG")
    code, _, _ = run("detect", scene, tmp_path / "bad.tif", tmp_path / "plain.png", "--output", tmp_path / "out")
    assert code == 3
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["plain.geojson", "scene ü.geojson"]
    (first, *_) = json.loads((tmp_path / "out/plain.geojson").read_text())["features"]
    assert first["properties"]["crs"] is None


def test_a_scene_off_earth_is_in_pixels(run, tmp_path):
    wkt = 'LOCAL_CS["site",UNIT["metre",1]]'
    path = write(tmp_path / "a.tif", pixels(), crs=wkt, transform=UTM["transform"])
    code, out, err = run("detect", path, "--json", "--output", tmp_path / "o.geojson")
    assert code == 0 and "not on Earth" in err and "not on Earth" in json.loads(out)["warnings"][0]
    assert json.loads((tmp_path / "o.geojson").read_text())["features"][0]["properties"]["crs"] is None


def test_refusal_says_the_numbers_and_what_would_fit(run, scene, tmp_path, monkeypatch):
    # This process grows from test to test; that of a user starts anew, a little larger or smaller.
    init, starts = Session.__init__, iter((100 * MIB, 101 * MIB))
    monkeypatch.setattr(Session, "__init__", lambda self, *a, **k: init(self, *a, _base_bytes=next(starts), **k))
    code, out, err = run("detect", scene, "--memory", "1MiB", "--output", tmp_path / "o.geojson")
    assert (code, out) == (4, "") and not (tmp_path / "o.geojson").exists()
    fits = re.search(r"give --memory (\S+)", err).group(1)
    assert run("detect", scene, "--memory", fits)[0] == 0


def test_refusal_comes_before_a_bad_input_and_that_before_a_deadline(run, scene, tmp_path):
    (tmp_path / "bad.tif").write_text("no image")
    assert run("detect", tmp_path / "bad.tif", scene, "--memory", "1MiB")[0] == 4
    assert run("detect", tmp_path / "bad.tif", scene, "--deadline", "1ms")[0] == 3


def test_a_deadline_gives_a_partial_result_and_its_coverage(run, scene):
    code, out, err = run("detect", scene, "--deadline", "1ms", "--json")
    record = json.loads(out)
    assert code == 6 and record["coverage"] == 0 and record["skipped_tiles"] == {"deadline": len_grid()}
    assert "deadline reached, 0.0% of the valid area" in err


def len_grid():
    """Tiles of 128 with steps of 64 over the scene."""
    return int(np.prod([-(-(side - 128) // 64) + 1 for side in SIZE]))


def test_a_bundle_that_is_not_trusted_or_altered_is_five(run, scene, tmp_path):
    assert run("detect", scene, "--bundle", tmp_path / "bundle", bundle=False)[0] == 5
    (tmp_path / "bundle" / "encoder.onnx").write_bytes(b"\x08\x09")
    code, _, err = run("detect", scene)
    assert code == 5 and "does not match its hash" in err


def test_wrong_usage_is_two(run, scene, tmp_path):
    assert run("detect")[0] == 2
    assert run("detect", scene, scene, "--output", tmp_path / "one.geojson")[0] == 2
    assert run("detect", scene, "--memory", "lots")[0] == 2
    (tmp_path / "file").write_text("")
    assert run("detect", scene, "--output", tmp_path / "file" / "x.geojson")[0] == 2


def test_change_writes_polygons_and_a_mask_on_the_grid_of_after(run, tmp_path):
    before = write(tmp_path / "before.tif", pixels(()), **UTM)
    image = pixels(((64, 64, 32),))
    image[:, :20] = 0
    after = write(tmp_path / "after.tif", image, nodata=0, **UTM)
    code, out, err = run(
        "change", before, after, "--json", "--output", tmp_path / "o.geojson", "--mask", tmp_path / "m.tif"
    )
    assert code == 0 and "could not be checked" in err, "of one square and nothing else"
    record = json.loads(out)
    (found,) = record["changes"]
    assert (record["before"], record["after"]) == (str(before), str(after))
    assert found["area_px"] == pytest.approx(1024, abs=70) and found["polygon"]["type"] == "Polygon"
    assert record["changed_fraction"] == pytest.approx(found["area_px"] / (340 * 280), rel=1e-3)
    with rasterio.open(tmp_path / "m.tif") as mask, rasterio.open(after) as grid:
        assert (mask.transform, mask.crs, mask.shape, mask.nodata) == (grid.transform, grid.crs, grid.shape, 255)
        values = mask.read(1)
    assert (values[:20] == 255).all() and (values[20:] != 255).all() and (values == 1).sum() == found["area_px"]
    (feature,) = json.loads((tmp_path / "o.geojson").read_text())["features"]
    assert "polygon" not in feature["properties"] and feature["properties"]["area_m2"] == found["area_m2"]


def test_folders_of_two_dates_pair_by_name(run, tmp_path):
    for date in ("2018", "2020"):
        (tmp_path / date).mkdir()
        for name in ("a.tif", "b.tif"):
            write(tmp_path / date / name, pixels(()), **UTM)
    code, out, _ = run("change", tmp_path / "2018", tmp_path / "2020", "--json", "--mask", tmp_path / "masks")
    assert code == 0 and len(out.splitlines()) == 2
    assert sorted(p.name for p in (tmp_path / "masks").iterdir()) == ["a.tif", "b.tif"]
    (tmp_path / "2020" / "b.tif").unlink()
    (tmp_path / "2020" / "c.tif").write_text("x")
    code, _, err = run("change", tmp_path / "2018", tmp_path / "2020")
    assert code == 2 and "in only one of" in err


def test_a_folder_as_a_date_without_images_is_an_input_error(run, scene, tmp_path):
    (tmp_path / "empty").mkdir()
    assert run("change", scene, tmp_path / "empty")[0] == 3


@pytest.mark.parametrize("mode", ["RGBA", "LA", "L", "P"])
def test_pictures_of_any_kind(run, tmp_path, mode):
    Image.fromarray(np.moveaxis(pixels(), 0, -1)).convert(mode).save(tmp_path / "a.png")
    code, out, _ = run("detect", tmp_path / "a.png", "--json")
    assert code == 0 and len(json.loads(out)["detections"]) == len(SQUARES)
