"""What every graph is fed while the runtime itself runs over images like those of the mission.

So pixels of the calibration are pixels of the device, and what a head or a decoder reads is what the graphs before it
gave. ``recording`` says which calls are kept; they are read again one at a time.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from edge_rsvlm.budget import Demand, MemoryPlan
from edge_rsvlm.bundle import Bundle
from edge_rsvlm.config.manifest import Calibration, Manifest
from edge_rsvlm.config.task_specs import GenerateTask, GgufDecoder, GgufTask, OpenDetectTask, TextDetectTask
from edge_rsvlm.errors import InputError, UsageError
from edge_rsvlm.evaluate.labels import read_names, read_pairs
from edge_rsvlm.export.graphs.sliced import WHOLE_BYTES, weight_bytes
from edge_rsvlm.export.quantize.recording import RecordingEngine
from edge_rsvlm.export.quantize.settings import CalibrationImages
from edge_rsvlm.pipeline.detect import DetectQuery
from edge_rsvlm.pipeline.engines import CpuEngine
from edge_rsvlm.pipeline.runtime import Engine
from edge_rsvlm.pipeline.session import Limits, Session, georeference
from edge_rsvlm.pipeline.vocabulary import understood
from edge_rsvlm.raster.inputs import Source, list_inputs
from edge_rsvlm.tasks.search import Sampling

Arrays = dict[str, NDArray[Any]]
Progress = Callable[[int, int], None]
"""Images done, images in all."""

GRAPH_BYTES = 1 << 30
"""What the calls of one graph may take of the disk."""
ANSWER_TOKENS, SLICED_TOKENS = 16, 2
UNBOUNDED, ANY_MEMORY = 0, 1 << 50


class Samples:
    """Recorded calls by the name of their graph."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def of(self, graph: str) -> Sequence[Arrays]:
        """Inputs by their names in the graph, in the order of the calls; each is read when it is asked for."""
        return _Calls(tuple(sorted((self._folder / graph).glob("*.npz"))))


@dataclass(frozen=True)
class _Calls(Sequence[Arrays]):
    paths: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.paths)

    @overload
    def __getitem__(self, index: int) -> Arrays: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Arrays]: ...
    def __getitem__(self, index: int | slice) -> Arrays | Sequence[Arrays]:
        if isinstance(index, slice):
            return _Calls(self.paths[index])
        with np.load(self.paths[index], allow_pickle=False) as stored:
            return {key.removeprefix("in."): _widened(stored[key]) for key in stored.files}


def _widened(array: NDArray[Any]) -> NDArray[Any]:
    return array.astype(np.float32) if array.dtype == np.float16 else array


@dataclass
class _OneByOne(Session):
    """A session whose batches hold one tile: calls are then alike whatever the image's size."""

    def admit(self, needs: Demand) -> MemoryPlan:
        return replace(super().admit(needs), batch=1)


def record(
    bundle: Bundle,
    images: CalibrationImages,
    folder: Path,
    progress: Progress,
    engine: Engine | None = None,
    most_bytes: int = GRAPH_BYTES,
) -> tuple[Samples, Calibration]:
    """Run every task of ``bundle`` over ``images`` and leave what the graphs were fed in ``folder``.

    Tasks that take words get those of ``images.texts``, phrases for objects those of them that are understood, or are
    left out where there are none; two dates are an image and the one before it, or itself where the two do not match.
    UsageError where there is no image, InputError for one that cannot be read. ``engine`` stands in for ONNX Runtime
    and llama.cpp in tests.
    """
    sources = chosen(images)
    recorder = RecordingEngine(engine or CpuEngine(1, UNBOUNDED), bundle, folder, most_bytes)
    session = _OneByOne(bundle, Limits(ANY_MEMORY), lambda *_: recorder)
    pairs = _pairs(bundle, images)
    phrases = understood(bundle, "ground", images.texts) if bundle.manifest.tasks.ground else ()
    run = _Run(session, images.texts, phrases, _tokens(bundle), bool(pairs))
    for index, source in enumerate(sources):
        progress(index, len(sources))
        recorder.image = index
        run.image(index, source.path, sources[max(index - 1, 0)].path)
    for index, (before, after) in enumerate(pairs, len(sources)):
        recorder.image = index
        session.change(before.path, after.path, _nowhere)
    progress(len(sources), len(sources))
    used = [*sources, *(date for pair in pairs for date in pair)]
    return Samples(folder), Calibration(images=tuple(source.name for source in used), sha256=_digest(used))


def listed(images: CalibrationImages) -> list[list[Source]]:
    """The images of every place that may calibrate, sorted by name; UsageError for a place without one."""
    barred = _barred(images)
    return [[source for source in _of_place(place) if _name(source) not in barred] for place in images.images]


def _barred(images: CalibrationImages) -> set[str]:
    return {name for file in images.without for name in read_names(file)}


def _name(source: Source) -> str:
    return source.name.rpartition("/")[2]


def _of_place(place: Path) -> list[Source]:
    found = sorted(list_inputs([str(place)]), key=lambda source: source.name)
    if len(found) == 1 and not Path(found[0].name).is_file() and found[0].path == found[0].name:
        raise UsageError(f"{place} holds no image", fix="name a folder, a glob or a .tar of images")
    return [replace(source, name=short_name(source)) for source in found]


