from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_rsvlm.cli.common import (
    ExitCode,
    Outputs,
    bundle_options,
    device_option,
    make_limits,
    make_query,
    open_session,
)

if TYPE_CHECKING:
    from edge_rsvlm.cli.orders import Order
    from edge_rsvlm.config.job import Job
    from edge_rsvlm.pipeline.detect import DetectQuery
    from edge_rsvlm.pipeline.session import Session
    from edge_rsvlm.raster.inputs import Source


@click.command("run")
@click.argument("job", type=click.Path(path_type=Path))
@bundle_options
@device_option
def command(job: Path, bundle: Path | None, allow_unsigned: bool) -> None:
    """Run the tasks of a job file over its scenes, with models loaded once.

    Tasks that look at a scene alike share one pass over it, and one run of an encoder that they have in common.
    Writes results.jsonl and one GeoJSON per task and input to the job's output folder. The format is in docs/cli.md.
    """
    from edge_rsvlm.cli import orders
    from edge_rsvlm.cli.deliver import Delivery
    from edge_rsvlm.cli.pairs import list_pairs
    from edge_rsvlm.config.job import load_job
    from edge_rsvlm.pipeline.detect import DetectQuery
    from edge_rsvlm.pipeline.vocabulary import check_texts
    from edge_rsvlm.raster.inputs import list_inputs

    wanted = load_job(job)
    folder = job.parent / wanted.output
    tasks = (*wanted.tasks, *(["change"] if wanted.change else []))
    session = open_session(bundle, allow_unsigned, make_limits(**wanted.limits.model_dump()), tasks)
    for task in wanted.tasks:
        check_texts(session.bundle, task, wanted.texts(task))
    query = DetectQuery()
    if "detect" in wanted.tasks:
        like = [str(job.parent / item) for item in wanted.detect.like]
        query = make_query(session, wanted.detect.query, wanted.detect.score, like)
    sources = list_inputs([str(job.parent / item) for item in wanted.inputs]) if wanted.inputs else []
    pairs = [
        found for p in wanted.change for found in list_pairs(str(job.parent / p.before), str(job.parent / p.after))
    ]
    files = {task: Outputs(folder / task, max(len(sources), 2), ".geojson") for task in tasks}
    code = ExitCode()
    partial = folder / "results.jsonl.part"
    folder.mkdir(parents=True, exist_ok=True)
    with partial.open("w", encoding="utf-8") as lines:
        delivery = Delivery(session, code, lines)
        for source in sources:
            paths = {task: files[task].path(source.name) for task in wanted.tasks}
            delivery.deliver(*(_order(session, wanted, query, task, source, paths[task]) for task in wanted.tasks))
        for before, after in pairs:
            path = files["change"].path(after.name)
            delivery.deliver(orders.change(session, before, after, path, path and path.with_suffix(".tif")))
    partial.replace(folder / "results.jsonl")
    click.echo(str(folder / "results.jsonl"))
    code.leave()


def _order(
    session: Session, job: Job, query: DetectQuery, task: str, source: Source, geojson: Path | None
) -> Order[Any]:
    """One task of a job over one of its inputs."""
    from edge_rsvlm.cli import orders

    if task == "detect":
        return orders.detect(session, source, query, geojson)
    if task == "ask" and job.ask:
        return orders.ask(session, source, job.ask.question, geojson)
    if task == "ground" and job.ground:
        return orders.ground(session, source, job.ground.phrase, geojson)
    if task == "classify" and job.classify:
        return orders.classify(session, source, job.classify.labels, geojson)
    if task == "segment" and job.segment:
        return orders.segment(session, source, job.segment.labels, geojson, geojson and geojson.with_suffix(".tif"))
    return orders.caption(session, source, geojson)
