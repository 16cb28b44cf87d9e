"""What verbs share: option groups, limits, progress bars, and the exit code over many inputs."""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from edge_rsvlm.pipeline.detect import DetectQuery
    from edge_rsvlm.pipeline.examples import Example
    from edge_rsvlm.pipeline.outcome import Progress
    from edge_rsvlm.pipeline.session import Limits, Session
    from edge_rsvlm.tasks.generate import Sampling
    from edge_rsvlm.tasks.like import Examples

F = TypeVar("F", bound=Callable[..., Any])
EXIT_ORDER = (5, 2, 4, 3, 6, 0)
_ALLOW_OLDER, _DEVICE = "edge_rsvlm.allow_older", "edge_rsvlm.device"

_BUNDLE = [
    click.option(
        "--bundle",
        type=click.Path(path_type=Path),
        help="Bundle to use: a folder or an .ersvlm file.  [default: the packaged one]",
    ),
    click.option("--allow-unsigned", is_flag=True, help="Use a bundle without a trusted signature."),
    click.option(
        "--allow-older",
        is_flag=True,
        expose_value=False,  # only loading needs it, and asks with allow_older()
        callback=lambda context, _, value: context.meta.update({_ALLOW_OLDER: value}),
        help="Use a version older than one that was accepted before.",
    ),
]
device_option = click.option(
    "--device",
    type=click.Choice(["auto", "gpu", "cpu"]),
    default="auto",
    show_default=True,
    expose_value=False,  # only opening a session needs it
    callback=lambda context, _, value: context.meta.update({_DEVICE: value}),
    help="GPU needs engines that `engine build` made here; auto: the GPU where they are, else the CPU.",
)
_LIMITS = [
    device_option,
    click.option("--profile", default="host", show_default=True, help="Device whose memory is the limit."),
    click.option("--memory", metavar="SIZE", help="Memory budget, such as 512MiB; refused with exit 4 if too small."),
    click.option("--threads", type=click.IntRange(1, 256), help="CPU threads.  [default: all]"),
    click.option(
        "--resolution",
        type=click.FloatRange(min=0, min_open=True),
        metavar="METRES",
        help="Ground size of a model pixel, instead of the task's own range.",
    ),
]
_RUN = [click.option("--deadline", metavar="TIME", help="Per input, such as 30s; then a partial result and exit 6.")]
_SAMPLING = [
    click.option(
        "--temperature",
        type=click.FloatRange(0, 10, min_open=True),
        help="Draw words at random, sharper below 1.  [default: the likeliest words]",
    ),
    click.option(
        "--top-p",
        type=click.FloatRange(0, 1, min_open=True),
        help="Draw from the likeliest words that hold this share.  [default: from all]",
    ),
    click.option("--seed", type=click.IntRange(0), help="The same words are drawn for the same seed.  [default: 0]"),
    click.option(
        "--max-tokens", type=click.IntRange(1, 100_000), help="Longest answer in tokens.  [default: the bundle's]"
    ),
]


def _decorate(options: list[Any]) -> Callable[[F], F]:
    def apply(function: F) -> F:
        return functools.reduce(lambda f, option: option(f), reversed(options), function)

    return apply


bundle_options = _decorate(_BUNDLE)
trust_options = _decorate(_BUNDLE[1:])
plan_options = _decorate([*_BUNDLE, *_LIMITS])
run_options = _decorate([*_BUNDLE, *_LIMITS, *_RUN])
sampling_options = _decorate(_SAMPLING)
adapter_option = click.option("--adapter", metavar="NAME", help="Answer by this adapter of the bundle.")
json_option = click.option("--json", "as_json", is_flag=True, help="One JSON document per input on stdout.")


def make_limits(
    profile: str, memory: str | None, threads: int | None, resolution: float | None, deadline: str | None = None
) -> Limits:
    from edge_rsvlm import profiles
    from edge_rsvlm.config.units import parse_bytes, parse_seconds
    from edge_rsvlm.pipeline.session import Limits

    facts = profiles.load(profile)
    return Limits(
        memory_bytes=parse_bytes(memory) if memory else int(str(facts["memory_bytes"])),
        threads=threads or profiles.cpu_threads(),
        deadline_s=parse_seconds(deadline) if deadline else None,
        resolution_m=resolution,
    )


def make_sampling(options: dict[str, Any]) -> Sampling | None:
    """Takes the generation options out of ``options``; None where the bundle's own way of answering was asked for."""
    from edge_rsvlm.errors import UsageError
    from edge_rsvlm.tasks.generate import Sampling

    temperature, top_p, seed, max_tokens = (
        options.pop(name) for name in ("temperature", "top_p", "seed", "max_tokens")
    )
    if temperature is None and (top_p is not None or seed is not None):
        raise UsageError("--top-p and --seed draw words at random", fix="add --temperature 1")
    if temperature is None and max_tokens is None:
        return None
    return Sampling(
        temperature or 0.0,
        top_p=1.0 if top_p is None else top_p,
        seed=seed or 0,
        max_tokens=max_tokens,
    )


