"""Three or more dates: what changed is linked into stories, and told as records and as a picture."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from rasterio.transform import Affine

from edge_rsvlm.bundle import load_bundle
from edge_rsvlm.errors import BudgetError, InputError, UsageError
from edge_rsvlm.merge.stories import GRADUAL, MOST_PAIRS, Ledger, different
from edge_rsvlm.pipeline.pictures import timeline_view
from edge_rsvlm.pipeline.series import change_series, ordered
from edge_rsvlm.pipeline.session import Limits, Session
from edge_rsvlm.raster.inputs import list_inputs
from edge_rsvlm.raster.reader import open_raster
from edge_rsvlm.report.timeline import COLOURS, StoryView, TimelineView, timeline, write_timeline
from tests.fakes import fake_engine, write_bundle
from tests.scenes import UTM, write
from tests.wide import runner, use_engine

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
TREES = Path(__file__).parents[2] / "shared/data/naip_trees/train"
SIZE = (340, 300)

# --- cells ----------------------------------------------------------------------------------------------------------


def bits(*pairs):
    return np.uint64(sum(1 << pair for pair in pairs))


@pytest.mark.parametrize(
    "pairs, ended, wanted",
    [
        ((0,), True, [0, 1, 1, 1, 1]),
        ((2,), True, [0, 0, 0, 1, 1]),
        ((1, 2), False, [0, 0, 1, 0, 0]),
        ((0, 3), False, [0, 1, 1, 1, 0]),
        ((0, 1, 2), True, [0, 1, 1, 1, 1]),
        ((0,), False, [0, 1, 1, 1, 0]),  # it went back unseen, by the last date
        ((3,), False, [0, 0, 0, 0, 1]),  # what was just seen to change is believed
        ((), True, [0, 0, 0, 0, 0]),
        ((1, 2), None, [0, 0, 1, 0, 0]),
        ((1,), None, [0, 0, 1, 1, 1]),
    ],
)
def test_on_which_dates_a_cell_differs_from_the_first(pairs, ended, wanted):
    found = different(np.array([bits(*pairs)]), None if ended is None else np.array([ended]), 4)
    assert found.tolist() == wanted


def square(side):
    return np.ones((side, side), bool)


def ring(side, hole):
    mask = square(side)
    at = (side - hole) // 2
    mask[at : at + hole, at : at + hole] = False
    return mask


def patches(ledger):
    return [story.patches for story in ledger.stories()]


def test_patches_that_overlap_or_enclose_go_on_with_one_story():
    ledger = Ledger(60, 60, 4)
    assert ledger.add(0, 20, 20, square(10)) == 0
    assert ledger.add(1, 18, 18, ring(14, 10)) == 1  # a quarry that grows
    assert ledger.add(2, 40, 40, square(8)) == 2
    assert ledger.add(3, 42, 42, square(8)) == 3
    ledger.compared_ends()
    assert patches(ledger) == [(0, 1), (2, 3)]
    (grown, moved) = ledger.stories()
    assert (grown.row, grown.col, grown.cells) == (18, 18, 14 * 14) and moved.cells == 64 + 64 - 36
    np.testing.assert_array_equal(grown.changed_HW(1), ring(14, 10))
    assert grown.changed_HW(0).sum() == 100 and not grown.changed_HW(2).any()


def test_patches_that_touch_at_a_corner_or_of_one_pair_stay_apart():
    ledger = Ledger(60, 60, 2)
    ledger.add(0, 10, 10, square(10))
    ledger.add(0, 10, 20, square(10))  # side by side, of one pair
    ledger.add(1, 20, 30, square(10))  # at a corner
    assert patches(ledger) == [(0,), (1,), (2,)]


def test_patches_at_the_edge_of_the_cells():
    ledger = Ledger(20, 30, 2)
    ledger.add(0, 0, 0, square(6))
    ledger.add(0, 14, 24, square(6))
    ledger.add(1, 0, 0, square(7))
    ledger.add(1, 13, 23, square(7))
    assert patches(ledger) == [(0, 2), (1, 3)]
    assert ledger.add(1, 5, 5, np.zeros((3, 3), bool)) is None


def test_what_no_pair_saw_changed_little_by_little():
    ledger = Ledger(40, 40, 3)
    ledger.add(0, 0, 0, square(10))
    assert ledger.add_overall(0, 0, square(12)) is None  # most of it is known
    assert ledger.add_overall(20, 20, square(10)) == 1
    known, slow = ledger.stories()
    assert known.confirmed == 100 and known.different_D.tolist() == [0, 100, 100, 100]
    assert slow.patches == (1,) and slow.different_D.tolist() == [0, -1, -1, 100] and slow.confirmed == 100


def test_a_later_patch_takes_the_ground_of_one_it_does_not_go_on_with():
    ledger = Ledger(40, 60, 2)
    ledger.add(0, 0, 0, np.ones((30, 30), bool))
    ledger.add(1, 29, 29, square(10))
    first, second = ledger.stories()
    assert first.cells == 899 and second.cells == 100 and second.changed_HW(0).sum() == 1


def test_a_ledger_has_a_bit_for_each_pair():
    with pytest.raises(ValueError, match=str(MOST_PAIRS)):
        Ledger(4, 4, MOST_PAIRS + 1)
    assert GRADUAL < 0


# --- dates ----------------------------------------------------------------------------------------------------------


def scene(path, squares, size=SIZE, place=UTM):
    """Dark ground with bright squares (col, row, side)."""
    rng = np.random.default_rng(3)
    image = rng.integers(30, 70, (3, size[1], size[0])).astype(np.uint8)
    for col, row, side in squares:
        image[:, row : row + side, col : col + side] = 250
    return str(write(path, image, **place))


def sources(*paths):
    return list_inputs([str(path) for path in paths])


def test_dates_are_ordered_by_when_they_were_taken(tmp_path):
    paths = [scene(tmp_path / f"{name}.tif", ()) for name in ("2020", "2016-05-01", "20160901")]
    found = ordered(sources(*paths))
    assert found.known and found.taken == ("2016-05-01", "2016-09-01", "2020")
    assert found.dates.years[0] == 0 and found.dates.years[1] == pytest.approx(123 / 365.25)
    paths.insert(1, scene(tmp_path / "now.tif", ()))
    found = ordered(sources(*paths))
    assert not found.known and found.dates.years is None
    assert found.dates.names == ("2020.tif", "now.tif", "2016-05-01.tif", "20160901.tif")


def test_a_series_has_three_dates_at_least(tmp_path):
    paths = [scene(tmp_path / f"{year}.tif", ()) for year in (2016, 2017)]
    with pytest.raises(UsageError, match="3 to 64 dates"):
        ordered(sources(*paths))
    with pytest.raises(InputError, match="missing"):
        ordered(sources(*paths, tmp_path / "missing.tif"))


# --- stories --------------------------------------------------------------------------------------------------------

LASTS, GROWS, REVERTS = (40, 30, 20), ((150, 60, 16), (150, 60, 26), (150, 60, 36)), (250, 200, 24)
YEARS = (2016, 2018, 2020, 2022)
SHOWN = (
    (),
    (LASTS, GROWS[0]),
    (LASTS, GROWS[1], REVERTS),
    (LASTS, GROWS[2]),
)


@pytest.fixture
def session(tmp_path):
    bundle = load_bundle(write_bundle(tmp_path / "bundle"), allow_unsigned=True)
    return Session(bundle, Limits(8 << 30), engine_factory=fake_engine)


@pytest.fixture
def series(tmp_path):
    return [scene(tmp_path / f"{year}.tif", shown) for year, shown in zip(YEARS, SHOWN, strict=True)]


def told(outcome):
    """The record of each story by where it lies."""
    found = {}
    for story in outcome.stories:
        col, row = np.min(story.record["polygon"]["coordinates"][0], axis=0)
        for name, (x, y, _) in {"lasts": LASTS, "grows": GROWS[0], "reverts": REVERTS}.items():
            if abs(col - x) < 6 and abs(row - y) < 6:
                found[name] = story.record
    assert len(found) == len(outcome.stories)
    return found


def areas(record):
    return [entry["area_m2"] for entry in record["dates"]]


def test_stories_tell_when_it_began_whether_it_lasts_and_how_it_grows(session, series):
    outcome = change_series(session, ordered(sources(*series)))
    found = told(outcome)
    assert set(found) == {"lasts", "grows", "reverts"} and outcome.failed == []
    assert [(p["before"][-8:], p["after"][-8:]) for p in outcome.pairs] == [
        ("2016.tif", "2018.tif"), ("2018.tif", "2020.tif"), ("2020.tif", "2022.tif"), ("2016.tif", "2022.tif")
    ]  # fmt: skip
    lasts, grows, reverts = found["lasts"], found["grows"], found["reverts"]
    assert lasts["began"] == ["2016", "2018"] and lasts["persists"] and lasts["confirmed"] and lasts["ended"] is None
    assert lasts["trend"] == "stable" and abs(lasts["slope_m2_per_year"]) < 1
    np.testing.assert_allclose(areas(lasts), [0, 100, 100, 100], rtol=0.1)  # 20 px of 0.5 m
    assert grows["began"] == ["2016", "2018"] and grows["trend"] == "growing" and grows["persists"]
    np.testing.assert_allclose(areas(grows), [0, 64, 169, 324], rtol=0.15)
    assert grows["slope_m2_per_year"] == pytest.approx((324 - 64) / 4, rel=0.15)
    assert grows["changed_in"] == [["2016", "2018"], ["2018", "2020"], ["2020", "2022"]]
    assert reverts["began"] == ["2018", "2020"] and reverts["ended"] == ["2020", "2022"] and not reverts["persists"]
    np.testing.assert_allclose(areas(reverts), [0, 0, 144, 0], rtol=0.1)
    assert "as before between 2020 and 2022" in reverts["sentence"] and "still differs in 2022" in lasts["sentence"]


def test_dates_of_other_grids_and_orders_give_the_same_stories(tmp_path, session):
    """Each date is cut elsewhere; they are named in any order."""
    paths = []
    for k, (year, shown) in enumerate(zip(YEARS, SHOWN, strict=True)):
        dx, dy = 3 * k, 2 * k
        place = UTM | {"transform": Affine(0.5, 0, 500_000 - 0.5 * dx, 0, -0.5, 5_300_000 + 0.5 * dy)}
        squares = [(col + dx, row + dy, side) for col, row, side in shown]
        paths.append(scene(tmp_path / f"{year}.tif", squares, (SIZE[0] + 20, SIZE[1] + 20), place))
    outcome = change_series(session, ordered(sources(*reversed(paths))))
    moved = told(_shifted(outcome, -9, -6))  # the last date's grid
    assert set(moved) == {"lasts", "grows", "reverts"}
    np.testing.assert_allclose(areas(moved["grows"]), [0, 64, 169, 324], rtol=0.2)
    assert moved["reverts"]["ended"] == ["2020", "2022"]


def _shifted(outcome, dx, dy):
    for story in outcome.stories:
        rings = story.record["polygon"]["coordinates"]
        story.record["polygon"]["coordinates"] = [[[x + dx, y + dy] for x, y in ring] for ring in rings]
    return outcome


def test_without_coordinates_areas_are_pixels_and_without_dates_there_is_no_year(tmp_path, session):
    paths = [scene(tmp_path / f"{name}.tif", shown, place={}) for name, shown in zip("abcd", SHOWN, strict=True)]
    outcome = change_series(session, ordered(sources(*paths)))
    grows = told(outcome)["grows"]
    assert grows["area_m2"] is None and grows["area_px"] == pytest.approx(36 * 36, rel=0.1)
    assert grows["slope_px_per_year"] is None and grows["trend"] == "growing" and grows["began"] == ["a.tif", "b.tif"]


def test_a_date_that_cannot_be_compared_is_named_and_the_others_go_on(tmp_path, session, series):
    far = UTM | {"transform": Affine(0.5, 0, 900_000, 0, -0.5, 5_300_000)}
    outcome = change_series(session, ordered(sources(*series, scene(tmp_path / "2021.tif", (), place=far))))
    assert len(outcome.failed) == 2 and all("2021.tif" in failure for failure in outcome.failed)
    found = told(outcome)
    assert found["lasts"]["persists"] and found["lasts"]["confirmed"]
    assert timeline_view(outcome).pictures_HW3[3].max() < 50  # it is left dark
    with pytest.raises(InputError, match="no two dates"):
        elsewhere = [scene(tmp_path / f"{year}.tif", (), place=UTM | {"transform": Affine(0.5, 0, x, 0, -0.5, 5.3e6)})
                     for year, x in ((2001, 3e5), (2002, 5e5), (2003, 7e5))]  # fmt: skip
        change_series(session, ordered(sources(*elsewhere)))


def test_the_cells_are_taken_off_the_budget(session, series):
    limits = Limits(8 << 30)
    session.limits = limits
    change_series(session, ordered(sources(*series)))
    assert session.limits == limits
    session.limits = Limits(SIZE[0] * SIZE[1] * Ledger.BYTES_PER_CELL)
    with pytest.raises(BudgetError):
        change_series(session, ordered(sources(*series)))


def test_a_large_raster_is_told_by_cells_of_several_pixels(session, series, monkeypatch):
    monkeypatch.setattr("edge_rsvlm.pipeline.series.MOST_CELLS", SIZE[0] * SIZE[1] // 8)
    outcome = change_series(session, ordered(sources(*series)))
    assert outcome.cell_px == 3 and any("3 x 3 pixels" in warning for warning in outcome.warnings)
    found = told(outcome)
    np.testing.assert_allclose(areas(found["grows"])[1:], [64, 169, 324], rtol=0.5)
    assert found["reverts"]["ended"] == ["2020", "2022"]


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path, monkeypatch):
    use_engine(monkeypatch)
    return runner(write_bundle(tmp_path / "bundle"))


def test_change_of_a_series(run, series, tmp_path):
    picture, geojson = tmp_path / "line.svg", tmp_path / "o.geojson"
    code, out, _ = run("change", *series, "--json", "--output", geojson, "--timeline", picture)
    record = json.loads(out)
    assert code == 0 and record["order"] == "acquired" and record["alerts"] == [] and len(record["pairs"]) == 4
    assert [date["acquired"] for date in record["dates"]] == ["2016", "2018", "2020", "2022"]
    assert [story["area_px"] for story in record["series"]] == sorted(
        (story["area_px"] for story in record["series"]), reverse=True
    )
    features = json.loads(geojson.read_text())["features"]
    assert len(features) == 3 and all("polygon" not in feature["properties"] for feature in features)
    lon, lat = features[0]["geometry"]["coordinates"][0][0]
    assert 14.9 < lon < 15.1 and 47 < lat < 48
    assert ElementTree.parse(picture).getroot().tag.endswith("svg")


def test_a_folder_is_a_series_and_people_get_lines(run, series, tmp_path):
    folder = tmp_path / "dates"
    folder.mkdir()
    for path in series:
        Path(path).rename(folder / Path(path).name)
    code, out, _ = run("change", folder)
    lines = out.splitlines()
    assert code == 0 and "4 dates by when they were taken, 2016 to 2022: 3 stories of change, 2 still there" in lines[0]
    assert len(lines) == 4 and "growing" in lines[1]


def test_what_a_series_does_not_do_is_refused(run, series, tmp_path):
    assert "--mask" in run("change", *series, "--mask", tmp_path / "m.tif")[2]
    code, _, err = run("change", *series, "--timeline", tmp_path / "line.pdf")
    assert code == 2 and ".svg" in err
    code, _, err = run("change", *series[:2], "--timeline", tmp_path / "line.svg")
    assert code == 2 and "three or more" in err
    assert run("change", series[0])[0] == 2


def test_rules_are_met_over_the_dates_of_a_series(run, series, tmp_path):
    """What must be seen on two dates: the square that goes again tells nothing, and it is said once."""
    rules = tmp_path / "rules.toml"
    rules.write_text('version = 1\n\n[[rule]]\nname = "new"\nmin_area = "80 m2"\npersistence = 2\n')
    code, out, err = run("change", *series, "--rule", rules, "--json")
    record = json.loads(out)
    assert code == 0 and "a pair is one" not in err
    assert len(record["alerts"]) >= 1 and {alert["rule"] for alert in record["alerts"]} == {"new"}
    first = record["alerts"][0]
    assert first["before"].endswith("2016.tif") and first["after"].endswith("2020.tif")
    # 2016 is compared with 2020 as well, since a change must be seen again from the same date.
    assert len(record["pairs"]) > 4


# --- the picture ----------------------------------------------------------------------------------------------------


def view(dates=4, stories=2):
    ring_M2 = np.array([(10, 10), (60, 10), (60, 50), (10, 50), (10, 10)], float)
    by_date, areas = ((), *[(ring_M2,)] * (dates - 1)), (0.0, None, *[5.0] * (dates - 2))
    story = StoryView("About 5 ha <changed>.", (ring_M2,), by_date, areas)
    picture = np.full((75, 85, 3), 90, np.uint8)
    at = tuple(k / (dates - 1) for k in range(dates))
    return TimelineView(
        "What changed", "summary", tuple(str(2000 + k) for k in range(dates)), at, (picture,) * dates, SIZE, 1.13,
        (story,) * stories, (story,), tuple(float(k) for k in range(dates)), "m²",
    )  # fmt: skip


@pytest.mark.parametrize("dates", [3, 4, 20])
def test_the_picture_in_every_format(tmp_path, dates):
    drawing = timeline(view(dates))
    for suffix in (".png", ".svg", ".html"):
        write_timeline(tmp_path / f"t{suffix}", view(dates), suffix)
    with Image.open(tmp_path / "t.png") as image:
        assert image.size == (round(drawing.width * 2), round(drawing.height * 2))
        colours = {tuple(pixel) for pixel in np.array(image).reshape(-1, 3)[::7].tolist()}
        assert tuple(int(COLOURS[0][i : i + 2], 16) for i in (1, 3, 5)) in colours
    svg = (tmp_path / "t.svg").read_text()
    assert len(ElementTree.fromstring(svg).findall("{http://www.w3.org/2000/svg}image")) == dates + 1
    html = (tmp_path / "t.html").read_text()
    assert "&lt;changed&gt;" in html
    assert "http" not in html.replace("http://www.w3.org/2000/svg", "").replace("http-equiv", "")


def test_nothing_goes_over_the_edge_of_the_picture():
    drawing = timeline(view(9, 6))
    for item in drawing.items:
        points = getattr(item, "points", None) or [getattr(item, "at", None) or item.box[:2]]
        assert all(0 <= x <= drawing.width and 0 <= y <= drawing.height for x, y in points)


def test_a_series_in_which_nothing_changed_has_a_picture(session, tmp_path):
    paths = [scene(tmp_path / f"{year}.tif", ()) for year in YEARS]
    outcome = change_series(session, ordered(sources(*paths)))
    assert outcome.stories == []
    write_timeline(tmp_path / "t.png", timeline_view(outcome), ".png")
    assert Image.open(tmp_path / "t.png").size[0] > 1000


@pytest.mark.parametrize("driver, suffix", [("PNG", "png"), ("GTiff", "tif")])
def test_a_raster_is_shrunk_with_its_validity(tmp_path, driver, suffix):
    image = np.full((4, 300, 500), 200, np.uint8)
    image[3, :, :250] = 0  # transparent
    image[3, :, 250:] = 255
    options = {"photometric": "RGB", "alpha": "yes"} if driver == "GTiff" else {}
    path = write(tmp_path / f"a.{suffix}", image, driver, **options)
    with open_raster(str(path)) as raster:
        small, same = raster.shrunk(100), raster.shrunk(9999)
    assert small.data_CHW.shape == (3, 60, 100) and same.data_CHW.shape == (3, 300, 500)
    assert not small.valid_HW[:, :49].any() and small.valid_HW[:, 51:].all()


# --- real dates -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not TREES.is_dir(), reason="naip_trees is not here")
def test_a_building_that_was_put_up_between_2016_and_2018():
    session = Session(load_bundle(None), Limits(8 << 30))
    paths = [TREES / f"claremont_{year}_14.tif" for year in (2018, 2020, 2016)]
    outcome = change_series(session, ordered(sources(*paths)))
    record = outcome.stories[0].record
    assert record["began"] == ["2016", "2018"] and record["persists"] and record["confirmed"]
    (x0, y0), (x1, y1) = (f(record["polygon"]["coordinates"][0], axis=0) for f in (np.min, np.max))
    assert x0 < 150 < 230 < x1 + 20 and y0 < 80 < 120 < y1
    assert 2000 < record["area_m2"] < 6000
