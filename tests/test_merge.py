"""Merging across borders: against brute force, and blind to how the input was cut."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import rasterio.features
from rasterio.transform import Affine

from edge_rsvlm.merge.boxes import BoxMerger, concatenate, empty_boxes, rank, suppress, take
from edge_rsvlm.merge.regions import RegionMerger
from edge_rsvlm.types import Boxes


def random_boxes(rng, count, span=200.0, ties=False):
    xy, wh = rng.uniform(0, span, (count, 2)), rng.uniform(0.5, 60, (count, 2)) ** rng.uniform(0.3, 1.3, (count, 1))
    scores = rng.integers(1, 4, count) / 4 if ties else rng.random(count)
    boxes = np.hstack([xy, xy + wh]).round(0 if ties else 6)
    boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
    # A fifth of them once more, hardly moved, as two tiles see one object.
    again = count // 5
    boxes[-again:] = boxes[:again] + (0 if ties else rng.uniform(0, 0.01, (again, 4)))
    labels = rng.integers(0, 2, count)
    labels[-again:] = labels[:again]
    return Boxes(boxes, scores.astype(np.float32), labels)


def brute_force(boxes, iou):
    ranked = take(boxes, rank(boxes))
    kept: list[int] = []
    for i, (box, label) in enumerate(zip(ranked.xyxy_N4, ranked.labels_N, strict=True)):
        for k in kept:
            other = ranked.xyxy_N4[k]
            sides = np.minimum(box[2:], other[2:]) - np.maximum(box[:2], other[:2])
            shared = np.prod(np.maximum(sides, 0))
            union = np.prod(box[2:] - box[:2]) + np.prod(other[2:] - other[:2]) - shared
            if ranked.labels_N[k] == label and shared / union > iou:
                break
        else:
            kept.append(i)
    return take(ranked, np.array(kept, int))


def rows(boxes):
    return sorted(zip(map(tuple, boxes.xyxy_N4), boxes.scores_N.tolist(), boxes.labels_N.tolist(), strict=True))


def stream(boxes, iou, order, batch):
    """Feed by the boxes' tops, in the given order inside what one frontier allows."""
    merger, released = BoxMerger(iou), []
    for start in range(0, len(order), batch):
        part, rest = order[start : start + batch], order[start + batch :]
        frontier = boxes.xyxy_N4[rest, 1].min() if len(rest) else np.inf
        released.append(merger.feed(take(boxes, part), frontier))
    return concatenate([*released, merger.flush()]), [len(r.scores_N) for r in released]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("iou", [0.05, 0.3, 0.5, 0.9])
