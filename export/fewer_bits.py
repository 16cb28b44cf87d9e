"""The part of the chain that makes a proven bundle smaller: calibrate -> quantize -> accuracy."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from edge_rsvlm.bundle import Bundle, load_bundle
from edge_rsvlm.config.manifest import Calibration
from edge_rsvlm.errors import BundleError, UsageError
from edge_rsvlm.export.artifact import Artifact, file_hash
from edge_rsvlm.export.proof.accuracy import Compared, compare_answers, compare_labelled, listed_by, open_session
from edge_rsvlm.export.proof.gates import table
from edge_rsvlm.export.quantize.calibration import Samples, chosen, listed, record, short_name, spread
from edge_rsvlm.export.quantize.likeness import distance_warning, likeness, resolution_warning
from edge_rsvlm.export.recipe import Recipe
from edge_rsvlm.export.steps.compile_gguf import LanguageWriter
from edge_rsvlm.export.steps.compile_onnx import BUNDLE
from edge_rsvlm.export.steps.parity import FAILED, PROBES
from edge_rsvlm.export.steps.quantize import calibrated, chosen_precisions, quantize
from edge_rsvlm.export.steps.search import CHOICE, Search, applied
from edge_rsvlm.raster.inputs import Source

CALIBRATION, COMPARISONS, SAMPLES = "calibration.json", "comparisons.json", "samples"
ACCURACY = "accuracy"
UNSEEN_IMAGES = 16
"""Images that had no part in the calibration, for tasks that have no labels."""
RECORD_BYTES = 32 << 10
"""What a bundle says of its steps and its memory, written last."""
JUDGING_IMAGES = 64
"""Images of a task that has labels, for what labels do not judge."""


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
    language: LanguageWriter | None = None
    """What writes the text model for llama.cpp, where the target is GGUF."""

    def run(self, compiled: Artifact, proven: Artifact) -> Smaller:
        """UsageError without calibration images where they are needed, BundleError when a task loses too much."""
        before = _bundle(compiled)
        if self.recipe.goal is not None:
            return self._searched(compiled, proven, before)
        precisions = chosen_precisions(self.recipe, before.manifest, before.folder)
        wanted = calibrated(self.recipe, precisions.values()) or (self.language and self.recipe.calibration)
        return self._smaller(compiled, proven, self._calibrated(compiled, before) if wanted else None)

    def _smaller(self, compiled: Artifact, proven: Artifact, calibrated: Artifact | None) -> Smaller:
        quantized = self._quantized(compiled, proven, calibrated)
        judged = self._judged(compiled, quantized, calibrated)
        fields: dict[str, Any] = {"comparisons": json.loads((judged.folder / COMPARISONS).read_text())}
        if calibrated is not None:
            fields["calibration"] = json.loads((calibrated.folder / CALIBRATION).read_text())
        made = (calibrated, quantized, judged)
        return Smaller(tuple(step for step in made if step is not None), quantized, quantized, fields)

    def _searched(self, compiled: Artifact, proven: Artifact, before: Bundle) -> Smaller:
        """What the goal asks for. Tables and plot of the search are kept beside the bundle."""
        calibrated = self._calibrated(compiled, before)
        config = self._said() | {"goal": self.recipe.goal, "evaluate": self._labels()}

        def make(folder: Path) -> dict[str, Any]:
            search = Search(self.recipe, before, Samples(calibrated.folder / SAMPLES), self.progress("search"))
            steps = compiled, proven, calibrated
            return search.run(
                folder, lambda recipe: self._lost(recipe, *steps), lambda recipe: self._bytes(recipe, *steps)
            )

        searched = self.step("search", config, [compiled, calibrated], make)
        kept = self.recipe.out.with_name(f"{self.recipe.out.name}.search")
        shutil.copytree(searched.folder, kept, dirs_exist_ok=True)
        chosen = replace(self, recipe=applied(self.recipe, json.loads((searched.folder / CHOICE).read_text())))
        found = chosen._smaller(compiled, proven, calibrated)
        return replace(found, steps=(searched, *found.steps))

    @contextmanager
    def _tried(self, recipe: Recipe, compiled: Artifact, proven: Artifact, calibrated: Artifact) -> Iterator[Path]:
        """The folder of step ``quantize`` of a candidate, for a while."""
        draft, probes, samples = compiled.folder / BUNDLE, proven.folder / PROBES, Samples(calibrated.folder / SAMPLES)
        with tempfile.TemporaryDirectory(prefix="search-") as folder:
            quantize(recipe, draft, probes, samples, Path(folder), self.progress("search: quantize"))
            yield Path(folder)

    def _lost(self, recipe: Recipe, *steps: Artifact) -> float:
        """The greatest loss of a task by its labels, in points."""
        # A candidate is judged on this machine: no graphs for TensorRT.
        with self._tried(recipe.model_copy(update={"engines": ("onnxruntime",)}), *steps) as folder:
            after = load_bundle(folder / BUNDLE, allow_unsigned=True, allow_older=True)
            found = compare_labelled("search", _bundle(steps[0]), after, recipe.evaluate, self.progress("search"))
        return 100 * max(comparison.loss for comparison in found.comparisons)

    def _bytes(self, recipe: Recipe, *steps: Artifact) -> int:
        """Of all files of the bundle, with its probes and what it will record."""
        with self._tried(recipe, *steps) as folder:
            files = [path for part in (BUNDLE, PROBES) for path in (folder / part).rglob("*") if path.is_file()]
            return sum(path.stat().st_size for path in files) + RECORD_BYTES

    def _said(self) -> dict[str, Any]:
        return self.recipe.model_dump(
            mode="json", include={"target", "engines", "precision", "int8", "int4", "gguf", "tensorrt"}
        )

    def _labels(self) -> list[dict[str, Any]]:
        choices = self.recipe.evaluate
        return [choice.model_dump(mode="json") | {"labels": _identity(choice.labels)} for choice in choices]

    def _calibrated(self, compiled: Artifact, before: Bundle) -> Artifact:
        images = self.recipe.calibration
        if images is None:
            raise UsageError(
                f"{self.recipe.target} needs images to find its ranges by",
                fix='add [calibration] images = "FOLDER" to the recipe, or give --calibration FOLDER',
            )
        config = images.model_dump(mode="json", exclude={"images", "pairs", "without"}) | {
            "images": [_identity(place) for place in images.images],
            "pairs": images.pairs and _identity(images.pairs),
            "without": [_identity(file) for file in images.without],
        }

        def make(folder: Path) -> dict[str, Any]:
            report = self.progress("calibrate")
            _, found = record(before, images, folder / SAMPLES, lambda done, total: report("images", done, total))
            found = self._compared_with_target(before, found)
            (folder / CALIBRATION).write_text(found.model_dump_json(indent=1) + "\n")
            return {"images": len(found.images)}

        return self.step("calibrate", config, [compiled], make)

    def _compared_with_target(self, before: Bundle, found: Calibration) -> Calibration:
        """With what is to be told about images unlike those that judge."""
        assert self.recipe.calibration is not None
        session = open_session(before)
        used = chosen(self.recipe.calibration)
        judges = [source for choice in self.recipe.evaluate for source in listed_by(choice)]
        distance = likeness(session, used, judges) if judges else None
        told = (resolution_warning(session, used), None if distance is None else distance_warning(distance))
        warnings = tuple(sentence for sentence in told if sentence is not None)
        return found.model_copy(update={"distance": distance, "warnings": warnings})

    def _quantized(self, compiled: Artifact, proven: Artifact, calibrated: Artifact | None) -> Artifact:
        samples = None if calibrated is None else Samples(calibrated.folder / SAMPLES)

        def make(folder: Path) -> dict[str, Any]:
            draft, probes = compiled.folder / BUNDLE, proven.folder / PROBES
            return quantize(self.recipe, draft, probes, samples, folder, self.progress("quantize"), self.language)

        parents = [compiled, proven, *([calibrated] if calibrated else [])]
        return self.step("quantize", self._said(), parents, make)

    def _judged(self, compiled: Artifact, quantized: Artifact, calibrated: Artifact | None) -> Artifact:
        config = {"evaluate": self._labels(), "allow": list(self.recipe.allow)}

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
        everything = [source for place in listed(images) for source in place]
        unseen = [source for source in everything if short_name(source) not in used] or everything
        judged: dict[str, list[Source]] = {
            choice.task: spread(
                [source for source in listed_by(choice) if short_name(source) not in used], JUDGING_IMAGES
            )
            for choice in self.recipe.evaluate
        }
        checks = compare_answers(before, after, spread(unseen, UNSEEN_IMAGES), images.texts, judged, report)
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
