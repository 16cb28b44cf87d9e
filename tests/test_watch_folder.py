"""Which files of a folder are whole, and which scenes are of one place."""

from __future__ import annotations

import os

import numpy as np
import pytest

from edge_rsvlm.errors import InputError
from edge_rsvlm.types import Georeference
from edge_rsvlm.watch.folder import Folder
from edge_rsvlm.watch.places import alike, share_covered

# --- whole files ---


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def looker(tmp_path, **options):
    clock = Clock()
    folder = Folder(tmp_path, clock=clock, quiet_s=2, **options)

    def look(after_s=0.0):
        clock.now += after_s
        return [file.path.name for file in folder.look(lambda file: False)]

    return look


def test_a_file_is_whole_when_two_looks_that_are_far_enough_apart_agree(tmp_path):
    look, path = looker(tmp_path), tmp_path / "a.tif"
    path.write_bytes(b"x")
    assert look() == [] and look(1.9) == [] and look(0.1) == ["a.tif"]
    path.write_bytes(b"xy")
    assert look(5) == [], "it grew"
    os.utime(path, ns=(1, 1))
    assert look(5) == [], "it was touched"
    assert look(2) == ["a.tif"]
    path.unlink()
    assert look(1) == []
    path.write_bytes(b"x")
    os.utime(path, ns=(1, 1))
    assert look(5) == [], "it is new again"


def test_one_look_is_never_enough_however_old_the_file(tmp_path):
    look = looker(tmp_path)
    (tmp_path / "a.tif").write_bytes(b"x")
    os.utime(tmp_path / "a.tif", (0, 0))
    assert look(1000) == []


@pytest.mark.parametrize(
    "name", [".a.tif", "a.tif.part", "a.tif.tmp", "a.part.tif", "a.TMP.tif", "a.txt", "a", "tif", ".tif"]
)
def test_unfinished_and_other_files_are_ignored(tmp_path, name):
    look = looker(tmp_path)
    (tmp_path / name).write_bytes(b"x")
    (tmp_path / "empty.tif").touch()
    (tmp_path / "folder.tif").mkdir()
    (tmp_path / "dangling.tif").symlink_to(tmp_path / "nothing.tif")
    look()
    assert look(5) == []


def test_with_a_marker_only_the_marker_counts(tmp_path):
    look = looker(tmp_path, marker=True)
    (tmp_path / "a.TIF").write_bytes(b"x")
    (tmp_path / "b.tif").write_bytes(b"x")
    assert look() == [] and look(100) == []
    (tmp_path / "a.TIF.done").touch()
    assert look() == ["a.TIF"]


def test_the_oldest_come_first_and_names_that_are_no_text_are_said_once(tmp_path):
    told = []
    look = looker(tmp_path, strange=told.append)
    for n, name in enumerate((b"c.tif", b"a.tif", b"b\xff.tif", b"b.tif")):
        path = os.path.join(os.fsencode(tmp_path), name)  # noqa: PTH118
        with open(path, "wb") as stream:  # noqa: PTH123
            stream.write(b"x")
        os.utime(path, (n, n))
    look()
    assert look(5) == ["c.tif", "a.tif", "b.tif"]
    assert told == [r"'b\udcff.tif'"]


def test_a_folder_that_is_gone_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="mounted"):
        Folder(tmp_path / "gone").look(lambda file: False)


# --- places ---

UNIT = ((0.0, 0.0), (1.0, 0.0), (1.0, 1.0), (0.0, 1.0))


def moved(by, footprint=UNIT):
    return tuple((lon + by[0], lat + by[1]) for lon, lat in footprint)


@pytest.mark.parametrize(
    "by, of, share",
    [
        (UNIT, UNIT, 1),
        (moved((0.25, 0)), UNIT, 0.75),
        (moved((0.5, -0.5)), UNIT, 0.25),
        (moved((2, 0)), UNIT, 0),
        (UNIT[::-1], moved((0.25, 0)), 0.75),
        (((-1.0, -1.0), (3.0, -1.0), (3.0, 3.0), (-1.0, 3.0)), UNIT, 1),
        (UNIT, ((-1.0, -1.0), (3.0, -1.0), (3.0, 3.0), (-1.0, 3.0)), 1 / 16),
        (((0.5, -0.5), (1.5, 0.5), (0.5, 1.5), (-0.5, 0.5)), UNIT, 1),
        (((0.5, 0.0), (1.0, 0.5), (0.5, 1.0), (0.0, 0.5)), UNIT, 0.5),
        (moved((-360, 0)), moved((0.25, 0)), 0.75),
        (moved((179.5, 0)), moved((-180.25, 0)), 0.75),
    ],
)
def test_the_share_of_a_footprint_that_another_covers(by, of, share):
    assert share_covered(by, of) == pytest.approx(share)


def test_random_quads_agree_with_counting_points():
    rng = np.random.default_rng(7)
    points = rng.uniform(-2, 2, (20_000, 2))

    def inside(quad):
        corners = np.array(quad)
        sides = zip(corners, np.roll(corners, -1, axis=0), strict=True)
        return np.all([(b - a)[0] * (points - a)[:, 1] >= (b - a)[1] * (points - a)[:, 0] for a, b in sides], axis=0)

    for _ in range(50):
        quads = []
        for _ in range(2):
            angles = np.sort(rng.uniform(0, 2 * np.pi, 4))
            quads.append([(np.cos(a), np.sin(a)) for a in angles])
        one, other = inside(quads[0]), inside(quads[1])
        if other.sum() > 500:
            assert share_covered(*quads) == pytest.approx((one & other).sum() / other.sum(), abs=0.06)


def test_scenes_without_a_crs_are_alike_by_size_and_name_but_for_numbers():
    small, large = Georeference(10, 20), Georeference(20, 20)
    assert alike("/x/cam1_20240501.png", small) == alike("cam2_20231231.tif", small)
    assert alike("cam1.png", small) != alike("cam1.png", large)
    assert alike("north1.png", small) != alike("south1.png", small)
