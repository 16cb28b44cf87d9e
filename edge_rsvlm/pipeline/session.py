"""Everything one command needs to process scene after scene: the bundle, the budget, and sessions opened once."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from edge_rsvlm.budget import Demand, MemoryPlan, joined, plan_memory, process_bytes
from edge_rsvlm.bundle import Bundle
from edge_rsvlm.config.offered import ask_task, change_task, search_task, task_of
from edge_rsvlm.config.task_specs import AnswerTask, Tasks
from edge_rsvlm.errors import BudgetError, InputError
from edge_rsvlm.pipeline.adapters import adapter_bytes, adapter_of
from edge_rsvlm.pipeline.ask import AskOutcome, ask_features, read_features
from edge_rsvlm.pipeline.caption import CaptionOutcome
from edge_rsvlm.pipeline.change import ChangeOutcome, MaskRows, change, registered
from edge_rsvlm.pipeline.classify import ClassifyOutcome
from edge_rsvlm.pipeline.consume import run_over
from edge_rsvlm.pipeline.detect import DetectQuery
from edge_rsvlm.pipeline.embed import EmbedOutcome, EmitVector
from edge_rsvlm.pipeline.evidence import Evidence, Wanted, demands, label_views
from edge_rsvlm.pipeline.examples import Box, embed_examples, example_task
from edge_rsvlm.pipeline.outcome import Deadline, Emit, Outcome, Progress
from edge_rsvlm.pipeline.requests import (
    Request,
    asking,
    captioning,
    classifying,
    detecting,
    embedding,
    grounding,
    segmenting,
)
from edge_rsvlm.pipeline.runtime import EngineFactory, Pace, Runtime, cpu_engine
from edge_rsvlm.pipeline.segment import SegmentOutcome
from edge_rsvlm.pipeline.stream import View, scene_batches
from edge_rsvlm.pipeline.views import demand, image_view, scene_view
from edge_rsvlm.pipeline.vocabulary import check_texts
from edge_rsvlm.raster.align import open_aligned
from edge_rsvlm.raster.reader import Raster, open_raster
from edge_rsvlm.tasks.generate import Sampling
from edge_rsvlm.tasks.like import Examples
from edge_rsvlm.tiles.prepare import Prepared
from edge_rsvlm.types import Georeference

O = TypeVar("O", bound=Outcome)  # noqa: E741 - an outcome


@dataclass(frozen=True)
class Limits:
    """What a command may take. ``deadline_s`` is per input; the first input's clock starts with the process."""

    memory_bytes: int
    threads: int = 1
    deadline_s: float | None = None
    resolution_m: float | None = None


