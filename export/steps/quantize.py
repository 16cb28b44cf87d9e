"""Step ``quantize``: the graphs of a compiled bundle with fewer bits, and what they compute of the golden probe."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edge_rsvlm.bundle import Bundle, load_bundle
from edge_rsvlm.config.manifest import MANIFEST_NAME, Manifest
from edge_rsvlm.config.task_specs import GenerateTask, OnnxDecoder
from edge_rsvlm.errors import UsageError
from edge_rsvlm.export.bundle_writer import place, write_manifest
from edge_rsvlm.export.explain import memory_on_disk
from edge_rsvlm.export.gguf.quantizing import TYPES
from edge_rsvlm.export.graphs.sliced import open_graph, weight_bytes
from edge_rsvlm.export.proof.language_probe import write_language_probe
from edge_rsvlm.export.quantize.calibration import Samples
from edge_rsvlm.export.quantize.choose import int8_kind
from edge_rsvlm.export.quantize.dynamic import quantize_dynamic
from edge_rsvlm.export.quantize.settings import Precision
from edge_rsvlm.export.quantize.static import quantize_static
from edge_rsvlm.export.quantize.typed import half_precision
from edge_rsvlm.export.quantize.weight_only import quantize_int4
from edge_rsvlm.export.recipe import Recipe
from edge_rsvlm.export.steps.compile_gguf import LanguageWriter, decoder_graph
from edge_rsvlm.export.steps.compile_onnx import BUNDLE
from edge_rsvlm.export.steps.parity import BY_ADAPTER, PROBES
from edge_rsvlm.export.tensorrt.checked import checked
from edge_rsvlm.pipeline.adapters import read_adapter

Metrics = dict[str, float | int | str]
GraphProgress = Callable[[str, int, int], None]


def chosen_precisions(recipe: Recipe, manifest: Manifest, draft: Path) -> dict[str, Precision]:
    """Of every graph: as the recipe says, else as its target does. UsageError names a graph that is not there."""
    for section, names in (("precision", recipe.precision), ("tensorrt", recipe.tensorrt.graphs or ())):
        for name in names:
            if name not in manifest.graphs:
                raise UsageError(
                    f"[{section}] names '{name}', which is no graph of this model",
                    fix=f"graphs are {', '.join(manifest.graphs)}",
                )
    return {name: recipe.precision.get(name) or _by_target(recipe, manifest, draft, name) for name in manifest.graphs}


def calibrated(recipe: Recipe, precisions: Iterable[Precision]) -> bool:
    """Whether any of these precisions looks at images: weights that are only rounded need none."""
    looks = {"int8"} if recipe.int4.method == "rtn" else {"int8", "int4"}
    return not looks.isdisjoint(precisions)


def _for_tensorrt(recipe: Recipe, name: str) -> bool:
    wanted = recipe.tensorrt.graphs
    return "tensorrt" in recipe.engines and (wanted is None or name in wanted)


def _by_target(recipe: Recipe, manifest: Manifest, draft: Path, name: str) -> Precision:
    if recipe.bits == "int4" and name in _decoders(manifest):
        return "int4"
    # Beside a model of llama.cpp, what sees is as fast as it can be on a processor.
    if recipe.bits in ("int8", "int4") or recipe.bits in TYPES:
        return int8_kind(draft / manifest.graphs[name].file)
    return recipe.stored


def _decoders(manifest: Manifest) -> set[str]:
    decoders = [task.decoder for _, task in manifest.tasks if isinstance(task, GenerateTask)]
    return {decoder.graph for decoder in decoders if isinstance(decoder, OnnxDecoder)}


@dataclass(frozen=True)
class Quantizer:
    """One draft on its way to fewer bits."""

    recipe: Recipe
    draft: Path
    samples: Samples | None
    target: Path

    def graph(self, name: str, file: str, precision: Precision, tensorrt: Path | None) -> Metrics:
        """Write the graph, and the same for TensorRT where it is wanted."""
        source, out = self.draft / file, self.target / file
        if precision == "int8":
            return quantize_static(source, self._samples(name), self.recipe.int8, out, tensorrt)
        if precision == "int4":
            fed = () if self.recipe.int4.method == "rtn" else self._samples(name)
            return quantize_int4(source, fed, self.recipe.int4, out, tensorrt)
        if tensorrt is not None:
            half_precision(source, tensorrt)
        if precision == "int8-dynamic":
            return quantize_dynamic(source, self.recipe.int8, out)
        for path in (source, source.with_name(f"{file}.data")):
            if path.exists():
                place(path, self.target / path.name)
        return {}

    def _samples(self, name: str) -> Sequence[dict[str, Any]]:
        found = () if self.samples is None else self.samples.of(name)
        if not found:
            raise UsageError(
                f"no calibration image reached the graph '{name}'",
                fix=f'give more images or texts in [calibration], or keep it with [precision] {name} = "f16"',
            )
        return found


def quantize(
    recipe: Recipe, draft: Path, probes: Path, samples: Samples | None, folder: Path, progress: GraphProgress,
    language: LanguageWriter | None = None,
) -> Metrics:  # fmt: skip
    """Fill ``folder`` with ``bundle/`` and ``probes/``; ``language`` writes what llama.cpp is to run."""
    target = folder / BUNDLE
    target.mkdir()
    fields: dict[str, Any] = json.loads((draft / MANIFEST_NAME).read_text())
    manifest = Manifest.model_validate(fields)
    quantizer = Quantizer(recipe, draft, samples, target)
    metrics: Metrics = {}
    dropped = _replaced(language, manifest, recipe)
    for name, precision in chosen_precisions(recipe, manifest, draft).items():
        if name in dropped:
            del fields["graphs"][name]
            continue
        progress(name, 0, 1)
        graph = fields["graphs"][name]
        tensorrt = target / f"{name}.tensorrt.onnx" if _for_tensorrt(recipe, name) else None
        found = quantizer.graph(name, graph["file"], precision, tensorrt)
        metrics |= {f"{name} {key}": value for key, value in found.items()}
        graph["precision"] = precision
        if tensorrt is not None:
            known = checked(manifest, name, draft / graph["file"], tensorrt, probes / f"{name}.npz")
            metrics[f"{name} tensorrt"] = known.said
            if known.graph is not None:
                graph["tensorrt"] = known.graph.model_dump()
            else:
                progress(f"{name}: {known.said}", 0, 1)
        progress(name, 1, 1)
    written = _write_language(language, recipe, manifest, fields, samples, target, progress) if language else {}
    metrics |= {f"llama.cpp {key}": value for key, value in written.items()}
    _copy_others(draft, manifest, fields, target)
    _estimate(fields, target, int(written.get("cache bytes per token", 0)))
    del fields["files"], fields["schema_version"]
    write_manifest(target, fields)
    made = load_bundle(target, allow_unsigned=True, allow_older=True)
    _probe_again(made, probes, folder / PROBES)
    if language is not None:
        write_language_probe(made, folder / PROBES)
    return metrics | {"bytes": sum(path.stat().st_size for path in target.iterdir())}


def _write_language(
    language: LanguageWriter, recipe: Recipe, manifest: Manifest, fields: dict[str, Any], samples: Samples | None,
    target: Path, progress: GraphProgress,
) -> Metrics:  # fmt: skip
    """The model for llama.cpp, and the tasks of ``fields`` pointed at it."""
    decoder = decoder_graph(manifest)
    found = language.write(recipe.bits, target, samples, decoder, lambda done, all_: progress("llama.cpp", done, all_))
    language.point(fields, recipe.bits, int(found["context_tokens"]))
    return found


def _replaced(language: LanguageWriter | None, manifest: Manifest, recipe: Recipe) -> tuple[str, ...]:
    """Graphs whose work llama.cpp does; UsageError names one of them that [precision] wants otherwise."""
    dropped = language.replaces(manifest) if language else ()
    for name in recipe.precision:
        if name in dropped:
            raise UsageError(
                f"[precision] names '{name}', whose work llama.cpp does", fix=f"leave it out: {recipe.target} says it"
            )
    return dropped


def _estimate(fields: dict[str, Any], target: Path, per_token: int) -> None:
    """Memory of tasks that were too large to be measured; what is now small enough will be.

    llama.cpp copies weights into the layouts that it multiplies fastest, so that its files count whole; its caches
    take ``per_token`` bytes.
    """
    sizes = [(graph["precision"], weight_bytes(target / graph["file"])) for graph in fields["graphs"].values()]
    for task in fields["tasks"].values():
        if task and not task["memory"]["measured"]:
            tokens = task.get("decoder", task).get("context_tokens", 0) * task.get("beams", 1)
            gguf = [("gguf", path.stat().st_size) for path in target.glob("*.gguf") if tokens]
            every = [*sizes, *gguf, ("cache", tokens * per_token)]
            task["memory"]["session_bytes"] = memory_on_disk(every, {"": task})


def _copy_others(draft: Path, manifest: Manifest, fields: dict[str, Any], target: Path) -> None:
    """Tokenizers, lists of answers and adapters; not a tokenizer whose work llama.cpp does."""
    graphs = {graph.file for graph in manifest.graphs.values()}
    tokenizers = {task.tokenizer.file for _, task in manifest.tasks if isinstance(task, GenerateTask)}
    unused = {file for file in tokenizers if json.dumps(file) not in json.dumps(fields["tasks"])}
    taken = {MANIFEST_NAME, *graphs, *(f"{file}.data" for file in graphs), *unused}
    for path in draft.iterdir():
        if path.name not in taken:
            place(path, target / path.name)


def _probe_again(bundle: Bundle, probes: Path, folder: Path) -> None:
    """The golden inputs, and what the graphs compute of them now."""
    folder.mkdir()
    for path in sorted(probes.iterdir()):
        name, _, adapter = path.stem.partition(BY_ADAPTER)
        if name not in bundle.manifest.graphs:
            continue  # llama.cpp does its work
        factors = read_adapter(bundle, adapter)[name] if adapter else {}
        with np.load(path) as golden:
            inputs = {key.removeprefix("in."): golden[key] for key in golden.files if key.startswith("in.")}
            outputs = [key.removeprefix("out.") for key in golden.files if key.startswith("out.")]
        session = open_graph(bundle.path(bundle.manifest.graphs[name].file))
        found = dict(zip(outputs, session.run({**inputs, **factors}, outputs), strict=True))
        arrays = {f"in.{k}": v for k, v in inputs.items()} | {f"out.{k}": v for k, v in found.items()}
        np.savez_compressed(folder / path.name, **arrays)
