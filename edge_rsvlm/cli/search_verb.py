from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_rsvlm.cli.common import json_option, make_limits, open_session, plan_options

if TYPE_CHECKING:
    from edge_rsvlm.pipeline.session import Session
    from edge_rsvlm.sinks.index import Hit


@click.command("search")
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("text", required=False)
@click.option("--image", "example", metavar="EXAMPLE", help="Search by an image instead of a TEXT.")
@click.option("--top", type=click.IntRange(1, 10_000), default=10, show_default=True, help="How many results.")
@click.option("--output", type=click.Path(path_type=Path), help="GeoJSON file of the results.")
@plan_options
@json_option
def command(
    folder: Path, text: str | None, example: str | None, top: int, output: Path | None, as_json: bool,
    bundle: Path | None, allow_unsigned: bool, **limits: Any,
) -> None:  # fmt: skip
    """Find images in the index of FOLDER by TEXT or by an example, best first, with their cosine to it.

    Needs pip install 'edge-rsvlm[search]'.
    """
    from edge_rsvlm.sinks.index import Maker, read_facts, require_usearch, search_index

    require_usearch()
    query = _query(text, example)
    session = open_session(bundle, allow_unsigned, make_limits(**limits), ("search",))
    manifest = session.bundle.manifest
    facts = read_facts(folder, Maker(manifest.name, manifest.version, session.bundle.manifest_sha256))
    found = search_index(folder, facts, _vector(session, text, example), top)
    if output:
        _write(output, query, found)
    if as_json:
        results = [_record(hit) for hit in found]
        click.echo(json.dumps({**query, "searched": facts.count, "results": results}, ensure_ascii=False))
        return
    for hit in found:
        box = ", ".join(f"{value:g}" for value in hit.record["box"])
        click.echo(f"{hit.score:.4f}  {hit.record['image']}  [{box}]")


def _query(text: str | None, example: str | None) -> dict[str, str]:
    """The query as ``--json`` repeats it."""
    from edge_rsvlm.errors import UsageError

    if (text is None) == (example is None):
        raise UsageError("a search is by words or by an example", fix='give "TEXT" or --image EXAMPLE')
    if text is not None:
        return {"text": text}
    return {"example": str(example)}


def _vector(session: Session, text: str | None, example: str | None) -> Any:
    """The unit vector of the query; of an example larger than a tile, the mean of its tiles."""
    import numpy as np

    from edge_rsvlm.errors import InputError

    if text is not None:
        return session.embed_text(text)
    assert example is not None
    mean_D = session.embed(example, lambda *_: None).mean_D
    if mean_D is None:
        raise InputError(f"{example}: has no valid pixel", fix="give another example")
    return mean_D / max(float(np.linalg.norm(mean_D)), 1e-12)


def _record(hit: Hit) -> dict[str, Any]:
    return {"image": hit.record["image"], "score": round(hit.score, 4), "box": hit.record["box"]}


def _write(output: Path, query: dict[str, str], found: Sequence[Hit]) -> None:
    """Results of many images: each says for itself whether it is on the map."""
    from edge_rsvlm.sinks.geojson import GeoJsonWriter

    output.parent.mkdir(parents=True, exist_ok=True)
    with GeoJsonWriter(output, properties=query, located=True) as writer:
        for hit in found:
            crs = {} if hit.record["located"] else {"crs": None}
            writer.write(hit.record["geometry"], {**_record(hit), **crs})