@dataclass
class Session:
    """Runs tasks over inputs, one after another, within ``limits``; with an ``adapter`` of the bundle, by that."""

    bundle: Bundle
    limits: Limits
    engine_factory: EngineFactory = cpu_engine
    adapter: str | None = None
    started: float = field(default_factory=time.monotonic)
    _runtime: Runtime | None = None
    _base_bytes: int = field(default_factory=process_bytes)
    _opened: dict[str, int] = field(default_factory=dict)
    """Bytes of the sessions that other inputs left open, by task."""

    def __post_init__(self) -> None:
        if self.adapter is not None:
            adapter_of(self.bundle.manifest, self.adapter)

    @property
    def tasks(self) -> Tasks:
        return self.bundle.manifest.tasks

    def require(self, *verbs: str) -> None:
        """UsageError unless the bundle does all of these; ``search`` stands for index and search."""
        for verb in verbs:
            task_of(self.bundle.manifest, verb)

    @contextmanager
    def _pace(self, *needs: Demand, progress: Progress | None = None) -> Iterator[tuple[Runtime, Pace]]:
        plan = self.admit(joined(needs))
        if self._runtime is None:
            others = plan.total_bytes - plan.engine_bytes
            arena = max(self.limits.memory_bytes - others, plan.engine_bytes)
            self._runtime = Runtime(self.bundle, self.engine_factory(self.limits.threads, arena))
            self._runtime.switch(self.adapter)
        self._opened |= {each.task: each.memory.session_bytes for each in needs}
        deadline = Deadline(self.limits.deadline_s, started=self.started)
        try:
            yield self._runtime, Pace(plan, self.limits.threads, deadline, progress)
        finally:
            self.started = time.monotonic()

    def admit(self, needs: Demand) -> MemoryPlan:
        """The plan for tasks beside others whose sessions are open; BudgetError when it does not fit."""
        opened = sum(size for verb, size in self._opened.items() if verb not in needs.verbs)
        needs = replace(needs, adapter_bytes=adapter_bytes(self.bundle.manifest, self.adapter))
        return plan_memory([needs], limit_bytes=self.limits.memory_bytes, base_bytes=self._base_bytes + opened)

    def demand(self, verb: str, raster: Raster, sampling: Sampling | None = None) -> tuple[View, Demand]:
        """How a task other than change looks at a raster, and what that takes."""
        task = task_of(self.bundle.manifest, verb)
        if task.input is None:
            raise InputError(
                f"{raster.name}: this bundle answers from features of regions, not from images",
                fix="give a .npy of float32 [regions, size]",
            )
        view = image_view(raster, task.input, self.limits.resolution_m)
        return view, demand(verb, task, view, sampling.max_tokens if sampling else None)

    def change_demand(self, before: Raster, after: Raster) -> tuple[View, Demand]:
        task = change_task(self.bundle.manifest)
        view = scene_view((before, after), task.input, self.limits.resolution_m)
        return view, demand("change", task, view)

    def seen(self, verb: str, path: str, most: int) -> tuple[Runtime, list[Prepared]]:
        """The first ``most`` valid tiles of an image as the model sees them, and what runs it."""
        found: list[Prepared] = []
        with open_raster(path) as raster:
            view, needs = self.demand(verb, raster)
            with self._pace(needs) as (runtime, pace), scene_batches(view, pace, Outcome()) as source:
                for tiles in source:
                    kept = np.flatnonzero(tiles.valid_fraction_N > 0)
                    found += tiles.dates[0].chosen(kept) if len(kept) else []
                    if len(found) >= most:
                        break
                return runtime, found[:most]

    def together(self, path: str, requests: Sequence[Request[Any]], progress: Progress | None = None) -> list[Any]:
        """The outcomes of requests for one image whose tasks have one input spec: its tiles are read once.

        An encoder that several tasks share runs once on each tile.
        """
        tasks = [task_of(self.bundle.manifest, request.verb) for request in requests]
        with open_raster(path) as raster:
            looks = [self.demand(request.verb, raster, request.sampling) for request in requests]
            view = looks[0][0]
            with self._pace(*(needs for _, needs in looks), progress=progress) as (runtime, pace):
                consumers = [request.start(runtime, view) for request in requests]
                with runtime.sharing(tasks):
                    run_over(view, pace, consumers)
                return [consumer.outcome for consumer in consumers]

    def _alone(self, path: str, request: Request[O], progress: Progress | None) -> O:
        outcome: O = self.together(path, [request], progress)[0]
        return outcome

    def detect(self, path: str, query: DetectQuery, emit: Emit, progress: Progress | None = None) -> Outcome:
        return self._alone(path, detecting(self.bundle, query, emit), progress)

    def examples(self, path: str, boxes: Sequence[Box]) -> tuple[list[Examples], list[str]]:
        """What each of some boxes of an image looks like, for a DetectQuery, and what the user should know.

        Their time is part of the next input's. InputError for a box that is not in the image.
        """
        task, began = example_task(self.bundle.manifest), self.started
        with open_raster(path) as raster:
            view, needs = self.demand("detect", raster)
            with self._pace(replace(needs, tiles=1)) as (runtime, pace):
                found = embed_examples(runtime, task, view, boxes, pace)
        self.started = began
        return found

    def ground(self, path: str, phrase: str, emit: Emit, progress: Progress | None = None) -> Outcome:
        return self._alone(path, grounding(self.bundle, phrase, emit), progress)

    def caption(
        self, path: str, emit: Emit, progress: Progress | None = None, sampling: Sampling | None = None
    ) -> CaptionOutcome:
        return self._alone(path, captioning(self.bundle, sampling, emit), progress)

    def ask(
        self,
        path: str,
        question: str,
        emit: Emit,
        progress: Progress | None = None,
        sampling: Sampling | None = None,
    ) -> AskOutcome:
        task, request = ask_task(self.bundle.manifest), asking(self.bundle, question, sampling, emit)
        if isinstance(task, AnswerTask) and task.input is None:
            features_RD = read_features(path)
            with self._pace(features_demand(task, features_RD.nbytes)) as (runtime, _):
                return ask_features(runtime, task, features_RD, question, emit)
        return self._alone(path, request, progress)

    def classify(
        self, path: str, labels: Sequence[str], emit: Emit, progress: Progress | None = None
    ) -> ClassifyOutcome:
        return self._alone(path, classifying(self.bundle, labels, emit), progress)

    def segment(
        self,
        path: str,
        labels: Sequence[str],
        emit: Emit,
        mask_rows: MaskRows | None = None,
        progress: Progress | None = None,
    ) -> SegmentOutcome:
        return self._alone(path, segmenting(self.bundle, labels, emit, mask_rows), progress)

    def embed(self, path: str, emit: EmitVector, progress: Progress | None = None) -> EmbedOutcome:
        """Vectors of an image's tiles."""
        return self._alone(path, embedding(self.bundle, emit), progress)

    def embed_text(self, text: str, *, any_words: bool = False) -> NDArray[np.float32]:
        """The unit vector [D] of a text; UsageError for words that the bundle never learnt, unless ``any_words``."""
        task = search_task(self.bundle.manifest)
        if not any_words:
            check_texts(self.bundle, "search", [text])
        with self._pace(Demand("search", task.memory, tile_px=1, tile_bytes=0, tiles=1)) as (runtime, _):
            vector_D: NDArray[np.float32] = runtime.matcher("search", task).texts([text])[0]
            return vector_D

    def evident(self, needs: Demand, view: View, *, crops: bool) -> tuple[list[Demand], tuple[View, ...], list[str]]:
        """Change with the evidence of each change: what it takes, how the segment task sees both dates, and warnings.

        Where the labels do not fit into memory beside the rest they are left out, which a warning says.
        """
        labelled = label_views(self.bundle, view)
        found = demands(needs, self.bundle, labelled, crops=crops)
        try:
            self.admit(joined(found))
        except BudgetError as exc:
            note = f"what the ground was and is stays unknown: {exc}"
            return demands(needs, self.bundle, (), crops=crops), (), [note]
        return found, labelled, []

    def change(
        self,
        before: str,
        after: str,
        emit: Emit,
        mask_rows: MaskRows | None = None,
        progress: Progress | None = None,
        wanted: Wanted | None = None,
    ) -> ChangeOutcome:
        """Changes, with their evidence where it is ``wanted``; see ``pipeline.change``."""
        task = change_task(self.bundle.manifest)
        with open_raster(after) as later, open_aligned(before, later) as earlier:
            view, needs = self.change_demand(earlier, later)
            plans, labelled, notes = [needs], tuple[View, ...](), list[str]()
            if wanted is not None:
                plans, labelled, notes = self.evident(needs, view, crops=wanted.crops is not None)
            with self._pace(*plans, progress=progress) as (runtime, pace):
                outcome = ChangeOutcome(warnings=notes)
                view = registered(view, outcome)
                if wanted is None:
                    return change(runtime, task, view, pace, emit, mask_rows, outcome)
                evidence = Evidence(runtime, view, labelled, wanted, pace, self.limits.deadline_s)
                change(runtime, task, view, pace, evidence.added_to(emit), mask_rows, outcome)
                evidence.account(outcome)
                return outcome


def features_demand(task: AnswerTask, feature_bytes: int) -> Demand:
    """What an answer from features of regions takes."""
    return Demand("ask", task.memory, tile_px=1, tile_bytes=feature_bytes, tiles=1)


def georeference(path: str) -> Georeference:
    """Where this raster lies."""
    with open_raster(path) as raster:
        return raster.georeference