def make_query(session: Session, labels: Sequence[str], score: float | None, like: Sequence[str]) -> DetectQuery:
    """What detect looks for: by words, or by examples ``IMAGE#x,y,w,h``, which are embedded here.

    UsageError for what this bundle cannot look for, InputError for an example that cannot be used.
    """
    from edge_rsvlm.config.offered import detect_task
    from edge_rsvlm.errors import UsageError
    from edge_rsvlm.pipeline.detect import LIKE, DetectQuery, wanted_labels
    from edge_rsvlm.pipeline.examples import example_task, parse_example
    from edge_rsvlm.pipeline.vocabulary import check_texts
    from edge_rsvlm.tasks.like import Examples

    manifest = session.bundle.manifest
    if not like:
        query = DetectQuery(tuple(labels), score)
        wanted_labels(query, detect_task(manifest))
        check_texts(session.bundle, "detect", query.labels)
        return query
    if labels:
        raise UsageError("like and query exclude each other", fix="look for examples or for words")
    example_task(manifest)
    examples = {text: parse_example(text) for text in like}
    parts = [_embedded(session, text, example) for text, example in examples.items()]
    return DetectQuery(score_threshold=score, examples={LIKE: Examples.joined(parts)})


def _embedded(session: Session, text: str, example: Example) -> Examples:
    """What one example looks like."""
    from edge_rsvlm.errors import InputError
    from edge_rsvlm.pipeline.examples import HOW

    try:
        (found,), warnings = session.examples(example.image, [example.box])
    except InputError as exc:
        raise InputError(f"example '{text}': {exc}", fix=HOW) from exc
    for warning in warnings:
        click.echo(f"{example.image}: {warning}", err=True)
    return found


def split_labels(text: str) -> tuple[str, ...]:
    """``"a, b"`` -> ("a", "b"), each once; UsageError for none."""
    from edge_rsvlm.errors import UsageError

    labels = tuple(dict.fromkeys(label for part in text.split(",") if (label := part.strip())))
    if not labels:
        raise UsageError(f"--labels '{text}' names no class", fix="write them like airport,beach,forest")
    return labels


def open_session(
    bundle: Path | None, allow_unsigned: bool, limits: Limits, tasks: tuple[str, ...], adapter: str | None = None
) -> Session:
    """A session whose bundle does all of ``tasks`` and has ``adapter``; UsageError says what it has instead."""
    from edge_rsvlm.bundle import load_bundle
    from edge_rsvlm.pipeline.devices import place
    from edge_rsvlm.pipeline.session import Session

    loaded = load_bundle(bundle, allow_unsigned=allow_unsigned, allow_older=allow_older())
    placement = place(loaded, click.get_current_context().meta.get(_DEVICE, "auto"), adapter)
    if placement.note:
        click.echo(placement.note, err=True)
    session = Session(placement.bundle, limits, started=process_start(), adapter=adapter)
    if placement.device == "gpu":
        session.engine_factory = placement.engine
    session.require(*tasks)
    return session


def allow_older() -> bool:
    """Whether the running command was given --allow-older."""
    return bool(click.get_current_context().meta.get(_ALLOW_OLDER, False))


def process_start() -> float:
    """When this process began, on the monotonic clock: the deadline counts the interpreter's start too."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        uptime_s = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return time.monotonic()
    return time.monotonic() - (uptime_s - started_s)


class ExitCode:
    """Collects what happened to each input; the first that applies of 5, 2, 4, 3, 6, 0 is the command's exit code."""

    def __init__(self) -> None:
        self._seen = {0}

    @contextmanager
    def input(self, name: str) -> Iterator[None]:
        """Report an unusable or refused input in one line and go on to the next."""
        from edge_rsvlm.errors import BudgetError, InputError

        try:
            yield
        except (InputError, BudgetError) as exc:
            text = str(exc)
            click.echo(f"error: {text if name in text else f'{name}: {text}'}", err=True)
            self._seen.add(exc.exit_code)

    def add(self, exit_code: int) -> None:
        """Something else happened that was reported."""
        self._seen.add(exit_code)

    def partial(self, name: str, coverage: float) -> None:
        click.echo(f"{name}: deadline reached, {coverage:.1%} of the valid area was processed", err=True)
        self._seen.add(6)

    def leave(self) -> None:
        sys.exit(next(code for code in EXIT_ORDER if code in self._seen))


@contextmanager
def progress_bar(name: str, unit: str = "tiles") -> Iterator[Progress | None]:
    """A bar on stderr when a person is looking, nothing otherwise."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn(f"{{task.completed}}/{{task.total}} {unit}"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(name, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


class Outputs:
    """Where each input's file goes: ``--output`` itself for one input, a file in that folder for many."""

    def __init__(self, output: Path | None, count: int, suffix: str) -> None:
        from edge_rsvlm.errors import UsageError

        self._output, self._suffix, self._used = output, suffix, set[str]()
        self._folder = output is not None and (count > 1 or output.is_dir() or not output.suffix)
        if output and count > 1 and output.suffix:
            raise UsageError(f"--output {output} is one file for {count} inputs", fix="name a folder")
        if output:
            folder = output if self._folder else output.parent
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as exc:
                raise UsageError(f"cannot make {folder}: {exc.strerror}", fix="choose another --output") from exc

    def path(self, name: str) -> Path | None:
        if self._output is None or not self._folder:
            return self._output
        stem, n = Path(name).stem or "result", 1
        while (candidate := stem if n == 1 else f"{stem}-{n}") in self._used:
            n += 1
        self._used.add(candidate)
        return self._output / f"{candidate}{self._suffix}"
