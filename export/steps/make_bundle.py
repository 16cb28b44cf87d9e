"""Step ``make_bundle``: the proven draft with its golden probe, measured memory and the record of its steps."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edge_rsvlm.config.manifest import MANIFEST_NAME
from edge_rsvlm.export.artifact import Artifact
from edge_rsvlm.export.bundle_writer import (
    PROBE_FOLDER,
    bundle_folder,
    measured_memory,
    place,
    step_record,
    write_manifest,
)
from edge_rsvlm.export.proof.language_probe import TASK_PREFIX
from edge_rsvlm.export.steps.compile_onnx import BUNDLE
from edge_rsvlm.export.steps.parity import BY_ADAPTER, FAILED, PROBES

WORDS = ("prompt", "boxes", "memory")
MEASURED_BYTES = 1 << 30
"""Larger sessions keep their estimate: an export shall not need the memory of its model."""
FLOAT_TOLERANCE, INTEGER_TOLERANCE = 5e-3, 5e-2
"""The same graph on another processor: sums in another order, and some activations in 8 bits rounded otherwise."""
LLAMA_TOLERANCE = 0.1
"""llama.cpp has other kernels for every processor, and they round activations to 8 bits in blocks of their own. Between
builds for SSE, AVX2 and AVX-512, logits moved by 0.3 % with the packaged decoder (Q4_0, Q8_0), and by 6 % with 24
layers of random weights (Q4_K_M), where little keeps words apart; the number of threads changed none."""


def make_bundle(
    steps: Sequence[Artifact], drafted: Artifact, probed: Artifact, allow: tuple[str, ...], out: Path,
    more: Mapping[str, Any],
) -> None:  # fmt: skip
    """Write the bundle to ``out``, with ``more`` fields of its manifest; it appears whole, or not at all."""
    draft = drafted.folder / BUNDLE
    fields: dict[str, Any] = json.loads((draft / MANIFEST_NAME).read_text())
    del fields["files"], fields["schema_version"]
    fields |= more
    with bundle_folder(out) as folder:
        for path in draft.iterdir():
            if path.name != MANIFEST_NAME:
                place(path, folder / path.name)
        golden = sorted((probed.folder / PROBES).iterdir())
        fields["probe"] = [_probe(path, folder, fields["graphs"]) for path in golden]
        fields["steps"] = [step_record(step, _allowed(step, allow)) for step in steps]
        write_manifest(folder, fields)
        _measure(folder, fields["tasks"])
        write_manifest(folder, fields)


def _allowed(step: Artifact, allow: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(gate for gate in allow if gate == step.manifest["stage"] and step.metrics.get(FAILED))


def _measure(folder: Path, tasks: dict[str, Any]) -> None:
    """Tasks that differ in what they ask alone take the same memory, and are measured once."""
    measured: dict[str, Any] = {}
    for verb, task in tasks.items():
        if task is None or task["memory"]["session_bytes"] > MEASURED_BYTES:
            continue
        key = json.dumps({name: value for name, value in task.items() if name not in WORDS})
        if key not in measured:
            measured[key] = measured_memory(folder, verb)
        task["memory"] = measured[key]


def _probe(path: Path, folder: Path, graphs: Mapping[str, Any]) -> dict[str, Any]:
    (folder / PROBE_FOLDER).mkdir(exist_ok=True)
    shutil.copyfile(path, folder / PROBE_FOLDER / path.name)
    if path.stem.startswith(TASK_PREFIX):
        verb = path.stem.removeprefix(TASK_PREFIX)
        return {"task": verb, "file": f"{PROBE_FOLDER}/{path.name}", "tolerance": LLAMA_TOLERANCE}
    graph, _, adapter = path.stem.partition(BY_ADAPTER)
    tolerance = INTEGER_TOLERANCE if graphs[graph]["precision"].startswith("int") else FLOAT_TOLERANCE
    found = {"graph": graph, "file": f"{PROBE_FOLDER}/{path.name}", "tolerance": tolerance}
    return found | ({"adapter": adapter} if adapter else {})