def short_name(source: Source) -> str:
    """An image's name as a bundle may tell it, which travels: of a file its folder's and its own, not where it lies."""
    return "/".join(Path(source.name).absolute().parts[-2:]) if source.name == source.path else source.name


def chosen(images: CalibrationImages) -> list[Source]:
    """Those that calibrate."""
    each = math.ceil(images.count / len(images.images))
    return [source for found in listed(images) for source in spread(found, each)]


def spread(sources: Sequence[Source], count: int) -> list[Source]:
    """At most ``count`` of them, at even distances."""
    places = np.linspace(0, len(sources) - 1, min(count, len(sources)))
    return [sources[int(place)] for place in places.round()]


def _pairs(bundle: Bundle, images: CalibrationImages) -> list[tuple[Source, Source]]:
    if images.pairs is None or bundle.manifest.tasks.change is None:
        return []
    barred = _barred(images)
    named = read_pairs(images.pairs).items()
    return [
        (Source(f"{name}/t1", before), Source(f"{name}/t2", after))
        for name, (before, after, _) in named
        if name not in barred
    ]


def _digest(sources: Sequence[Source]) -> str:
    digest = hashlib.sha256()
    for source in sources:
        digest.update(source.name.encode() + hashlib.sha256(_bytes(source.path)).digest())
    return digest.hexdigest()


def _bytes(path: str) -> bytes:
    """The encoded image: a file, or a member of an archive as ``list_inputs`` names it."""
    if not path.startswith("/vsisubfile/"):
        return Path(path).read_bytes()
    place, _, archive = path.removeprefix("/vsisubfile/").partition(",")
    start, size = map(int, place.split("_"))
    with Path(archive).open("rb") as file:
        file.seek(start)
        return file.read(size)


def _tokens(bundle: Bundle) -> int:
    """How far an answer goes: a decoder that runs a slice at a time reads all its weights for each token."""
    sizes = [weight_bytes(bundle.path(graph.file)) for graph in bundle.manifest.graphs.values()]
    return SLICED_TOKENS if max(sizes) > WHOLE_BYTES else ANSWER_TOKENS


@dataclass(frozen=True)
class _Run:
    """Every task of a bundle on one image after another."""

    session: Session
    texts: tuple[str, ...]
    phrases: tuple[str, ...]
    """Of the texts: phrases for objects may have fewer words than questions and classes."""
    tokens: int
    apart: bool
    """Changes have pairs of their own."""

    def image(self, index: int, path: str, before: str) -> None:
        tasks = self.session.tasks
        text = self.texts[index % len(self.texts)] if self.texts else None
        if _recorded(tasks.caption):
            self.session.caption(path, _nowhere, sampling=self._sampling(tasks.caption))
        if tasks.detect is not None and not isinstance(tasks.detect, OpenDetectTask):
            self.session.detect(path, DetectQuery(), _nowhere)
        if isinstance(tasks.detect, TextDetectTask):
            where = georeference(path)
            self.session.examples(path, [(0, 0, where.width, where.height)])
        if tasks.change is not None and not self.apart:
            self._change(before, path)
        if tasks.search is not None:
            self.session.embed(path, lambda *_: None)
        if text is not None:
            self._with_words(path, text)
        if _recorded(tasks.ground) and self.phrases:
            self.session.ground(path, self.phrases[index % len(self.phrases)], _nowhere)

    def _with_words(self, path: str, text: str) -> None:
        tasks = self.session.tasks
        if _recorded(tasks.ask) and getattr(tasks.ask, "input", None) is not None:
            self.session.ask(path, text, _nowhere, sampling=self._sampling(tasks.ask))
        if isinstance(tasks.detect, OpenDetectTask):
            self.session.detect(path, DetectQuery(self.texts), _nowhere)
        if tasks.classify is not None:
            self.session.classify(path, self.texts, _nowhere)
        if tasks.segment is not None:
            self.session.segment(path, self.texts, _nowhere)
        if tasks.search is not None:
            self.session.embed_text(text)

    def _change(self, before: str, after: str) -> None:
        try:
            self.session.change(before, after, _nowhere)
        except InputError:  # of another size or place
            self.session.change(after, after, _nowhere)

    def _sampling(self, task: object) -> Sampling:
        """The task's own search, cut short; where words are llama.cpp's, nothing is recorded of them."""
        if not isinstance(task, GenerateTask) or isinstance(task.decoder, GgufDecoder):
            return Sampling(temperature=0.0, max_tokens=1)
        return Sampling(temperature=0.0, max_tokens=min(self.tokens, task.max_tokens))


def _recorded(task: object) -> bool:
    """Whether a task has graphs that could be recorded."""
    return task is not None and not isinstance(task, GgufTask)


def _nowhere(record: dict[str, Any], geometry: dict[str, Any] | None) -> None:
    """Results are not wanted."""


def graphs_without_calls(manifest: Manifest, samples: Samples) -> list[str]:
    """Graphs that no image reached, such as those of words where no texts were given."""
    return [name for name in manifest.graphs if not samples.of(name)]
