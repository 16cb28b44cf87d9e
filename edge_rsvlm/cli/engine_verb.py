from __future__ import annotations

import json
from pathlib import Path

import click

from edge_rsvlm.cli.common import allow_older, json_option, trust_options


@click.group("engine")
def command() -> None:
    """Make a bundle's TensorRT engines on the machine whose GPU will run them."""


@command.command("build")
@click.argument("bundle", type=click.Path(path_type=Path), required=False)
@click.option("--profile", default="host", show_default=True, help="Device whose memory a build may take at most.")
@trust_options
@json_option
def build(bundle: Path | None, profile: str, allow_unsigned: bool, as_json: bool) -> None:
    """Build an engine for every graph that BUNDLE (the packaged one, if none is given) has for TensorRT.

    Engines are kept in the user's cache and built again when the bundle, the GPU, TensorRT or JetPack is another. A
    build that would not fit into free memory is refused before it starts, with exit code 4.
    """
    from edge_rsvlm.bundle import load_bundle
    from edge_rsvlm.config.units import format_bytes
    from edge_rsvlm.engines.tensorrt_device import open_device
    from edge_rsvlm.pipeline.built import build_engines, record, sources

    loaded = load_bundle(bundle, allow_unsigned=allow_unsigned, allow_older=allow_older())
    limit_bytes = _limit(profile)
    sources(loaded)  # a bundle without any is told so before the GPU is asked for
    device = open_device()
    engines = build_engines(loaded, device, limit_bytes, lambda name: click.echo(f"building {name} ...", err=True))
    if as_json:
        click.echo(json.dumps([record(engine) for engine in engines]))
        return
    for engine in engines:
        what = f"built in {engine.seconds:.1f} s" if engine.built else "is there"
        size, resident = format_bytes(engine.bytes), format_bytes(engine.resident_bytes)
        click.echo(f"{engine.name:>22}  {what}, {size}; takes {resident} when open")


def _limit(profile: str) -> int | None:
    """Bytes; None where only what is free bounds a build."""
    from edge_rsvlm import profiles

    facts = profiles.load(profile)
    return None if profile == profiles.HOST else int(str(facts["memory_bytes"]))
