"""Will it fit? The memory plan of each task over each input, without loading a model."""

from __future__ import annotations

from dataclasses import dataclass

from edge_rsvlm.budget import Demand, MemoryPlan
from edge_rsvlm.errors import BudgetError
from edge_rsvlm.pipeline.session import Session
from edge_rsvlm.pipeline.stream import View
from edge_rsvlm.raster.align import open_aligned
from edge_rsvlm.raster.reader import open_raster


@dataclass(frozen=True)
class TaskPlan:
    """``plan`` is None when refused, and ``refusal`` then says why and what would fit."""

    task: str
    tiles: int
    resolution: str
    plan: MemoryPlan | None
    refusal: str | None


def plan_image(session: Session, path: str, task: str) -> TaskPlan:
    """The plan of ``caption`` or ``detect`` over one image."""
    with open_raster(path) as raster:
        view, needs = (session.caption_demand if task == "caption" else session.detect_demand)(raster)
        return _admit(session, task, view, needs)


def plan_pair(session: Session, before: str, after: str) -> TaskPlan:
    """The plan of ``change`` over one pair."""
    with open_raster(after) as later, open_aligned(before, later) as earlier:
        view, needs = session.change_demand(earlier, later)
        return _admit(session, "change", view, needs)


def _admit(session: Session, task: str, view: View, needs: Demand) -> TaskPlan:
    scale = " x ".join(f"{s:.2f}" for s in view.scale_xy)
    try:
        plan, refusal = session.admit([needs]), None
    except BudgetError as exc:
        plan, refusal = None, str(exc)
    return TaskPlan(task, len(view.grid()), f"{scale} raster px", plan, refusal)