def test_boxes_are_suppressed_as_one_greedy_pass_would(iou, ties):
    boxes = random_boxes(np.random.default_rng(3), 400, ties=ties)
    merged, _ = stream(boxes, iou, np.arange(400), 400)
    expected = brute_force(boxes, iou)
    assert rows(merged) == rows(expected)
    assert 0 < len(expected.scores_N) < 400


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_box_output_does_not_depend_on_order_or_batches(batch):
    rng = np.random.default_rng(5)
    boxes = random_boxes(rng, 500, span=600)
    whole, _ = stream(boxes, 0.3, np.arange(500), 500)
    shuffled, _ = stream(boxes, 0.3, rng.permutation(500), batch)
    by_top, counts = stream(boxes, 0.3, np.argsort(boxes.xyxy_N4[:, 1], kind="stable"), batch)
    for other in (shuffled, by_top):
        np.testing.assert_array_equal(other.xyxy_N4, whole.xyxy_N4)
        np.testing.assert_array_equal(other.scores_N, whole.scores_N)
    assert sum(counts[: len(counts) // 2]) > 0  # it streams: results leave before the end


def test_a_chain_keeps_a_box_open_until_its_head_is_known():
    """C above the frontier depends on B, which a later A may suppress; then C stays."""
    a, b, c = [0, 8, 10, 18], [0, 4, 10, 14], [0, 0, 10, 10]
    boxes = Boxes(np.array([a, b, c], float), np.float32([0.9, 0.8, 0.7]), np.zeros(3, int))
    merger = BoxMerger(0.3)
    first = merger.feed(take(boxes, np.array([1, 2])), 10.5)
    assert len(first.scores_N) == 0
    merged = concatenate([first, merger.feed(take(boxes, np.array([0])), np.inf), merger.flush()])
    assert merged.scores_N.tolist() == pytest.approx([0.7, 0.9])


def test_undecided_boxes_still_fall_to_a_kept_one():
    boxes = Boxes(np.array([[0, 0, 10, 10], [0, 1, 10, 11]], float), np.float32([0.9, 0.8]), np.zeros(2, int))
    kept, undecided = suppress(boxes, 0.5, np.array([False, True]))
    assert kept.tolist() == [True, False] and undecided.tolist() == [False, False]


def test_no_boxes_at_all():
    merger = BoxMerger(0.5)
    assert len(merger.feed(empty_boxes(), 3.0).scores_N) == len(merger.flush().scores_N) == 0


def test_box_memory_is_what_is_open():
    rng = np.random.default_rng(1)
    merger, most = BoxMerger(0.5), 0
    for top in range(0, 20_000, 50):
        boxes = random_boxes(rng, 20, span=50)
        merger.feed(Boxes(boxes.xyxy_N4 + np.array([0, top, 0, top]), boxes.scores_N, boxes.labels_N), top + 50)
        most = max(most, len(merger._open.scores_N) + len(merger._kept.scores_N))
    assert most < 400  # of 8,000


# --- regions ---------------------------------------------------------------------------------------------------------


def merge(mask, probability, cuts, least=1):
    merger, found = RegionMerger(mask.shape[1], least), []
    edges = [0, *cuts, len(mask)]
    for start, stop in itertools.pairwise(edges):
        found += merger.feed(start, mask[start:stop], probability[start:stop])
    return found + merger.flush()


def plain(regions):
    return [(r.area_px, r.score, [[ring.tolist() for ring in rings] for rings in r.polygons]) for r in regions]


def flood(mask):
    """Pixel sets of 8-connected components, one by one."""
    left, found = mask.copy(), []
    while left.any():
        stack, pixels = [tuple(np.argwhere(left)[0])], []
        while stack:
            r, c = stack.pop()
            if 0 <= r < mask.shape[0] and 0 <= c < mask.shape[1] and left[r, c]:
                left[r, c] = False
                pixels.append((r, c))
                stack += [(r + i, c + j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
        found.append(pixels)
    return found


def painted(region, shape):
    """The pixels inside a region's polygons, by an independent rasteriser (even-odd over every ring)."""
    drawn = np.zeros(shape, int)
    for rings in region.polygons:
        for ring in rings:
            shape_i = {"type": "Polygon", "coordinates": [ring.tolist()]}
            drawn += rasterio.features.rasterize([shape_i], out_shape=shape, transform=Affine.identity())
    return drawn % 2 == 1


@pytest.mark.parametrize("density", [0.2, 0.45, 0.6, 0.8])
@pytest.mark.parametrize("seed", range(4))
def test_regions_are_the_components_and_outline_exactly_their_pixels(density, seed):
    rng = np.random.default_rng(seed)
    mask = rng.random((23, 31)) < density
    probability = rng.random(mask.shape).astype(np.float32)
    regions = merge(mask, probability, [])
    expected = {frozenset(pixels) for pixels in flood(mask)}
    found = {frozenset(map(tuple, np.argwhere(painted(r, mask.shape)).tolist())): r for r in regions}
    assert found.keys() == expected
    for pixels, region in found.items():
        assert region.area_px == len(pixels)
        assert region.score == pytest.approx(np.mean([probability[p] for p in pixels]))


@pytest.mark.parametrize("seed", range(4))
def test_rings_are_closed_simple_and_holes_lie_inside(seed):
    mask = np.random.default_rng(seed).random((40, 40)) < 0.65
    for region in merge(mask, mask.astype(np.float32), []):
        for rings in region.polygons:
            (x0, y0), (x1, y1) = rings[0].min(axis=0), rings[0].max(axis=0)
            for ring in rings:
                assert (ring[0] == ring[-1]).all() and len(ring) >= 5
                corners = [tuple(p) for p in ring[:-1].tolist()]
                assert len(set(corners)) == len(corners)
                steps = np.abs(np.diff(ring, axis=0))
                assert ((steps == 0).sum(axis=1) == 1).all()  # along one axis, and never standing still
                assert (ring >= (x0, y0)).all() and (ring <= (x1, y1)).all()


@pytest.mark.parametrize("cuts", [list(range(1, 30)), [7], [1, 2, 29], [10, 10, 20]])
def test_regions_do_not_depend_on_the_bands(cuts):
    rng = np.random.default_rng(9)
    mask, probability = rng.random((30, 25)) < 0.4, rng.random((30, 25)).astype(np.float32)
    assert plain(merge(mask, probability, cuts)) == plain(merge(mask, probability, []))


@pytest.mark.parametrize("cuts", [[], list(range(1, 24)), [5, 6, 20]])
def test_regions_of_several_values_are_those_of_each_alone(cuts):
    rng = np.random.default_rng(3)
    values = rng.integers(0, 4, (24, 29)).astype(np.uint8)
    probability = rng.random(values.shape).astype(np.float32)
    regions = merge(values, probability, cuts)
    for value in (1, 2, 3):
        alone = merge((values == value).astype(np.uint8), probability, [])
        assert plain([r for r in regions if r.value == value]) == plain(alone) and len(alone) > 5
    assert plain(regions) == plain(merge(values, probability, []))


def test_touching_corners_join_a_region_of_two_polygons():
    mask = np.array([[1, 0], [0, 1]], bool)
    (region,) = merge(mask, mask.astype(np.float32), [1])
    assert region.area_px == 2 and len(region.polygons) == 2


def test_a_ring_has_its_hole_and_the_island_is_another_region():
    mask = np.ones((7, 7), bool)
    mask[1:6, 1:6] = False
    mask[3, 3] = True
    outer, island = sorted(merge(mask, mask.astype(np.float32), [3]), key=lambda r: -r.area_px)
    assert [len(rings) for rings in outer.polygons] == [2] and [len(rings) for rings in island.polygons] == [1]
    assert outer.area_px == 24 and island.area_px == 1


def test_arms_that_meet_late_are_one_region_and_small_ones_are_dropped():
    mask = np.zeros((6, 9), bool)
    mask[:5, [0, 4, 8]] = True
    mask[5] = True
    mask[0, 2] = True
    regions = merge(mask, mask.astype(np.float32), [1, 2, 3, 4, 5], least=2)
    assert [r.area_px for r in regions] == [24]


def test_closed_regions_leave_at_once_and_memory_follows_the_open_ones():
    merger = RegionMerger(1000, 1)
    mask = np.zeros((10, 1000), bool)
    mask[2:5, 100:200] = True
    released = [merger.feed(10 * i, mask, mask.astype(np.float32)) for i in range(50)]
    assert [len(r) for r in released] == [1] * 50
    assert len(merger._runs) == 0
