from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_rsvlm.cli.common import json_option, make_limits, open_session, plan_options

if TYPE_CHECKING:
    from edge_rsvlm.planning import TaskPlan


@click.command("plan")
@click.argument("images", nargs=-1, required=True)
@click.option(
    "--task",
    type=click.Choice(["caption", "ask", "ground", "detect", "classify", "segment", "search", "change"]),
    multiple=True,
    help="Task to plan; change takes two IMAGES.  [default: all of the bundle but change]",
)
@plan_options
@json_option
def command(
    images: tuple[str, ...], task: tuple[str, ...], as_json: bool, bundle: Path | None, allow_unsigned: bool,
    **limits: Any,
) -> None:  # fmt: skip
    """Say in bytes what each task needs over IMAGES, without loading a model. Exit 4 if something does not fit."""
    from edge_rsvlm.config.offered import offered_verbs
    from edge_rsvlm.errors import UsageError
    from edge_rsvlm.planning import plan_image, plan_pair
    from edge_rsvlm.raster.inputs import list_inputs

    session = open_session(bundle, allow_unsigned, make_limits(**limits), task)
    tasks = task or tuple(verb for verb in offered_verbs(session.bundle.manifest) if verb != "change")
    sources = list_inputs(images)
    if "change" in tasks and len(sources) != 2:
        raise UsageError(f"change compares two images and got {len(sources)}", fix="give BEFORE and AFTER")
    found = [
        (source.name, plan_image(session, source.path, name))
        for source in sources
        for name in tasks
        if name != "change"
    ]
    if "change" in tasks:
        pair = plan_pair(session, sources[0].path, sources[1].path)
        found.append((f"{sources[0].name} -> {sources[1].name}", pair))
    for name, plan in found:
        click.echo(json.dumps(_record(name, plan)) if as_json else _text(name, plan, session.limits.memory_bytes))
    sys.exit(4 if any(plan.plan is None for _, plan in found) else 0)


def _record(name: str, found: TaskPlan) -> dict[str, Any]:
    record: dict[str, Any] = {"image": name, "task": found.task, "tiles": found.tiles, "fits": found.plan is not None}
    if found.plan is None:
        return record | {"refusal": found.refusal}
    plan = found.plan
    return record | {"total_bytes": plan.total_bytes, "bytes": dict(plan.items), "tiles_per_batch": plan.batch}


def _text(name: str, found: TaskPlan, limit: int) -> str:
    from edge_rsvlm.config.units import format_bytes

    if found.plan is None:
        return f"{name}: {found.refusal}"
    tiles = f"{found.tiles} tile{'' if found.tiles == 1 else 's'} of {found.resolution}"
    lines = [f"{name}: {found.task}, {tiles}, {min(found.plan.batch, found.tiles)} at a time"]
    lines += [f"  {format_bytes(size):>10}  {item}" for item, size in found.plan.items]
    lines += [f"  {format_bytes(found.plan.total_bytes):>10}  in all, with slack; limit {format_bytes(limit)}"]
    return "\n".join(lines)
