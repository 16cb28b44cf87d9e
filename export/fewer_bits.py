"""The part of the chain that makes a proven bundle smaller: calibrate -> quantize -> accuracy."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from edge_rsvlm.bundle import Bundle, load_bundle
from edge_rsvlm.config.manifest import Calibration
from edge_rsvlm.errors import BundleError, UsageError
from edge_rsvlm.export.artifact import Artifact, file_hash
from edge_rsvlm.export.proof.accuracy import Compared, compare_answers, compare_labelled
from edge_rsvlm.export.proof.gates import table
from edge_rsvlm.export.quantize.calibration import Samples, listed, record
from edge_rsvlm.export.recipe import Recipe
from edge_rsvlm.export.steps.compile_onnx import BUNDLE
from edge_rsvlm.export.steps.parity import FAILED, PROBES
from edge_rsvlm.export.steps.quantize import CALIBRATED, chosen_precisions, quantize

CALIBRATION, COMPARISONS, SAMPLES = "calibration.json", "comparisons.json", "samples"
ACCURACY = "accuracy"
UNSEEN_IMAGES = 16
"""Images that had no part in the calibration, for tasks that have no labels."""


class Step(Protocol):
    """Makes an artifact, or finds it made."""

    def __call__(
        self, step: str, config: dict[str, Any], parents: list[Artifact], make: Callable[[Path], Mapping[str, Any]]
    ) -> Artifact: ...


@dataclass(frozen=True)
class Smaller:
    """What goes into the bundle: draft and probes, and what the manifest tells of them."""

    steps: tuple[Artifact, ...]
    draft: Artifact
    probed: Artifact
    fields: dict[str, Any]


@dataclass(frozen=True)
class FewerBits:
    recipe: Recipe
    step: Step
    progress: Callable[[str], Callable[[str, int, int], None]]
    """Of a step by its name."""

    def run(self, compiled: Artifact, proven: Artifact) -> Smaller:
        """UsageError without calibration images where they are needed, BundleError when a task loses too much."""
        before = _bundle(compiled)
        precisions = chosen_precisions(self.recipe, before.manifest, before.folder)
        calibrated = self._calibrated(compiled, before) if set(CALIBRATED) & set(precisions.values()) else None
        quantized = self._quantized(compiled, proven, calibrated)
        judged = self._judged(compiled, quantized, calibrated)
        fields: dict[str, Any] = {"comparisons": json.loads((judged.folder / COMPARISONS).read_text())}
        if calibrated is not None:
            fields["calibration"] = json.loads((calibrated.folder / CALIBRATION).read_text())
        made = (calibrated, quantized, judged)
        return Smaller(tuple(step for step in made if step is not None), quantized, quantized, fields)

    def _calibrated(self, compiled: Artifact, before: Bundle) -> Artifact:
        images = self.recipe.calibration
        if images is None:
            raise UsageError(
                f"{self.recipe.target} needs images to find its ranges by",
                fix='add [calibration] images = "FOLDER" to the recipe, or give --calibration FOLDER',
            )
        config = images.model_dump(mode="json", exclude={"images"}) | {"images": _identity(images.images)}

        def make(folder: Path) -> dict[str, Any]:
            report = self.progress("calibrate")
            _, found = record(before, images, folder / SAMPLES, lambda done, total: report("images", done, total))
            (folder / CALIBRATION).write_text(found.model_dump_json(indent=1) + "\n")
            return {"images": len(found.images)}

        return self.step("calibrate", config, [compiled], make)

    def _quantized(self, compiled: Artifact, proven: Artifact, calibrated: Artifact | None) -> Artifact:
        said = self.recipe.model_dump(mode="json", include={"target", "engines", "precision", "int8", "int4"})
        samples = None if calibrated is None else Samples(calibrated.folder / SAMPLES)

        def make(folder: Path) -> dict[str, Any]:
            draft, probes = compiled.folder / BUNDLE, proven.folder / PROBES
            return dict(quantize(self.recipe, draft, probes, samples, folder, self.progress("quantize")))

        parents = [compiled, proven, *([calibrated] if calibrated else [])]
        return self.step("quantize", said, parents, make)

    def _judged(self, compiled: Artifact, quantized: Artifact, calibrated: Artifact | None) -> Artifact:
        labels = [
            choice.model_dump(mode="json") | {"labels": _identity(choice.labels)} for choice in self.recipe.evaluate
        ]
        config = {"evaluate": labels, "allow": list(self.recipe.allow)}

        def make(folder: Path) -> dict[str, Any]:
            found = self._compared(_bundle(compiled), _bundle(quantized), calibrated)
            self._gate(found)
            comparisons = [comparison.model_dump(mode="json") for comparison in found.comparisons]
            (folder / COMPARISONS).write_text(json.dumps(comparisons, indent=1) + "\n")
            metrics: dict[str, Any] = {check.name: check.value for check in found.checks}
            return metrics | {FAILED: sum(not check.passed for check in found.checks)}

        return self.step(ACCURACY, config, [compiled, quantized], make)

    def _compared(self, before: Bundle, after: Bundle, calibrated: Artifact | None) -> Compared:
        report = self.progress(ACCURACY)
        found = compare_labelled("quantize", before, after, self.recipe.evaluate, report)
        images = self.recipe.calibration
        if images is None:
            return found
        used = set() if calibrated is None else set(_calibration(calibrated).images)
        everything = listed(images.images)
        unseen = [source for source in everything if source.name not in used] or everything
        judged = {choice.task for choice in self.recipe.evaluate}
        checks = compare_answers(before, after, unseen[:UNSEEN_IMAGES], images.texts, judged, report)
        return Compared(found.comparisons, (*found.checks, *checks))

    def _gate(self, found: Compared) -> None:
        if all(check.passed for check in found.checks) or ACCURACY in self.recipe.allow:
            return
        raise BundleError(
            "\n".join(["fewer bits cost more than they may", table(found.checks)]),
            fix="keep graphs in more bits ([precision] GRAPH = \"f16\") or layers ([int8] keep = [...]), calibrate on"
            " images like those of the mission; --allow accuracy goes on and records it in the bundle",
        )  # fmt: skip


def _bundle(artifact: Artifact) -> Bundle:
    return load_bundle(artifact.folder / BUNDLE, allow_unsigned=True, allow_older=True)


def _calibration(artifact: Artifact) -> Calibration:
    return Calibration.model_validate_json((artifact.folder / CALIBRATION).read_text())


def _identity(path: Path) -> Any:
    """What decides whether images or labels are the same as before: files by name, size and hash."""
    if path.is_file():
        return file_hash(path)
    return {str(p.relative_to(path)): file_hash(p) for p in sorted(path.rglob("*")) if p.is_file()} or str(path)
