"""Accuracy of a bundle on the held-out images, by the very commands that the model card shows."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, TextIO

DATA = "../shared/data"
"""Where the commands look for data, from the project's root."""
VEHICLES = " ".join(f"--alias {name}=vehicle" for name in ("car", "truck", "bus", "van", "minibus"))
EVALUATIONS = (
    ("UCM-Captions, validation part (210 images)",
     "edge-rsvlm eval caption {data}/ucm_captions/val.jsonl --images {data}/ucm_captions/val.tar"),
    ("Airbus aircraft, 8 whole scenes of places not trained on",
     "edge-rsvlm eval detect {data}/airbus_aircraft/train.json --images {data}/airbus_aircraft/train"
     " --only export/default/held_out/airbus_aircraft.txt --ignore 'truncated airplane'"),
    ("HRPlanes, 52 images of airports not trained on",
     "edge-rsvlm eval detect {data}/hrplanes/train.json --images {data}/hrplanes/train.tar"
     " --only export/default/held_out/hrplanes.txt"),
    ("Aerial Airport, 9 images",
     "edge-rsvlm eval detect {data}/aerial_airport/train.json --images {data}/aerial_airport/train.tar"
     " --only export/default/held_out/aerial_airport.txt"),
    ("Drone frames, 3 of a flight not trained on, vehicles as one class",
     "edge-rsvlm eval detect {data}/drone_vehicles/train.json --images {data}/drone_vehicles/train"
     f" --only export/default/held_out/drone_vehicles.txt --ignore cyclist {VEHICLES}"),
    ("OSCD, 2 cities not trained on",
     "edge-rsvlm eval change {data}/oscd/train --only export/default/held_out/oscd.txt"),
    ("SZTAKI, 2 pairs not trained on",
     "edge-rsvlm eval change {data}/sztaki/train --only export/default/held_out/sztaki.txt"),
)  # fmt: skip
REPORTED = {
    "detect": ("AP50", "AP50:95", "F1"),
    "change": ("precision", "recall", "F1"),
    "caption": ("CIDEr", "BLEU-4"),
}


def evaluations(data: Path, folder: Path, log: TextIO = sys.stdout) -> list[dict[str, Any]]:
    """``Accuracy`` entries of the manifest for the bundle in ``folder``; scores are told to ``log`` as they come."""
    found = []
    for title, pattern in EVALUATIONS:
        command = pattern.format(data=DATA)
        result = run(pattern.format(data=data), folder)
        scores = [s for s in result["scores"] if s["label"] is None and s["metric"] in REPORTED[result["task"]]]
        if not scores:
            raise ValueError(f"'{command}' reported none of {REPORTED[result['task']]}: {result['scores']}")
        found += [
            {"task": result["task"], "metric": s["metric"], "value": round(s["value"], 4), "samples": s["samples"],
             "interval": [round(v, 4) for v in s["interval"]], "data": title, "command": command}
            for s in scores
        ]  # fmt: skip
        print(f"{title}: " + ", ".join(f"{s['metric']} {s['value']:.3f}" for s in scores), file=log, flush=True)
    return found


def run(command: str, folder: Path) -> dict[str, Any]:
    """The JSON result of an ``edge-rsvlm eval`` command on the bundle in ``folder``."""
    program, *arguments = shlex.split(command)
    extra = ["--bundle", str(folder), "--allow-unsigned", "--json"]
    executable = str(Path(sys.executable).parent / program)
    done = subprocess.run([executable, *arguments, *extra], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"'{command}' failed: {done.stderr.strip()}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result
