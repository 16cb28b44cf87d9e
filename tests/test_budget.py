import pytest

from edge_rsvlm.budget import BATCHES, BETWEEN_STARTS_BYTES, MIB, Demand, plan_memory
from edge_rsvlm.errors import BudgetError
from tests.fakes import parsed

TASKS = parsed().tasks


def demand(task="detect", **options):
    spec = getattr(TASKS, task)
    defaults = {
        "tile_px": 128,
        "tile_bytes": 4 * 5 * 128**2,
        "tiles": 10_000,
        "bytes_per_pixel": 4,
        "scale_xy": (1.0, 1.0),
        "width": 3000,
        "canvas_rows": 256,
        "canvas_bytes": 3 if task == "change" else 0,
        "dates": 2 if task == "change" else 1,
    }
    return Demand(task, spec.memory, **(defaults | options))


def test_room_is_used_and_taken_away_in_steps():
    roomy = plan_memory([demand()], limit_bytes=1 << 30, base_bytes=50 * MIB)
    assert roomy.batch == BATCHES[0]
    smaller = plan_memory([demand()], limit_bytes=roomy.total_bytes - 1, base_bytes=50 * MIB)
    assert smaller.total_bytes < roomy.total_bytes
    assert (smaller.batch, smaller.read_pixels) != (roomy.batch, roomy.read_pixels)


def test_refusal_names_the_numbers_and_what_would_fit():
    with pytest.raises(BudgetError, match=r"--memory \d+MiB") as refused:
        plan_memory([demand()], limit_bytes=60 * MIB, base_bytes=50 * MIB)
    offered = int(str(refused.value).split("--memory ")[1].split("MiB")[0])
    larger_start = 50 * MIB + BETWEEN_STARTS_BYTES // 2
    assert plan_memory([demand()], limit_bytes=offered * MIB, base_bytes=larger_start).batch == BATCHES[-1]
    needed = offered * MIB - BETWEEN_STARTS_BYTES
    assert plan_memory([demand()], limit_bytes=needed, base_bytes=50 * MIB).total_bytes <= needed
    with pytest.raises(BudgetError):
        plan_memory([demand()], limit_bytes=needed - MIB, base_bytes=50 * MIB)


def test_whole_images_count_what_they_decode_to():
    windowed = plan_memory([demand()], limit_bytes=1 << 31, base_bytes=0)
    decoded = plan_memory([demand(resident_bytes=300 * MIB)], limit_bytes=1 << 31, base_bytes=0)
    assert decoded.total_bytes - windowed.total_bytes >= 300 * MIB
    with pytest.raises(BudgetError, match="gdal_translate -of COG"):
        plan_memory([demand(resident_bytes=300 * MIB)], limit_bytes=256 * MIB, base_bytes=0)


def test_change_counts_two_dates_and_its_rows():
    detect = plan_memory([demand()], limit_bytes=1 << 31, base_bytes=0)
    change = plan_memory([demand("change")], limit_bytes=1 << 31, base_bytes=0)
    assert change.total_bytes > detect.total_bytes


def test_few_tiles_and_their_caches_count_as_many_times_as_they_are_there():
    many = plan_memory([demand(cache_bytes=10 * MIB)], limit_bytes=1 << 31, base_bytes=0)
    one = plan_memory([demand(cache_bytes=10 * MIB, tiles=1)], limit_bytes=1 << 31, base_bytes=0)
    assert many.engine_bytes - one.engine_bytes == (BATCHES[0] - 1) * 11 * MIB
    assert dict(many.items)["tiles"] == 4 * BATCHES[0] * dict(one.items)["tiles"]
