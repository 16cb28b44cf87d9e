"""The chain of an export: checkpoint -> merge_lora -> compile_onnx -> parity -> make_bundle.

Every step leaves an artifact under the recipe's work folder; one whose inputs and settings did not change is reused,
so a killed export goes on where it stopped.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from edge_rsvlm import __version__
from edge_rsvlm.bundle import Rules, load_bundle
from edge_rsvlm.errors import BundleError, UsageError
from edge_rsvlm.export.adapters.kept import KeptAdapter, check_names, keep_apart
from edge_rsvlm.export.adapters.reading import Adapter, read_adapter
from edge_rsvlm.export.adapters.resolve import Resolution
from edge_rsvlm.export.artifact import Artifact, build, file_hash, tools
from edge_rsvlm.export.checkpoint.reading import Checkpoint, LazyTensor, has_weights
from edge_rsvlm.export.checkpoint.skeleton import skeleton
from edge_rsvlm.export.explain import explain, explain_foreign, misfit
from edge_rsvlm.export.families.base import Family, Source
from edge_rsvlm.export.families.registry import family_of, open_source
from edge_rsvlm.export.fewer_bits import FewerBits
from edge_rsvlm.export.gguf.pair import gguf_files, read_pair
from edge_rsvlm.export.graphs.sliced import open_graph
from edge_rsvlm.export.onnx_folder.reading import layout, read_onnx_folder
from edge_rsvlm.export.precheck import check_places
from edge_rsvlm.export.proof.gates import table
from edge_rsvlm.export.recipe import Recipe
from edge_rsvlm.export.steps.compile_gguf import LanguageWriter
from edge_rsvlm.export.steps.compile_onnx import compile_onnx
from edge_rsvlm.export.steps.make_bundle import make_bundle
from edge_rsvlm.export.steps.merge_lora import ModelWeights, merge_lora, merged_weights, resolution
from edge_rsvlm.export.steps.parity import Parity, parity
from edge_rsvlm.export.steps.take_gguf import check_recipe, explain_pair, take_gguf
from edge_rsvlm.export.steps.take_onnx import take_onnx
from edge_rsvlm.verify import verify

Report = Callable[[str, int, int], None]
"""(step, done, in all)."""
PARITY = "parity"


@dataclass(frozen=True)
class Chain:
    """One export under way."""

    recipe: Recipe
    report: Report

    @cached_property
    def checkpoint(self) -> Checkpoint:
        return open_source(self.recipe.checkpoint)

    @cached_property
    def family(self) -> Family:
        return family_of(self.checkpoint.config)

    @property
    def source(self) -> Source:
        return Source(self.checkpoint.folder, self.checkpoint.config)

    @cached_property
    def tensors(self) -> Mapping[str, LazyTensor]:
        return self.checkpoint.weights(self.family.model_class(self.checkpoint.config))

    @cached_property
    def adapters(self) -> tuple[Adapter, ...]:
        """Those that are merged."""
        return tuple(read_adapter(choice.path, choice.weight) for choice in self.recipe.merged)

    @cached_property
    def resolution(self) -> Resolution:
        return resolution(self.checkpoint, self.family.model_class(self.checkpoint.config), self.adapters)

    def _kept(self, weights: ModelWeights) -> tuple[KeptAdapter, ...]:
        empty = skeleton(self.family.model_class(weights.config), weights.config)
        return tuple(
            keep_apart(choice.bundle_name, read_adapter(choice.path, choice.weight), empty, weights.tensors)
            for choice in self.recipe.kept
        )

    def run(self) -> Path:
        """Every step; returns the bundle's folder."""
        check_places(self.recipe)
        if self.foreign:
            return self._run_onnx() if layout(self.recipe.checkpoint) else self._run_gguf()
        self._read_all()
        check_names([choice.bundle_name for choice in self.recipe.kept])
        checked = self._checked(self.family.name)
        steps = [checked]
        weights = ModelWeights(self.checkpoint.config, self.tensors)
        if self.adapters:
            merged = self._merged(checked)
            steps.append(merged)
            weights = merged_weights(self.checkpoint, self.tensors, merged.folder, merged.metrics["untied"])
        kept = self._kept(weights)
        compiled = self._compiled(steps[-1], weights, kept)
        proven = self._proven(checked, compiled, kept)
        source = Source(self.checkpoint.folder, weights.config)
        return self._bundled([*steps, compiled, proven], compiled, proven, self._language(source, weights))

    def _language(self, source: Source, weights: ModelWeights) -> LanguageWriter | None:
        if self.recipe.format != "gguf":
            return None
        return LanguageWriter(self.family, source, weights, self.recipe.gguf.vision)

    def _bundled(
        self, steps: list[Artifact], draft: Artifact, probed: Artifact, language: LanguageWriter | None = None
    ) -> Path:
        """Smaller where the recipe wants it, and written."""
        more: dict[str, Any] = {}
        if self.recipe.lowered:
            smaller = FewerBits(self.recipe, self._step, self._named_progress, language).run(draft, probed)
            steps, draft, probed, more = [*steps, *smaller.steps], smaller.draft, smaller.probed, smaller.fields
        self.report("make_bundle", 0, 1)
        make_bundle(steps, draft, probed, self.recipe.allow, self.recipe.out, more)
        self._verified()
        self.report("make_bundle", 1, 1)
        return self.recipe.out

    def _read_all(self) -> None:
        """Everything that was given, so that what cannot be used is told before the work starts."""
        self.family.describe(self.source)
        assert self.tensors is not None
        if self.adapters:
            assert self.resolution is not None
        if language := self._language(self.source, ModelWeights(self.checkpoint.config, self.tensors)):
            language.check()
            if self.recipe.kept:
                fix = "merge them (keep = false), or take an onnx target"
                raise UsageError("llama.cpp has no adapters to switch", fix=fix)
            if self.recipe.goal is not None:
                raise UsageError("a goal chooses among graphs, and llama.cpp has none", fix="give an onnx target")

    def _run_onnx(self) -> Path:
        """Graphs that others exported: there is no model to compare them with."""
        if self.recipe.adapters:
            raise UsageError("adapters cannot be merged into ONNX files", fix="export from the checkpoint's weights")
        checked = self._checked("onnx")

        def make(folder: Path) -> dict[str, Any]:
            return take_onnx(read_onnx_folder(self.recipe.checkpoint), self.recipe, folder)

        taken = self._step("take_onnx", self.recipe.settings, [checked], make)
        return self._bundled([checked, taken], taken, taken)

    def _run_gguf(self) -> Path:
        """What others made for llama.cpp, likewise."""
        check_recipe(self.recipe)
        pair = read_pair(self.recipe.checkpoint)
        checked = self._checked("gguf")
        make = partial(take_gguf, pair, self.recipe)
        taken = self._step("take_gguf", self.recipe.settings, [checked], make)
        return self._bundled([checked, taken], taken, taken)

    @property
    def foreign(self) -> bool:
        """Whether the folder holds ONNX or GGUF files that others exported, and no weights to make them from."""
        folder = self.recipe.checkpoint
        return (layout(folder) is not None or bool(gguf_files(folder))) and not has_weights(folder)

    def _checked(self, family: str) -> Artifact:
        """Hashes of everything in the folder: configs and tokenizers decide as much as weights do."""
        self.report("checkpoint", 0, 1)
        folder = self.recipe.checkpoint
        files = {str(p.relative_to(folder)): file_hash(p) for p in sorted(folder.rglob("*")) if p.is_file()}
        config = {"family": family, "files": files}

        def make(_: Path) -> dict[str, Any]:
            return {"family": family} | ({} if self.foreign else {"tensors": len(self.tensors)})

        return self._step("checkpoint", config, [], make)

    def _merged(self, checked: Artifact) -> Artifact:
        files = [_hashes(adapter.folder) for adapter in self.adapters]
        config = {"files": files, "weights": [adapter.weight for adapter in self.adapters]}

        def make(folder: Path) -> dict[str, Any]:
            return merge_lora(self.tensors, self.resolution, folder, self._progress("merge_lora"))

        return self._step("merge_lora", config, [checked], make)

    def _compiled(self, before: Artifact, weights: ModelWeights, adapters: Sequence[KeptAdapter]) -> Artifact:
        source = Source(self.checkpoint.folder, weights.config)
        files = {choice.bundle_name: [choice.weight, _hashes(choice.path)] for choice in self.recipe.kept}
        config = {**self.recipe.settings, "adapters": files}

        def make(folder: Path) -> dict[str, Any]:
            return compile_onnx(
                self.family, source, weights, self.recipe, adapters, folder, self._named_progress("compile_onnx")
            )

        return self._step("compile_onnx", config, [before], make)

    def _proven(self, checked: Artifact, compiled: Artifact, adapters: Sequence[KeptAdapter]) -> Artifact:
        def make(folder: Path) -> dict[str, Any]:
            metrics, compared = parity(
                self.family, self.checkpoint, self.tensors,
                self.resolution.updates if self.adapters else {}, adapters, compiled.folder, folder,
                self._named_progress(PARITY),
            )  # fmt: skip
            self._gate(compared)
            return metrics

        return self._step(PARITY, {"allowed": PARITY in self.recipe.allow}, [checked, compiled], make)

    def _gate(self, compared: Parity) -> None:
        if all(check.passed for check in compared.checks) or PARITY in self.recipe.allow:
            return
        layers = [f"{graph}: {line}" for graph, lines in compared.worst.items() for line in lines]
        raise BundleError(
            "\n".join(["the bundle does not compute what the checkpoint does", table(compared.checks), *layers]),
            fix="mend what the layers point to; --allow parity goes on and records it in the bundle",
        )

    def _verified(self) -> None:
        report = verify(self.recipe.out, Rules(allow_unsigned=True, allow_older=True), open_graph)
        if not report.passed:
            problems = "; ".join(problem.message for problem in report.problems)
            raise BundleError(f"the new bundle does not verify: {problems}", fix="remove it, and export it again")

    def _step(
        self, step: str, config: dict[str, Any], parents: list[Artifact], make: Callable[[Path], Mapping[str, Any]]
    ) -> Artifact:
        # By content: a parent that was made again, or altered together with its manifest, is another input.
        read = [parent.manifest["files"] for parent in parents]
        known = {**config, "read": read, "tools": {**tools(), "edge-rsvlm": __version__}}
        done = build(self.recipe.work_folder / step, step, known, parents, make)
        self.report(step, 1, 1)
        return done

    def _progress(self, step: str) -> Callable[[int, int], None]:
        return lambda done, total: self.report(step, done, total)

    def _named_progress(self, step: str) -> Callable[[str, int, int], None]:
        return lambda name, done, total: self.report(f"{step} {name}", done, total)


