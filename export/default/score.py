"""Accuracy of a bundle on the held-out images, by the very commands that the model card shows."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TextIO

DATA, LABELS = "../shared/data", "build/eval"
"""Where the commands look for data, and for the label files that ``data.eval_sets`` wrote, from the project's root."""
HELD_OUT = "export/default/held_out"
VEHICLES = " ".join(f"--alias {name}=vehicle" for name in ("car", "truck", "minibus"))
EVALUATIONS = (
    ("UCM-Captions, validation part",
     "edge-rsvlm eval caption {data}/ucm_captions/val.jsonl --images {data}/ucm_captions/val.tar"),
    ("RSICD, images not trained on",
     "edge-rsvlm eval caption {data}/rsicd/train.jsonl --images {data}/rsicd/train.tar"
     f" --only {HELD_OUT}/rsicd.txt"),
    ("RSIVQA's questions about UCM, validation part",
     "edge-rsvlm eval ask {labels}/questions.jsonl --images {data}/ucm_captions/val.tar"),
    ("UCM's 21 classes, validation part",
     "edge-rsvlm eval classify {labels}/classes.jsonl --images {data}/ucm_captions/val.tar"),
    ("UCM-Captions, validation part, captions and images",
     "edge-rsvlm eval search {data}/ucm_captions/val.jsonl --images {data}/ucm_captions/val.tar"),
    ("Airbus aircraft, whole scenes of places not trained on",
     "edge-rsvlm eval detect {data}/airbus_aircraft/train.json --images {data}/airbus_aircraft/train"
     f" --only {HELD_OUT}/airbus_aircraft.txt --ignore 'truncated airplane'"),
    ("HRPlanes, airports not trained on",
     "edge-rsvlm eval detect {data}/hrplanes/train.json --images {data}/hrplanes/train.tar"
     f" --only {HELD_OUT}/hrplanes.txt"),
    ("Aerial Airport, images not trained on",
     "edge-rsvlm eval detect {data}/aerial_airport/train.json --images {data}/aerial_airport/train.tar"
     f" --only {HELD_OUT}/aerial_airport.txt"),
    ("Drone frames of a flight not trained on, all but buses as vehicles",
     "edge-rsvlm eval detect {data}/drone_vehicles/train.json --images {data}/drone_vehicles/train"
     f" --only {HELD_OUT}/drone_vehicles.txt --ignore cyclist --ignore bus {VEHICLES}"),
    ("HRPlanes, phrases for airplanes of airports not trained on",
     "edge-rsvlm eval ground {labels}/phrases_hrplanes.jsonl --images {data}/hrplanes/train.tar"),
    ("SIMD, phrases for objects of images not trained on",
     "edge-rsvlm eval ground {labels}/phrases_simd.jsonl --images {data}/simd/train.tar"),
    ("NAIP, trees of images not trained on",
     "edge-rsvlm eval segment {data}/naip_trees/train.jsonl --images {data}/naip_trees/train"
     f" --only {HELD_OUT}/naip_trees_images.txt --label trees"),
    ("OSCD, 2 cities not trained on",
     f"edge-rsvlm eval change {{data}}/oscd/train --only {HELD_OUT}/oscd.txt"),
    ("SZTAKI, 2 pairs not trained on",
     f"edge-rsvlm eval change {{data}}/sztaki/train --only {HELD_OUT}/sztaki.txt"),
)  # fmt: skip
BY_EXAMPLES = (
    ("SIMD, buses, whose boxes and name training left out, 10 draws",
     "edge-rsvlm eval detect {data}/simd/train.json --images {data}/simd/train.tar --like bus"),
)  # fmt: skip
"""Every draw looks at every image."""
REPORTED = {
    "detect": ("AP50", "AP50:95", "F1", "AP50 by 5 examples"),
    "change": ("precision", "recall", "F1"),
    "caption": ("CIDEr", "BLEU-4"),
    "ask": ("accuracy",),
    "classify": ("accuracy",),
    "search": ("image to text R@1", "text to image R@1", "mean recall"),
    "ground": ("Pr@0.5",),
    "segment": ("balanced accuracy", "recall", "specificity"),
}
KINDS = ("ask",)
"""Tasks whose scores by kind are told too."""


def evaluations(
    data: Path, folder: Path, log: TextIO = sys.stdout, rows: Sequence[tuple[str, str]] = EVALUATIONS
) -> list[dict[str, Any]]:
    """``Accuracy`` entries of the manifest for the bundle in ``folder``; scores are told to ``log`` as they come."""
    found = []
    results = run_all([pattern.format(data=data, labels=LABELS) for _, pattern in rows], folder)
    for (title, pattern), result in zip(rows, results, strict=True):
        command = pattern.format(data=DATA, labels=LABELS)
        scores = reported(result["task"], result["scores"])
        if not scores:
            raise ValueError(f"'{command}' reported none of {REPORTED[result['task']]}: {result['scores']}")
        found += [
            {"task": result["task"], "metric": s["metric"], "value": round(s["value"], 4), "samples": s["samples"],
             "interval": [round(v, 4) for v in s["interval"]], "data": title, "command": command}
            for s in scores
        ]  # fmt: skip
        print(f"{title}: " + ", ".join(f"{s['metric']} {s['value']:.3f}" for s in scores), file=log, flush=True)
    return found


def reported(task: str, scores: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Scores over everything that was asked; in KINDS also by kind, with the kind in the name of the measure."""
    known = [s for s in scores if s["metric"] in REPORTED[task]]
    whole = [s for s in known if s["label"] is None]
    kinds = [s for s in known if s["label"] is not None]
    if task in KINDS:
        return whole + [{**s, "metric": f"{s['metric']}, {s['label']}"} for s in kinds]
    return whole or kinds


def run_all(commands: Sequence[str], folder: Path) -> Iterator[dict[str, Any]]:
    """The results of ``run`` in their order; as many at a time as there are processors, each with one thread."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(lambda command: run(command, folder), commands)


def run(command: str, folder: Path) -> dict[str, Any]:
    """The JSON result of an ``edge-rsvlm eval`` command on the bundle in ``folder``."""
    program, *arguments = shlex.split(command)
    extra = ["--bundle", str(folder), "--allow-unsigned", "--json", "--threads", "1"]
    executable = str(Path(sys.executable).parent / program)
    done = subprocess.run([executable, *arguments, *extra], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"'{command}' failed: {done.stderr.strip()}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result
