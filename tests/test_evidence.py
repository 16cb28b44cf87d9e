"""The evidence of changes: labels of both dates, the spectrum, a sentence, and pictures, within memory and time."""

from __future__ import annotations

import hashlib
import json
import os
import shutil

import numpy as np
import pytest
import rasterio
from click.testing import CliRunner
from PIL import Image
from rasterio.enums import ColorInterp
from rasterio.transform import Affine
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

import edge_rsvlm.cli
from edge_rsvlm.alerts.tracks import Tracks
from edge_rsvlm.bundle import load_bundle
from edge_rsvlm.config.cover import BURNT, COVER, LOST, UNKNOWN
from edge_rsvlm.config.rules import Rule, Rules, load_rules
from edge_rsvlm.engines.fake import FakeSession
from edge_rsvlm.errors import UsageError
from edge_rsvlm.pipeline import evidence as evidence_module
from edge_rsvlm.pipeline import looks
from edge_rsvlm.pipeline.alerting import compare, scene_time
from edge_rsvlm.pipeline.covers import Covers
from edge_rsvlm.pipeline.looks import filled, parts
from edge_rsvlm.pipeline.runtime import Runtime
from edge_rsvlm.pipeline.session import Limits, Session
from edge_rsvlm.pipeline.views import scene_view
from edge_rsvlm.planning import plan_pair
from edge_rsvlm.raster.inputs import Source
from edge_rsvlm.raster.reader import open_raster
from tests.fakes import CONTENT, FakeEngine, graph, manifest
from tests.scenes import UTM, write

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
SIZE = (340, 300)
COLOURS = {"trees": (0, 255, 0), "bare soil": (255, 0, 0), "water": (0, 0, 255), "pavement": (255, 0, 255)}
GREY, GREEN, RED = (60, 60, 60, 60), (10, 60, 10, 220), (200, 60, 20, 60)
"""Red, green, blue, near infrared; what chlorophyll does, and what it does not."""
SQUARE = (64, 96, 40)
"""col, row, side."""
GRAPHS = {
    "seen": ({"tiles": "pixels"}, {"rgb": "rgb"}),
    "cells": ({"rgb": "rgb"}, {"embeddings": "meant"}),
    "words": ({"input_ids": "ids"}, {"embedding": "meant"}),
}
WORDS = ["[PAD]", *dict.fromkeys(word for words in COVER.values() for text in words for word in text.split())]
SEGMENT = {
    "encoder": "seen", "head": "cells", "encoder_outputs": ["rgb"],
    "text": {"graph": "words", "tokenizer": {"file": "tokenizer.json", "add_special_tokens": False, "pad_to": 2}},
    "label_prompt": "{label}", "logit_scale": 40.0, "logit_bias": -36.0, "stride": 4, "threshold": 0.5,
    "min_area_m2": 0, "min_area_px": 1,
}  # fmt: skip


class Engine(FakeEngine):
    """Tells ground by its colour: a cell's mean red, green and blue, each of which one label means."""

    def open(self, graph):
        known = {"seen": _seen, "cells": _cells, "words": _words}
        return FakeSession(known[graph.stem]) if graph.stem in known else super().open(graph)


def _seen(inputs):
    return {"rgb": (inputs["pixels"][:, :3] + 1) / 2}


