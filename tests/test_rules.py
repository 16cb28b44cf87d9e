"""RULES.toml: what a file may say, and where it is wrong."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

import edge_rsvlm.cli
from edge_rsvlm.config.areas import read_area
from edge_rsvlm.config.lines import line_of
from edge_rsvlm.config.rules import load_rules
from edge_rsvlm.config.units import parse_area, parse_seconds
from edge_rsvlm.errors import UsageError

WHOLE = """version = 1
budget = 20

[[rule]]
name = "forest loss"
from = ["trees"]
to = [
  "bare soil",
  "sealed ground",
]
area = "areas/reserve.geojson"
min_area = "0.5 ha"
min_area_px = 40
min_score = 0.4
persistence = 2
cooldown = "36h"

[[rule]]
name = "water"
query = "water appeared"
min_area = 500
"""
RING = [[10.0, 50.0], [11.0, 50.0], [11.0, 51.0], [10.0, 51.0], [10.0, 50.0]]
POLYGON = {"type": "Polygon", "coordinates": [RING]}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "areas").mkdir()
    (tmp_path / "areas" / "reserve.geojson").write_text(json.dumps(POLYGON))
    (tmp_path / "rules.toml").write_text(WHOLE)
    return tmp_path


def test_a_file_says_everything_a_rule_needs(folder):
    rules = load_rules(folder / "rules.toml")
    forest, water = rules.rules
    assert rules.budget == 20
    assert (forest.from_, forest.to) == (("trees",), ("bare soil", "sealed ground"))
    assert (forest.min_area, forest.min_area_px, forest.min_score) == (5000, 40, 0.4)
    assert (forest.persistence, forest.cooldown, forest.labelled, forest.remembers) == (2, 36 * 3600, True, True)
    assert rules.area(forest) == ((tuple(map(tuple, RING)),),)
    assert (water.min_area, water.persistence, water.cooldown, water.remembers) == (500, 1, 0, False)
    assert rules.area(water) is None


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("min_score", "min_scor", 14, "did you mean 'min_score'"),
        ("from = ", "fron = ", 6, "did you mean 'from'"),
        ('"trees"', '"forest"', 6, "no change names 'forest'"),
        ('"sealed ground"', '"houses"', 7, "no change names 'houses'"),
        ("water appeared", "water is here", 20, "no change is told with 'is'"),
        ("0.5 ha", "0.5 acres", 12, "500 m2 or 2 ha"),
        ('"36h"', "36", 16, "a time has a unit"),
        ("persistence = 2", "persistence = 0", 15, "greater than or equal to 1"),
        ("min_area = 500", "min_area = 0", 21, "greater than 0"),
        ('name = "water"', "", 18, "field required"),
        ('"water"', '"forest loss"', 19, "called 'forest loss' too"),
        ("reserve", "reserved", 11, "reserved.geojson: No such file"),
        ("budget = 20", "budget = 0", 2, "greater than or equal to 1"),
        ("budget = 20", "budgets = 20", 2, "did you mean 'budget'"),
        ("version = 1", "version = 2", 1, "'version'"),
    ],
)
def test_a_mistake_is_named_with_its_line(folder, old, new, line, message):
    path = folder / "rules.toml"
    path.write_text(WHOLE.replace(old, new, 1))
    with pytest.raises(UsageError) as caught:
        load_rules(path)
    assert f"rules {path}, line {line}:" in str(caught.value) and message in str(caught.value)


def test_what_is_no_toml_is_named_with_its_line_too(folder):
    (folder / "rules.toml").write_text(WHOLE + "[[rule\n")
    with pytest.raises(UsageError, match="line 22"):
        load_rules(folder / "rules.toml")
    with pytest.raises(UsageError, match="name an existing rules"):
        load_rules(folder / "absent.toml")


def test_lines_of_values_wherever_they_stand():
    text = 'a = 1\n# b = 2\n[t]\nb = """\nc = 3\n"""\n\nc = 4\nlist = [\n  {x = 1},\n  {x = 2},\n]\n[t.d]\ne = 5\n'
    lines = {("a",): 1, ("t",): 3, ("t", "b"): 4, ("t", "c"): 8, ("t", "list", 1, "x"): 9, ("t", "d", "e"): 14}
    assert {keys: line_of(text, keys) for keys in lines} == lines
    assert line_of(text, ("t", "d", "missing")) == 13 and line_of(text, ("missing",)) == 1


def test_quantities():
    assert [parse_area(text) for text in ("500 m2", "2ha", "1.5 km2")] == [500, 20_000, 1_500_000]
    assert [parse_seconds(text) for text in ("12h", "7d")] == [43_200, 604_800]
    for text in ("500", "500 m", "0 m2", "-1 ha", "2 m22"):
        with pytest.raises(UsageError, match="500 m2"):
            parse_area(text)


# --- areas of interest ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "polygons"),
    [
        (POLYGON, 1),
        ({"type": "MultiPolygon", "coordinates": [[RING], [RING]]}, 2),
        ({"type": "Feature", "properties": {}, "geometry": POLYGON}, 1),
        ({"type": "FeatureCollection", "features": [{"type": "Feature", "geometry": POLYGON}] * 3}, 3),
        ({"type": "Polygon", "coordinates": [[[*point, 120.0] for point in RING]]}, 1),  # with heights
    ],
)
def test_areas_of_every_kind(tmp_path, data, polygons):
    path = tmp_path / "a.geojson"
    path.write_text(json.dumps(data))
    area = read_area(path)
    assert len(area) == polygons and area[0] == (tuple((x, y) for x, y in RING),)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"type": "Point", "coordinates": [1, 2]}, "a Point is no area"),
        ({"type": "Feature", "geometry": None}, "no GeoJSON"),
        ([], "no GeoJSON"),
        ({"type": "FeatureCollection", "features": []}, "has no polygon"),
        ({"type": "Polygon"}, "has no coordinates"),
        ({"type": "Polygon", "coordinates": [RING[:3]]}, "fewer than 4"),
        ({"type": "Polygon", "coordinates": [RING[:4]]}, "does not end"),
        ({"type": "Polygon", "coordinates": [[[500_000, 5_000_000], *RING[1:-1], [500_000, 5_000_000]]]}, "longitude"),
        ({"type": "Polygon", "coordinates": [[["a", "b"], *RING]]}, "not two numbers"),
        (POLYGON | {"crs": {"type": "name", "properties": {"name": "EPSG:32633"}}}, "coordinate system of its own"),
    ],
)
def test_what_is_no_area_is_refused(tmp_path, data, message):
    path = tmp_path / "a.geojson"
    path.write_text(json.dumps(data))
    with pytest.raises(UsageError, match=message):
        read_area(path)


def test_a_file_that_is_no_json(tmp_path):
    (tmp_path / "a.geojson").write_text("{")
    with pytest.raises(UsageError, match="is not JSON"):
        read_area(tmp_path / "a.geojson")


# --- rules check ----------------------------------------------------------------------------------------------------


def check(path):
    return CliRunner().invoke(edge_rsvlm.cli.cli, ["rules", "check", str(path)])


def test_rules_are_explained_one_a_paragraph(folder):
    done = check(folder / "rules.toml")
    forest, water, budget = (" ".join(part.split()) for part in done.stdout.split("\n\n"))
    assert done.exit_code == 0
    assert forest == (
        "forest loss: a change from trees to bare soil or sealed ground is told where it touches areas/reserve.geojson "
        "(1 polygon) when it is 5,000 m2 or larger and its score is 0.4 or higher. In a scene without coordinates it "
        "is never told, since nobody knows whether it touches the area. It must be seen at the same place on 2 dates "
        "before it is told. The same place is not told again within 36 hours."
    )
    assert "whose labels or spectrum say 'water appeared'" in water and "min_area_px would say" in water
    assert "told on every date" in water and "At most 20 alerts" in budget


def test_a_wrong_file_is_a_usage_error(folder):
    path = folder / "rules.toml"
    path.write_text(WHOLE.replace("min_score", "min_scor"))
    done = check(path)
    assert isinstance(done.exception, UsageError) and done.exception.exit_code == 2 and not done.stdout
    assert f"{path}, line 14: 'rule.0.min_scor'" in str(done.exception)
