"""Device profiles: facts about boards, one JSON file each; the file name is the profile's name."""

from __future__ import annotations

import difflib
import json
import os
from importlib import resources

from edge_rsvlm.errors import UsageError

HOST = "host"


def names() -> list[str]:
    """Known profiles, ``host`` (this machine) first."""
    files = resources.files("edge_rsvlm.device_profiles").iterdir()
    boards = sorted(f.name.removesuffix(".json") for f in files if f.name.endswith(".json"))
    return [HOST, *(board for board in boards if board != HOST)]


def load(name: str) -> dict[str, object]:
    """Facts of one profile. ``memory_bytes`` is what a process can really take; on ``host`` it is measured now."""
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=1, cutoff=0.3)
        hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(names())}"
        raise UsageError(f"no device profile '{name}'", fix=hint)
    text = (resources.files("edge_rsvlm.device_profiles") / f"{name}.json").read_text()
    facts: dict[str, object] = json.loads(text)
    if name == HOST:
        facts |= {"memory_bytes": available_memory(), "cpu_threads": cpu_threads()}
    return facts


def available_memory() -> int:
    """Bytes this machine can still give without swapping, within its control group."""
    with open("/proc/meminfo") as lines:  # noqa: PTH123 - a kernel file, not a path of ours
        kib = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    return min(kib["MemAvailable"] * 1024, _control_group_limit())


def _control_group_limit() -> int:
    try:
        with open("/sys/fs/cgroup/memory.max") as limit:  # noqa: PTH123
            text = limit.read().strip()
    except OSError:
        return 1 << 62
    return 1 << 62 if text == "max" else int(text)


def cpu_threads() -> int:
    """Threads this process may use, which can be fewer than the machine has."""
    return len(os.sched_getaffinity(0))