def _cells(inputs):
    n, c, h, w = inputs["rgb"].shape
    return {"meant": inputs["rgb"].reshape(n, c, h // 4, 4, w // 4, 4).mean(axis=(3, 5))}


def _words(inputs):
    named = {tuple(label.split()): np.array(rgb) / 255 for label, rgb in COLOURS.items()}
    said = [tuple(WORDS[i] for i in row if i) for row in inputs["ids"]]
    return {"meant": np.array([named.get(words, -np.ones(3)) for words in said], np.float32)}


def write_bundle(folder, *, segment=True, session_bytes=1 << 20, **spec):
    folder.mkdir()
    data = manifest(resolution_m=[0.1, 2.0], **spec)
    data["tasks"].pop("detect"), data["graphs"].pop("detect")
    if segment:
        tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[PAD]"))
        tokenizer.pre_tokenizer = WhitespaceSplit()
        tokenizer.save(str(folder / "tokenizer.json"))
        memory = {"session_bytes": session_bytes, "tile_bytes": 1 << 20}
        data["tasks"]["segment"] = SEGMENT | {"input": data["tasks"]["change"]["input"], "memory": memory}
        data["graphs"] |= {name: graph(name, *sides) for name, sides in GRAPHS.items()}
    for name in (*(f"{name}.onnx" for name in data["graphs"]), "probe.npz"):
        (folder / name).write_bytes(CONTENT)
    data["files"] = {
        path.name: {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "bytes": path.stat().st_size}
        for path in folder.iterdir()
    }
    (folder / "manifest.json").write_text(json.dumps(data))
    return folder


def scene(path, *squares, bands=4, interpretation=True, dtype=np.uint8, georeference=UTM, ground=GREY, size=SIZE):
    """Grey ground with squares (col, row, side, colour)."""
    image = np.empty((4, size[1], size[0]), dtype)
    image[:] = np.array(ground, dtype)[:, None, None]
    for col, row, side, colour in squares:
        image[:, row : row + side, col : col + side] = np.array(colour, dtype)[:, None, None]
    write(path, image[:bands], **georeference)
    with rasterio.open(path, "r+") as out:
        names = (ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.undefined)
        unnamed = (ColorInterp.gray, *[ColorInterp.undefined] * 3)
        out.colorinterp = (names if interpretation else unnamed)[:bands]
    return path


@pytest.fixture
def bundle(tmp_path):
    return write_bundle(tmp_path / "bundle")


@pytest.fixture
def dates(tmp_path):
    return scene(tmp_path / "before.tif", (*SQUARE, GREEN)), scene(tmp_path / "after.tif", (*SQUARE, RED))


def session(bundle, **limits):
    loaded = load_bundle(bundle, allow_unsigned=True)
    engine = lambda threads, arena: Engine()  # noqa: E731
    return Session(loaded, Limits(**({"memory_bytes": 8 << 30} | limits)), engine_factory=engine)


def compared(bundle, dates, rules=None, crops=None, **limits):
    """(changes, comparison)."""
    before, after = (Source(path.name, str(path)) for path in dates)
    found = []
    result = compare(
        session(bundle, **limits), before, after, lambda record, _: found.append(record),
        rules=rules, tracks=None, when="2024-05-01T10:00:00Z", crops=crops,
    )  # fmt: skip
    return found, result


# --- a change is told -----------------------------------------------------------------------------------------------


def test_a_change_says_what_was_lost_and_what_came(bundle, dates):
    (found,), result = compared(bundle, dates)
    assert (found["from"], found["to"]) == ("trees", "bare soil")
    spectral = found["spectral"]
    # Of 8-bit values (220 - 10) / 230 and (60 - 200) / 260; nothing else changed, so that matching changes little.
    assert spectral["ndvi"]["after"] == pytest.approx(-0.54, abs=0.1)
    assert spectral["ndvi"]["before"] > 0.6 and spectral["meaning"] == LOST and spectral["share"] == 1.0
    assert spectral["ndvi"]["difference"] == pytest.approx(
        spectral["ndvi"]["after"] - spectral["ndvi"]["before"], abs=0.011
    )
    assert "nbr" not in spectral
    fell, area = -spectral["ndvi"]["difference"], f"{float(format(found['area_m2'], '.3g')):,g}"
    assert found["sentence"] == (f"About {area} m2 of trees became bare soil; the vegetation index fell by {fell:.2f}.")
    assert "crops" not in found and result.alerts == [] and result.outcome.timing_s["evidence"] > 0


def test_ground_that_is_told_with_doubt_is_unknown(bundle, tmp_path):
    mixed = (200, 190, 20, 60)  # red and green alike: no margin
    dates = scene(tmp_path / "a.tif", (*SQUARE, mixed)), scene(tmp_path / "b.tif", (*SQUARE, (0, 0, 0, 0)))
    (found,), _ = compared(bundle, dates)
    assert (found["from"], found["to"]) == (UNKNOWN, UNKNOWN)


def test_a_roof_and_a_car_park_are_sealed_ground(bundle, tmp_path):
    dates = scene(tmp_path / "a.tif", (*SQUARE, GREEN)), scene(tmp_path / "b.tif", (*SQUARE, (240, 10, 240, 240)))
    (found,), _ = compared(bundle, dates)
    assert (found["from"], found["to"]) == ("trees", "sealed ground")


def test_without_a_segment_task_the_spectrum_speaks(tmp_path, dates):
    (found,), _ = compared(write_bundle(tmp_path / "plain", segment=False), dates)
    assert (found["from"], found["to"]) == (UNKNOWN, UNKNOWN) and found["spectral"]["meaning"] == LOST
    assert " m2 changed; the vegetation index fell" in found["sentence"]


def coarse(metres):
    return UTM | {"transform": Affine(metres, 0, 500_000, 0, -metres, 5_300_000)}


@pytest.mark.parametrize("place", [coarse(2.6), {}])
def test_labels_are_unknown_where_pixels_are_too_coarse_or_of_unknown_size(bundle, tmp_path, place):
    squares = [(*SQUARE, GREEN)], [(*SQUARE, RED)]
    dates = [scene(tmp_path / f"{n}.tif", *each, georeference=place) for n, each in enumerate(squares)]
    rules = Rules((Rule.model_validate({"name": "forest", "from": ["trees"]}),))
    found, result = compared(bundle, dates, rules)
    assert {(each["from"], each["to"]) for each in found} == {(UNKNOWN, UNKNOWN)} and not result.alerts
    assert any("rule 'forest' asks what the ground was" in text for text in result.outcome.warnings)


@pytest.mark.parametrize("metres", [0.06, 2.4])
def test_finer_pixels_are_brought_to_what_the_task_knows(bundle, tmp_path, metres):
    squares = [(60, 60, 160, GREEN)], [(60, 60, 160, RED)]
    dates = [scene(tmp_path / f"{n}.tif", *each, georeference=coarse(metres)) for n, each in enumerate(squares)]
    found, _ = compared(bundle, dates)
    assert {(each["from"], each["to"]) for each in found} == {("trees", "bare soil")}


def test_three_bands_have_no_spectrum(bundle, tmp_path):
    dates = scene(tmp_path / "a.tif", (*SQUARE, GREEN), bands=3), scene(tmp_path / "b.tif", (*SQUARE, RED), bands=3)
    (found,), _ = compared(bundle, dates)
    assert "spectral" not in found and found["from"] == "trees"


def test_bands_without_names_are_not_measured(bundle, tmp_path):
    """The usual order is a guess: an index of guessed bands would be told as a fact."""
    squares = (*SQUARE, GREEN), (*SQUARE, RED)
    dates = [scene(tmp_path / f"{n}.tif", each, interpretation=False) for n, each in enumerate(squares)]
    found, result = compared(bundle, dates)
    assert found and not any("spectral" in each for each in found)
    assert any("do not say which band is red" in text for text in result.outcome.warnings)


def test_a_scene_without_coordinates_is_told_in_pixels(bundle, tmp_path):
    dates = [scene(tmp_path / f"{n}.tif", (*SQUARE, colour), georeference={}) for n, colour in enumerate((GREEN, RED))]
    (found,), result = compared(bundle, dates, Rules((Rule(name="any"),)))
    area = f"{float(format(found['area_px'], '.3g')):,.0f}"
    assert found["area_m2"] is None and found["sentence"].startswith(f"About {area} pixels changed; ")
    assert result.alerts[0].geometry is None


def test_short_wave_infrared_tells_fire(bundle, tmp_path):
    """Sentinel-2 names bands: B12 makes the burn ratio."""
    paths = []
    for name, colour in (("before", (300, 600, 500, 3000, 800)), ("after", (250, 300, 400, 900, 2200))):
        image = np.empty((5, SIZE[1], SIZE[0]), np.uint16)
        image[:] = np.array((900, 900, 900, 1800, 1800))[:, None, None]
        image[:, 96:136, 64:104] = np.array(colour)[:, None, None]
        paths.append(write(tmp_path / f"{name}.tif", image, **UTM))
        with rasterio.open(paths[-1], "r+") as out:
            out.descriptions = ("B04", "B03", "B02", "B08", "B12")
    # The fake sees red only: give it a change of red of more than half its range.
    with rasterio.open(paths[1], "r+") as out:
        red = out.read(1)
        red[96:136, 64:104] = 3900
        out.write(red, 1)
    (found,), _ = compared(bundle, paths)
    nbr = found["spectral"]["nbr"]
    assert nbr["before"] > 0.3 and nbr["after"] < -0.2 and found["spectral"]["meaning"] == BURNT


# --- which pixels ---------------------------------------------------------------------------------------------------


def ring(*corners):
    return [[float(x), float(y)] for x, y in (*corners, corners[0])]


def test_parts_hold_every_pixel_of_a_region_once(monkeypatch):
    monkeypatch.setattr(looks, "CELL_PX", 16)
    outside, hole = ring((3, 5), (70, 5), (70, 60), (3, 60)), ring((10, 10), (10, 40), (33, 40), (33, 10))
    polygon = {"type": "MultiPolygon", "coordinates": [[outside, hole], [ring((80, 2), (83, 2), (83, 99), (80, 99))]]}
    seen = np.zeros((100, 90), int)
    for part in parts(polygon):
        window = part.window
        assert max(window.width, window.height) <= 16
        seen[window.row : window.row + window.height, window.col : window.col + window.width] += part.inside_HW
    expected = np.zeros((100, 90), int)
    expected[5:60, 3:70], expected[10:40, 10:33], expected[2:99, 80:83] = 1, 0, 1
    np.testing.assert_array_equal(seen, expected)
    np.testing.assert_array_equal(filled(polygon, (90, 100), Affine.identity()), expected)


def test_of_a_large_region_a_bounded_part_is_measured(bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(looks, "CELL_PX", 16)
    monkeypatch.setattr(looks, "MOST_CELLS", 4)
    large = (20, 20, 200)
    dates = scene(tmp_path / "a.tif", (*large, GREEN)), scene(tmp_path / "b.tif", (*large, RED))
    (found,), _ = compared(bundle, dates)
    assert 0 < found["spectral"]["share"] < 0.05 and found["spectral"]["meaning"] == LOST


def test_the_earlier_date_is_looked_at_where_it_shows_the_same_ground(bundle, tmp_path):
    path = scene(tmp_path / "a.tif", (80, 96, 8, GREEN))
    polygon = {"type": "Polygon", "coordinates": [ring((64, 96), (72, 96), (72, 104), (64, 104))]}
    loaded = load_bundle(bundle, allow_unsigned=True)
    with open_raster(str(path)) as raster:
        task = loaded.manifest.tasks.segment
        covers = Covers(Runtime(loaded, Engine()), task, scene_view((raster,), task.input, None), tuple(COVER), 1)
        assert covers(polygon, 64) == UNKNOWN and covers(polygon, 64, (16.0, 0.0)) == "trees"


# --- pictures -------------------------------------------------------------------------------------------------------


def test_pictures_show_both_dates_with_an_outline(bundle, dates, tmp_path):
    (found,), _ = compared(bundle, dates, crops=tmp_path / "new" / "crops")
    before, after = (Image.open(path).convert("RGB") for path in found["crops"])
    assert [path.rpartition("/")[2] for path in found["crops"]] == [
        f"{found['id']}.before.webp", f"{found['id']}.after.webp"
    ]  # fmt: skip
    for picture, colour in ((before, GREEN), (after, RED)):
        assert max(picture.size) == 256
        pixels_HW3 = np.asarray(picture).astype(int)
        middle = pixels_HW3[picture.height // 2, picture.width // 2]
        np.testing.assert_allclose(middle, colour[:3], atol=12)
        bright = (pixels_HW3[..., 0] > 170) & (pixels_HW3[..., 1] > 130)
        assert 500 < bright.sum() < 4000  # a line around, not a patch
    assert sorted(p.name for p in (tmp_path / "new" / "crops").iterdir()) == sorted(
        path.rpartition("/")[2] for path in found["crops"]
    )


def test_a_picture_at_the_corner_of_a_scene(bundle, tmp_path):
    corner = (0, 0, 12)
    dates = scene(tmp_path / "a.tif", (*corner, GREEN)), scene(tmp_path / "b.tif", (*corner, RED))
    (found,), _ = compared(bundle, dates, crops=tmp_path / "crops")
    assert all(max(Image.open(path).size) == 256 for path in found["crops"])


def test_a_folder_that_cannot_be_made_is_a_usage_error(bundle, dates, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot write"):
        compared(bundle, dates, crops=tmp_path / "file" / "crops")


# --- memory, time, and the same ids ---------------------------------------------------------------------------------


def test_ids_follow_the_scenes_and_not_their_folder(bundle, dates, tmp_path):
    (tmp_path / "moved").mkdir()
    moved = [shutil.copy(path, tmp_path / "moved" / path.name) for path in dates]
    rules = Rules((Rule(name="any"),))
    (first,), told = compared(bundle, dates, rules)
    (again,), told_again = compared(bundle, moved, rules)
    assert again["id"] == first["id"] and told.alerts[0].id == told_again.alerts[0].id
    renamed = shutil.copy(dates[1], tmp_path / "another.tif")
    (other,), told_other = compared(bundle, (dates[0], renamed), rules)
    assert other["polygon"] == first["polygon"] and other["id"] != first["id"]
    assert told_other.alerts[0].id != told.alerts[0].id


def test_labels_that_do_not_fit_are_left_out_and_said(tmp_path, dates):
    heavy = write_bundle(tmp_path / "heavy", session_bytes=1 << 30)
    plan = plan_pair(session(heavy), *map(str, dates)).plan
    assert plan is not None and plan.engine_bytes > 1 << 30
    (found,), result = compared(heavy, dates, memory_bytes=plan.total_bytes - (600 << 20))
    assert (found["from"], found["to"]) == (UNKNOWN, UNKNOWN) and found["spectral"]["meaning"] == LOST
    assert any("what the ground was and is stays unknown: " in text for text in result.outcome.warnings)
    (found,), result = compared(heavy, dates, memory_bytes=plan.total_bytes + (64 << 20))
    assert found["from"] == "trees" and not any("stays unknown" in text for text in result.outcome.warnings)


def test_evidence_has_its_share_of_a_deadline(bundle, dates, monkeypatch):
    monkeypatch.setattr(evidence_module, "EVIDENCE_SHARE", 0.0)
    (found,), result = compared(bundle, dates, deadline_s=60.0)
    assert result.outcome.complete and "spectral" not in found and found["from"] == UNKNOWN
    assert found["sentence"].endswith(" m2 changed.") and len(found["id"]) == 16
    assert "evidence of 1 changes was left out: there was no time for it" in result.outcome.warnings
    (found,), _ = compared(bundle, dates)
    assert found["from"] == "trees"  # without a deadline there is no share


def test_evidence_does_not_depend_on_batches_or_windows(bundle, tmp_path, monkeypatch):
    squares = [(30 + 70 * i, 20 + 65 * j, 24) for i in range(4) for j in range(4)]
    dates = [scene(tmp_path / f"{c[0]}.tif", *((*each, c) for each in squares)) for c in (GREEN, RED)]
    whole, _ = compared(bundle, dates)
    monkeypatch.setattr("edge_rsvlm.budget.BATCHES", (1,))
    monkeypatch.setattr("edge_rsvlm.budget.READ_PIXELS", (1,))
    monkeypatch.setattr("edge_rsvlm.pipeline.covers.TILES_KEPT", 1)
    assert compared(bundle, dates)[0] == whole and len(whole) == 16


# --- rules over scenes ----------------------------------------------------------------------------------------------


def test_classes_that_a_bundle_cannot_tell_are_refused(tmp_path, dates):
    rules = Rules((Rule.model_validate({"name": "forest", "from": ["trees"]}),))
    with pytest.raises(UsageError, match="rule 'forest' waits for 'trees'"):
        compared(write_bundle(tmp_path / "plain", segment=False), dates, rules)


def test_what_persists_over_three_scenes_is_told(bundle, tmp_path):
    first = scene(tmp_path / "0.tif", (*SQUARE, GREEN))
    later = [scene(tmp_path / f"{n}.tif", (*SQUARE, RED)) for n in (1, 2)]
    rules, tracks, told = Rules((Rule(name="lasting", persistence=2),)), Tracks(), []
    for number, path in enumerate(later, 1):
        result = compare(
            session(bundle), Source("0.tif", str(first)), Source(path.name, str(path)), lambda *_: None,
            rules=rules, tracks=Tracks.of(tracks.rows()), when=f"2024-05-{number:02d}", crops=None,
        )  # fmt: skip
        tracks = result.tracks
        told.append((len(result.alerts), result.pending))
    assert told == [(0, {"lasting": 1}), (1, {})]


def test_a_time_that_is_none_is_refused_before_any_work(bundle, dates):
    before, after = (Source(path.name, str(path)) for path in dates)
    with pytest.raises(UsageError, match="is no time"):
        compare(
            session(bundle), before, after, lambda *_: pytest.fail("worked"),
            rules=Rules((Rule(name="any"),)), tracks=None, when="now", crops=None,
        )  # fmt: skip


def test_the_time_of_a_scene_is_its_own_or_that_of_its_file(tmp_path):
    path = scene(tmp_path / "a.tif")
    os.utime(path, (1_700_000_000, 1_700_000_000))
    assert scene_time(Source("a.tif", str(path))) == "2023-11-14T22:13:20Z"
    with rasterio.open(path, "r+") as out:
        out.update_tags(ACQUISITIONDATETIME="2020-06-01T10:12:33Z")
    assert scene_time(Source("a.tif", str(path))) == "2020-06-01T10:12:33Z"


# --- the verb -------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(bundle, monkeypatch):
    init = Session.__init__
    engine = lambda threads, arena: Engine()  # noqa: E731
    monkeypatch.setattr(Session, "__init__", lambda self, *a, **k: init(self, *a, **({"engine_factory": engine} | k)))

    def call(*arguments):
        command = ["change", *map(str, arguments), "--bundle", str(bundle), "--allow-unsigned"]
        done = CliRunner().invoke(edge_rsvlm.cli.cli, command, catch_exceptions=False)
        return done.exit_code, done.stdout, done.stderr

    return call


RULES = """
version = 1
[[rule]]
name = "forest loss"
from = ["trees"]
min_area = "10 m2"
[[rule]]
name = "lasting"
persistence = 2
"""


def test_change_tells_alerts(run, dates, tmp_path):
    (tmp_path / "rules.toml").write_text(RULES)
    files = ("--rule", tmp_path / "rules.toml", "--crops", tmp_path / "crops", "--output", tmp_path / "o.geojson")
    code, out, err = run(*dates, "--json", *files)
    record = json.loads(out)
    (change,), (alert,) = record["changes"], record["alerts"]
    assert code == 0 and record["pending"] == {"lasting": 1}
    assert (alert["rule"], alert["change"], alert["score"]) == ("forest loss", change["id"], change["score"])
    assert alert["sentence"] == change["sentence"] and alert["crops"] == change["crops"]
    assert alert["geometry"]["type"] == "Polygon" and alert["time"].endswith("Z")
    assert "rule 'lasting' wants 2 dates and a pair is one" in err
    (feature,) = json.loads((tmp_path / "o.geojson").read_text())["features"]
    assert feature["properties"]["from"] == "trees" and feature["properties"]["spectral"]["meaning"] == LOST
    assert feature["geometry"] == alert["geometry"]
    code, out, _ = run(*dates, *files)
    line, told = out.splitlines()
    assert code == 0 and line.endswith("of the valid area, 1 alert") and told == f"  forest loss: {change['sentence']}"


def test_change_without_rules_says_nothing_of_alerts(run, dates):
    code, out, _ = run(*dates)
    assert code == 0 and out.endswith("of the valid area\n") and "alert" not in out
    assert json.loads(run(*dates, "--json")[1])["alerts"] == []


# --- the packaged bundle --------------------------------------------------------------------------------------------


def test_real_scenes_are_told_sensibly(needs, tmp_path):
    """A field that was built over, and an industrial site on what was bare before, near Paris in 10 m."""
    folder = needs("data", "oscd/train") / "saclay_e"
    found = []
    (tmp_path / "r.toml").write_text(
        'version = 1\n[[rule]]\nname = "built"\nquery = "vegetation lost"\nmin_area = "1 ha"'
    )
    result = compare(
        Session(load_bundle(None), Limits(8 << 30)),
        Source("t1.tif", str(folder / "t1.tif")), Source("t2.tif", str(folder / "t2.tif")),
        lambda record, _: found.append(record), rules=load_rules(tmp_path / "r.toml"), tracks=None, when="2018",
        crops=tmp_path / "crops",
    )  # fmt: skip
    largest = max(found, key=lambda record: record["area_px"])
    assert largest["spectral"]["meaning"] == LOST and largest["spectral"]["ndvi"]["before"] > 0.45
    assert {record["from"] for record in found} == {UNKNOWN}  # 10 m, and the labels are of 1 m at most
    assert largest["id"] in {alert.record["id"] for alert in result.alerts}
    assert sum(path.stat().st_size for path in (tmp_path / "crops").iterdir()) < 20_000 * 2 * len(found)
