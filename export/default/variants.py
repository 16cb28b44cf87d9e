"""The packaged model at every precision: bytes, memory, time and scores, as a table.

``python -m edge_rsvlm.export.default.variants > docs/variants.md`` exports each variant by RECIPE.toml and measures it.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import edge_rsvlm
from edge_rsvlm.bundle import Bundle, load_bundle
from edge_rsvlm.config.units import format_bytes
from edge_rsvlm.export.default.make_bundle import WORK, export
from edge_rsvlm.export.default.score import evaluations
from edge_rsvlm.export.fewer_bits import ACCURACY
from edge_rsvlm.export.steps.parity import FAILED
from edge_rsvlm.pipeline.detect import DetectQuery
from edge_rsvlm.pipeline.session import Limits, Session

TARGETS = ("onnx:f32", "onnx:f16", "onnx:int8", "onnx:int4", "gguf:F16", "gguf:Q8_0", "gguf:Q4_0")
SCENES = Path(edge_rsvlm.__file__).parent / "scenes"
RUNS = 11
MEMORY_BYTES = 8 << 30
QUESTION = "does this picture contain trees?"
HEADLINE = {
    "caption": "CIDEr", "ask": "accuracy", "classify": "accuracy", "search": "mean recall", "detect": "AP50",
    "ground": "Pr@0.5", "segment": "balanced accuracy", "change": "F1",
}  # fmt: skip

INTRO = """# Variants of the packaged model

Of version {version}, made and measured by `python -m edge_rsvlm.export.default.variants`, on {machine}, one thread.
Memory is the growth of anonymous memory from importing the engine to the open sessions, and per tile of a batch;
files that are mapped do not count. Times are medians of {runs} whole commands on packaged scenes, sessions open,
variants taking turns: the caption and an answer of `marina.webp`, the boxes and the trees of `airport_apron.webp`,
the change of the `hongkong` pair. Scores are those of the model card's data. Who is outside the gate lost more of a
task than an export lets through, and is here to be compared.
"""


@dataclass(frozen=True)
class Variant:
    target: str
    bundle: Bundle
    accuracy: list[dict[str, Any]]


def make(target: str, data: Path) -> Variant:
    folder = WORK / target.replace(":", "-")
    made = export(folder, target, data, lambda *at: print(target, *at, file=sys.stderr, flush=True))
    bundle = load_bundle(made, allow_unsigned=True, allow_older=True)
    return Variant(target, bundle, evaluations(data, made, sys.stderr))


def times(variants: list[Variant]) -> dict[tuple[str, str], float]:
    """Seconds by target and verb, of one warm command: variants take turns, so that what else the machine does meets
    all of them."""
    runs = {(v.target, verb): run for v in variants for verb, run in _commands(v.bundle).items()}
    found: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    for turn in range(RUNS + 1):
        for key, run in runs.items():
            begun = time.perf_counter()
            run()
            if turn:  # the first opens sessions
                found[key].append(time.perf_counter() - begun)
    return {key: median(seconds) for key, seconds in found.items()}


def _commands(bundle: Bundle) -> dict[str, Callable[[], object]]:
    session = Session(bundle, Limits(MEMORY_BYTES))
    pair = [str(SCENES / f"hongkong_{year}.tif") for year in (2016, 2018)]
    return {
        "caption": lambda: session.caption(str(SCENES / "marina.webp"), _nowhere),
        "ask": lambda: session.ask(str(SCENES / "marina.webp"), QUESTION, _nowhere),
        "detect": lambda: session.detect(str(SCENES / "airport_apron.webp"), DetectQuery(), _nowhere),
        "segment": lambda: session.segment(str(SCENES / "airport_apron.webp"), ["trees"], _nowhere),
        "change": lambda: session.change(pair[0], pair[1], _nowhere),
    }


def _nowhere(record: dict[str, Any], geometry: dict[str, Any] | None) -> None:
    """Results are not wanted."""


def table(variants: list[Variant], seconds: dict[tuple[str, str], float]) -> str:
    """A column per variant."""
    timed = list(dict.fromkeys(verb for _, verb in seconds))
    scored = [(row["task"], row["data"]) for row in variants[0].accuracy if row["metric"] == HEADLINE[row["task"]]]
    head = ["", "bytes", "gate", *(f"{verb}: memory" for verb in timed), *(f"{verb}: ms" for verb in timed),
            *(f"{HEADLINE[task]}: {data}" for task, data in scored)]  # fmt: skip
    columns = [head, *(_column(variant, seconds, timed, scored) for variant in variants)]
    rows = [list(row) for row in zip(*columns, strict=True)]
    rows.insert(1, ["---"] * len(columns))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _column(
    variant: Variant, seconds: dict[tuple[str, str], float], timed: list[str], scored: list[tuple[str, str]]
) -> list[str]:
    manifest = variant.bundle.manifest
    memory = [getattr(manifest.tasks, verb).memory for verb in timed]
    values = {
        (row["task"], row["data"]): row["value"] for row in variant.accuracy if row["metric"] == HEADLINE[row["task"]]
    }
    return [
        f"`{variant.target}`",
        format_bytes(sum(entry.bytes for entry in manifest.files.values())),
        _gate(variant.bundle),
        *(f"{format_bytes(m.session_bytes)} + {format_bytes(m.tile_bytes)}" for m in memory),
        *(f"{seconds[variant.target, verb] * 1e3:.0f}" for verb in timed),
        *(f"{values[key]:.3f}" for key in scored),
    ]


def _gate(bundle: Bundle) -> str:
    failed = [step.metrics[FAILED] for step in bundle.manifest.steps if step.step == ACCURACY]
    return "as trained" if not failed else "outside" if any(failed) else "inside"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--targets", nargs="+", default=TARGETS, choices=TARGETS)
    options = parser.parse_args()
    variants = [make(target, options.data) for target in options.targets]
    version = variants[0].bundle.manifest.version
    print(INTRO.format(version=version, machine=platform.machine(), runs=RUNS))
    print(table(variants, times(variants)))


if __name__ == "__main__":
    main()
