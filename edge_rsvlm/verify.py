"""Is this bundle whole, and does it compute here what it computed where it was made?"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_rsvlm.bundle import Bundle, Rules, candidate
from edge_rsvlm.bundle.contents import COPY_AGAIN, Problem
from edge_rsvlm.bundle.zips import ZIP_ERRORS, open_zip
from edge_rsvlm.config.manifest import Manifest, ProbeCase
from edge_rsvlm.config.offered import by_llama, task_of
from edge_rsvlm.config.task_specs import GenerateTask, GgufTask
from edge_rsvlm.errors import BudgetError, BundleError
from edge_rsvlm.pipeline.adapters import read_adapter
from edge_rsvlm.pipeline.runtime import Runtime, cpu_engine
from edge_rsvlm.pipeline.vocabulary import vocabulary_of
from edge_rsvlm.tasks.gguf import GgufGenerator
from edge_rsvlm.tasks.search import follow
from edge_rsvlm.tasks.vocabulary import read_vocabulary
from edge_rsvlm.types import InferenceSession, Prompt

MOST_PROBE_BYTES = 1 << 30
_INPUT, _OUTPUT = "in.", "out."
OTHER_MACHINE = "do not use the bundle on this machine, and export it again"

OpenGraph = Callable[[Path], InferenceSession]
Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class ProbeResult:
    """One golden output: the greatest difference, as a share of the greatest absolute value that it should have."""

    graph: str
    output: str
    difference: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return bool(self.difference <= self.tolerance)


@dataclass(frozen=True)
class Report:
    """All that is wrong, and what the golden probe gave; it is replayed only where nothing is wrong before."""

    manifest: Manifest | None
    trusted_by: str | None
    problems: tuple[Problem, ...]
    probe: tuple[ProbeResult, ...] = ()

    @property
    def passed(self) -> bool:
        return not self.problems


def verify(path: Path | None, rules: Rules, open_graph: OpenGraph | None = None) -> Report:
    """Check the bundle in a folder or file (None: the packaged one). Nothing is remembered as accepted.

    BundleError where there is no bundle to speak of, UsageError where what runs it is not installed.
    """
    problems: list[Problem] = []
    with candidate(path, rules) as found:
        try:
            problems += found.problems()
        except BundleError as exc:
            problems.append(Problem.of("unreadable", exc))
        if problems:
            return Report(found.manifest, found.trusted_by, tuple(problems))
        bundle = found.bundle()
        problems += vocabulary_problems(bundle)
        results: list[ProbeResult] = []
        for case in bundle.manifest.probe:
            try:
                results += replay(bundle, case, open_graph or cpu_graph)
            except (BundleError, BudgetError) as exc:
                problems.append(Problem.of("probe", exc))
        problems += [_failure(result) for result in results if not result.passed]
        return Report(bundle.manifest, bundle.trusted_by, tuple(problems), tuple(results))


def vocabulary_problems(bundle: Bundle) -> Iterator[Problem]:
    """Files of words that are none."""
    tasks = [task for _, task in bundle.manifest.tasks if task is not None]
    for name in dict.fromkeys(name for task in tasks if (name := vocabulary_of(task)) is not None):
        try:
            read_vocabulary(bundle.path(name))
        except BundleError as exc:
            yield replace(Problem.of("vocabulary", exc), file=name)


def cpu_graph(path: Path) -> InferenceSession:
    """The graph on one thread of onnxruntime, imported here: a bundle that is not whole needs no engine."""
    from edge_rsvlm.engines.onnxruntime import OnnxRuntimeEngine

    return OnnxRuntimeEngine(threads=1).open(path)


def replay(bundle: Bundle, case: ProbeCase, open_graph: OpenGraph = cpu_graph) -> list[ProbeResult]:
    """Run a graph or a task on its golden inputs; one result per golden output. BundleError where it does not run."""
    golden = _load(bundle.path(case.file), case.file)
    inputs = {name.removeprefix(_INPUT): array for name, array in golden.items() if name.startswith(_INPUT)}
    expected = {name.removeprefix(_OUTPUT): array for name, array in golden.items() if name.startswith(_OUTPUT)}
    if not expected or len(inputs) + len(expected) < len(golden):
        raise BundleError(f"'{case.file}' is no golden probe: it needs arrays in.NAME and out.NAME", fix=COPY_AGAIN)
    if case.graph is None:
        actual = _run_task(bundle, case, inputs)
    else:
        actual = _run_graph(bundle, case, inputs, list(expected), open_graph)
    if missing := expected.keys() - actual.keys():
        raise BundleError(f"'{case.file}' wants outputs that do not exist: {', '.join(missing)}", fix=COPY_AGAIN)
    by = "" if case.adapter is None else f" by adapter {case.adapter}"
    return [
        ProbeResult(case.graph or f"task {case.task}", f"{name}{by}", difference(actual[name], wanted), case.tolerance)
        for name, wanted in expected.items()
    ]


def _run_graph(bundle: Bundle, case: ProbeCase, inputs: Arrays, outputs: list[str], open_graph: OpenGraph) -> Arrays:
    assert case.graph is not None
    factors = {} if case.adapter is None else read_adapter(bundle, case.adapter).get(case.graph, {})
    session = open_graph(bundle.path(bundle.manifest.graphs[case.graph].file))
    return dict(zip(outputs, session.run(inputs | dict(factors), outputs), strict=True))


def _run_task(bundle: Bundle, case: ProbeCase, inputs: Arrays) -> Arrays:
    assert case.task is not None
    try:
        return {"logits": answer_logits(bundle, case.task, inputs)}
    except KeyError as exc:
        raise BundleError(f"'{case.file}' lacks the array in.{exc.args[0]}", fix=COPY_AGAIN) from exc


def answer_logits(bundle: Bundle, verb: str, inputs: Arrays) -> NDArray[np.float32]:
    """Logits [A, V] by which llama.cpp, on one thread, would choose the tokens of an answer; see ProbeCase.

    BundleError for a task whose words are not written by llama.cpp, KeyError for inputs that lack one.
    """
    runtime, task = Runtime(bundle, cpu_engine(1, 0)), task_of(bundle.manifest, verb)
    answer_A = inputs["answer"].astype(np.int64)
    if isinstance(task, GgufTask):
        generator = runtime.generator(verb, task)
        assert isinstance(generator, GgufGenerator)
        return generator.follow_pixels(inputs["image"], str(inputs["text"]), answer_A)
    if not isinstance(task, GenerateTask) or not by_llama(task):
        raise BundleError(f"a golden probe of {verb}, which llama.cpp does not do", fix=COPY_AGAIN)
    prompt = Prompt(inputs["ids"], inputs["visual"].astype(bool), inputs["features"], inputs["positions"])
    logits_1V, advance = runtime.language(task).start(prompt)
    return follow(logits_1V, advance, answer_A)


def difference(actual: NDArray[Any], expected: NDArray[Any]) -> float:
    """Greatest absolute difference as a share of the greatest absolute expected value.

    Infinite for another shape, other texts, or where one is not finite and the other is not the same; the plain
    difference where every expected value is 0.
    """
    if actual.shape != expected.shape:
        return float("inf")
    if not (np.issubdtype(expected.dtype, np.number) or expected.dtype == np.bool_):
        return 0.0 if np.array_equal(actual.astype(str), expected.astype(str)) else float("inf")
    if not (np.issubdtype(actual.dtype, np.number) or actual.dtype == np.bool_):
        return float("inf")
    wanted, found = expected.astype(np.float64), actual.astype(np.float64)
    odd = ~(np.isfinite(wanted) & np.isfinite(found))
    if not np.array_equal(wanted[odd], found[odd], equal_nan=True):
        return float("inf")
    wanted, found = wanted[~odd], found[~odd]
    scale = float(np.abs(wanted).max(initial=0.0)) or 1.0
    return float(np.abs(found - wanted).max(initial=0.0)) / scale


def _failure(result: ProbeResult) -> Problem:
    text = f"'{result.graph}' gives another '{result.output}' here: off by {result.difference:.2e}"
    return Problem("probe", f"{text}, at most {result.tolerance:.0e} is allowed", OTHER_MACHINE)


def _load(path: Path, name: str) -> Arrays:
    """The arrays of an ``.npz``, none of them pickled; BundleError where it is none."""
    try:
        with path.open("rb") as file:
            unpacked_bytes = sum(member.file_size for member in _members(file))
            if unpacked_bytes > MOST_PROBE_BYTES:
                raise BundleError(f"'{name}' would unpack to {unpacked_bytes} bytes", fix="do not use this bundle")
        with np.load(path, allow_pickle=False) as stored:
            return {key: stored[key] for key in stored.files}
    except (*ZIP_ERRORS, TypeError, KeyError, SyntaxError, MemoryError) as exc:
        raise BundleError(f"'{name}' is no .npz that can be read: {exc}", fix=COPY_AGAIN) from exc


def _members(file: Any) -> Iterator[zipfile.ZipInfo]:
    with open_zip(file) as archive:
        yield from archive.infolist()
