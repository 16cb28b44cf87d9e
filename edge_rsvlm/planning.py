"""Will it fit? The memory plan of each task over each input, without loading a model."""

from __future__ import annotations

from dataclasses import dataclass

from edge_rsvlm.budget import Demand, MemoryPlan, joined
from edge_rsvlm.config.offered import task_of
from edge_rsvlm.config.task_specs import AnswerTask
from edge_rsvlm.errors import BudgetError
from edge_rsvlm.pipeline.ask import read_features
from edge_rsvlm.pipeline.session import Session, features_demand
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


def plan_image(session: Session, path: str, verb: str) -> TaskPlan:
    """The plan of a task other than ``change`` over one image; InputError for an image of another kind."""
    task = task_of(session.bundle.manifest, verb)
    if isinstance(task, AnswerTask) and task.input is None:
        return _admit(session, features_demand(task, read_features(path).nbytes), "all regions")
    with open_raster(path) as raster:
        view, needs = session.demand(verb, raster)
        return _admit(session, needs, _scale(view))


def plan_pair(session: Session, before: str, after: str) -> TaskPlan:
    """The plan of ``change`` over one pair, with the evidence of each change and its crops."""
    with open_raster(after) as later, open_aligned(before, later) as earlier:
        view, needs = session.change_demand(earlier, later)
        plans, _, _ = session.evident(needs, view, crops=True)
        return _admit(session, joined(plans), _scale(view))


def _scale(view: View) -> str:
    if view.whole:
        return "the whole image"
    return " x ".join(f"{s:.2f}" for s in view.scale_xy) + " raster px"


def _admit(session: Session, needs: Demand, resolution: str) -> TaskPlan:
    try:
        plan, refusal = session.admit(needs), None
    except BudgetError as exc:
        plan, refusal = None, str(exc)
    return TaskPlan(needs.task, needs.tiles, resolution, plan, refusal)