def _hashes(folder: Path) -> dict[str, str]:
    return {path.name: file_hash(path) for path in sorted(folder.iterdir()) if path.is_file()}


def run_export(recipe: Recipe, report: Report) -> Path:
    """Export as the recipe says. BundleError when a gate fails, InputError when the checkpoint cannot be read."""
    try:
        out = Chain(recipe, report).run()
    except OSError as exc:
        raise UsageError(
            f"{exc.filename or recipe.work_folder}: {exc.strerror or exc}",
            fix="make room or give access there, and run the same again: finished steps are kept",
        ) from exc
    if recipe.work is None:
        shutil.rmtree(recipe.work_folder)
    return out


def warnings(out: Path) -> tuple[str, ...]:
    """What the person who made the bundle should know of its calibration."""
    known = load_bundle(out, allow_unsigned=True, allow_older=True).manifest.calibration
    return known.warnings if known else ()


def explain_export(recipe: Recipe) -> str:
    """What would be done; nothing is."""
    chain = Chain(recipe, lambda *_: None)
    if not chain.foreign:
        return explain(recipe, chain.family, chain.source)
    return explain_foreign(recipe) if layout(recipe.checkpoint) else explain_pair(read_pair(recipe.checkpoint), recipe)


def misfit_of_export(recipe: Recipe) -> str | None:
    """What to tell who exports a model that will not fit the device; None where it will, or nobody knows."""
    chain = Chain(recipe, lambda *_: None)
    return None if chain.foreign else misfit(recipe, chain.family, chain.source)
