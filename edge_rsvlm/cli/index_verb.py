from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_rsvlm.cli.common import ExitCode, json_option, make_limits, open_session, progress_bar, run_options

if TYPE_CHECKING:
    from edge_rsvlm.pipeline.session import Session
    from edge_rsvlm.raster.inputs import Source
    from edge_rsvlm.sinks.index import IndexWriter


@click.command("index")
@click.argument("images", nargs=-1, required=True)
@click.option("--to", "folder", type=click.Path(path_type=Path), required=True, help="Folder of the index.")
@run_options
@json_option
def command(
    images: tuple[str, ...], folder: Path, as_json: bool, bundle: Path | None, allow_unsigned: bool, **limits: Any
) -> None:
    """Make images searchable. IMAGES are files, folders, globs or .tar archives of images.

    Every image, or every tile of a scene larger than one, becomes a vector. Run again, it adds the images that the
    index does not hold yet, by name: an interrupted run loses one image at most. Needs
    pip install 'edge-rsvlm[search]'.
    """
    from edge_rsvlm.raster.inputs import list_inputs
    from edge_rsvlm.sinks.index import IndexWriter, Maker, require_usearch

    require_usearch()
    session = open_session(bundle, allow_unsigned, make_limits(**limits), ("search",))
    manifest = session.bundle.manifest
    code, sources = ExitCode(), list_inputs(images)
    maker = Maker(manifest.name, manifest.version, session.bundle.manifest_sha256)
    with IndexWriter(folder, maker) as writer:
        for source in sources:
            if source.name in writer.images:
                click.echo(f"{source.name}: is in the index already", err=True)
            else:
                _add(session, code, writer, source, as_json)
    code.leave()


def _add(session: Session, code: ExitCode, writer: IndexWriter, source: Source, as_json: bool) -> None:
    with code.input(source.name), progress_bar(source.name) as progress:
        added = 0

        def emit(vector_D: Any, record: dict[str, Any]) -> None:
            nonlocal added
            writer.add(source.name, vector_D, record)
            added += 1

        try:
            outcome = session.embed(source.path, emit, progress)
            writer.commit(source.name)
        finally:
            writer.rollback()
        if as_json:
            record = {"image": source.name, "vectors": added, **outcome.record()}
            click.echo(json.dumps(record, ensure_ascii=False))
        else:
            click.echo(f"{source.name}: {added} vector{'' if added == 1 else 's'}")
        for warning in outcome.warnings:
            click.echo(f"{source.name}: {warning}", err=True)
        if not outcome.complete:
            code.partial(source.name, outcome.coverage)
