from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_rsvlm.cli.common import ExitCode, Outputs, make_limits, open_session, run_options

if TYPE_CHECKING:
    from edge_rsvlm.demonstrate import Scene, TaskResult
    from edge_rsvlm.pipeline.session import Session


@click.command("demo")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default="edge-rsvlm-demo",
    show_default=True,
    help="Folder for the report.",
)
@run_options
def command(output: Path, bundle: Path | None, allow_unsigned: bool, **limits: Any) -> None:
    """Run caption, detect and change on the packaged scenes, and write a report to look at.

    Writes GeoJSON and an overlay per scene and task, change masks, and index.html, which needs no network.
    """
    from edge_rsvlm.demonstrate import packaged_scenes, write_report

    began = time.monotonic()
    session = open_session(bundle, allow_unsigned, make_limits(**limits), ())
    code, results = ExitCode(), []
    for scene in packaged_scenes():
        found = _run(session, code, scene, output)
        if found:
            results.append((scene, found))
    if results:
        seconds = time.monotonic() - began
        written = write_report(output, session.bundle.manifest, results, session.limits.threads, seconds)
        files = [path for _, found in results for result in found.values() for path in result.files]
        click.echo("\n".join(str(path) for path in sorted([*files, *written], key=_page_last)))
    code.leave()


def _run(session: Session, code: ExitCode, scene: Scene, output: Path) -> dict[str, TaskResult]:
    """The results of those tasks of a scene that the bundle offers and that could be done."""
    import io
    import json

    from edge_rsvlm.cli import orders
    from edge_rsvlm.cli.deliver import Delivery
    from edge_rsvlm.config.task_specs import OpenDetectTask
    from edge_rsvlm.demonstrate import TaskResult, summary
    from edge_rsvlm.pipeline.detect import DetectQuery
    from edge_rsvlm.raster.inputs import Source

    image, found = Source(scene.image, scene.path), dict[str, TaskResult]()
    for task in scene.tasks:
        offered = getattr(session.tasks, task)
        if offered is None or isinstance(offered, OpenDetectTask):  # which finds what one names
            continue
        lines = io.StringIO()
        delivery = Delivery(session, code, lines)
        geojson = Outputs(output / task, 2, ".geojson").path(scene.name)
        assert geojson is not None
        files: tuple[Path, ...] = (geojson,)
        if task == "caption":
            delivery.deliver(orders.caption(session, image, geojson))
        elif task == "detect":
            delivery.deliver(orders.detect(session, image, DetectQuery(), geojson))
        else:
            assert scene.before is not None
            files = (geojson, geojson.with_suffix(".tif"))
            delivery.deliver(orders.change(session, Source(scene.before, scene.before_path), image, *files))
        if lines.getvalue():
            found[task] = TaskResult(json.loads(lines.getvalue()), files)
            click.echo(f"{scene.name}: {task}: {summary(task, found[task].record)}")
    return found


def _page_last(path: Path) -> tuple[bool, str]:
    return path.suffix == ".html", str(path)
