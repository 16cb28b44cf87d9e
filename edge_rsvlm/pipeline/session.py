"""Everything one command needs to process scene after scene: the bundle, the budget, and sessions opened once."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from edge_rsvlm.budget import Demand, MemoryPlan, plan_memory, process_bytes
from edge_rsvlm.bundle import Bundle
from edge_rsvlm.pipeline.caption import CaptionOutcome, caption
from edge_rsvlm.pipeline.change import ChangeOutcome, MaskRows, change
from edge_rsvlm.pipeline.detect import DetectQuery, detect
from edge_rsvlm.pipeline.outcome import Deadline, Emit, Outcome, Progress
from edge_rsvlm.pipeline.runtime import (
    EngineFactory,
    Pace,
    Runtime,
    caption_task,
    change_task,
    cpu_engine,
    detect_task,
)
from edge_rsvlm.pipeline.stream import View
from edge_rsvlm.pipeline.views import caption_view, demand, scene_view
from edge_rsvlm.raster.align import open_aligned
from edge_rsvlm.raster.reader import Raster, open_raster
from edge_rsvlm.types import Georeference

TASKS = ("caption", "detect", "change")


@dataclass(frozen=True)
class Limits:
    """What a command may take. ``deadline_s`` is per input; the first input's clock starts with the process."""

    memory_bytes: int
    threads: int = 1
    deadline_s: float | None = None
    resolution_m: float | None = None


@dataclass
class Session:
    """Runs tasks over inputs, one after another, within ``limits``."""

    bundle: Bundle
    limits: Limits
    tasks: tuple[str, ...] = TASKS
    engine_factory: EngineFactory = cpu_engine
    started: float = field(default_factory=time.monotonic)
    _runtime: Runtime | None = None
    _base_bytes: int = field(default_factory=process_bytes)

    @contextmanager
    def _pace(self, demand_here: Demand, progress: Progress | None) -> Iterator[tuple[Runtime, Pace]]:
        plan = self.admit([demand_here])
        if self._runtime is None:
            others = plan.total_bytes - plan.engine_bytes
            arena = max(self.limits.memory_bytes - others, plan.engine_bytes)
            self._runtime = Runtime(self.bundle, self.engine_factory(self.limits.threads, arena))
        deadline = Deadline(self.limits.deadline_s, started=self.started)
        try:
            yield self._runtime, Pace(plan, self.limits.threads, deadline, progress)
        finally:
            self.started = time.monotonic()

    def admit(self, demands: list[Demand]) -> MemoryPlan:
        """The plan for these demands and for the other tasks of this command; BudgetError when it does not fit."""
        return plan_memory(demands, limit_bytes=self.limits.memory_bytes, base_bytes=self._base_bytes)

    def detect_demand(self, raster: Raster) -> tuple[View, Demand]:
        task = detect_task(self.bundle.manifest)
        view = scene_view((raster,), task.input, self.limits.resolution_m)
        return view, demand(task, view)

    def caption_demand(self, raster: Raster) -> tuple[View, Demand]:
        task = caption_task(self.bundle.manifest)
        view = caption_view(raster, task.input, self.limits.resolution_m)
        return view, demand(task, view)

    def change_demand(self, before: Raster, after: Raster) -> tuple[View, Demand]:
        task = change_task(self.bundle.manifest)
        view = scene_view((before, after), task.input, self.limits.resolution_m)
        return view, demand(task, view)

    def detect(self, path: str, query: DetectQuery, emit: Emit, progress: Progress | None = None) -> Outcome:
        with open_raster(path) as raster:
            view, needs = self.detect_demand(raster)
            with self._pace(needs, progress) as (runtime, pace):
                return detect(runtime, view, query, pace, emit)

    def caption(self, path: str, emit: Emit, progress: Progress | None = None) -> CaptionOutcome:
        with open_raster(path) as raster:
            view, needs = self.caption_demand(raster)
            with self._pace(needs, progress) as (runtime, pace):
                return caption(runtime, view, pace, emit)

    def change(
        self, before: str, after: str, emit: Emit, mask_rows: MaskRows | None = None, progress: Progress | None = None
    ) -> ChangeOutcome:
        with open_raster(after) as later, open_aligned(before, later) as earlier:
            view, needs = self.change_demand(earlier, later)
            with self._pace(needs, progress) as (runtime, pace):
                return change(runtime, view, pace, emit, mask_rows)


def georeference(path: str) -> Georeference:
    """Where this raster lies."""
    with open_raster(path) as raster:
        return raster.georeference
