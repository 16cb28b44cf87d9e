from __future__ import annotations

import json
from pathlib import Path

import click

from edge_rsvlm.cli.common import json_option


@click.group("keys")
def command() -> None:
    """Make keys, sign bundles with them, and say whose bundles this machine uses.

    Keys are Ed25519 in PEM files. Private keys never leave the machine that made them; the public half, NAME.pub.pem,
    goes to every machine that shall trust it.
    """


@command.command("new")
@click.argument("name")
def new(name: str) -> None:
    """Make a key, and print the file of its public half."""
    from edge_rsvlm.bundle.signatures import new_key

    key = new_key(name)
    click.echo(key.path)
    click.echo(f"key {key.id}; other machines trust it after: edge-rsvlm keys trust {key.path.name}", err=True)


@command.command("sign")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--key", required=True, metavar="NAME|FILE", help="Private key: one made here, or a PEM file.")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write one signed .ersvlm file; keep BUNDLE as it is.",
)
def sign(bundle: Path, key: str, output: Path | None) -> None:
    """Sign a bundle, a folder or an .ersvlm file, in place or into one file. One that is not whole is not signed."""
    from edge_rsvlm.bundle.signing import sign_bundle

    click.echo(sign_bundle(bundle, key, output))


@command.command("trust")
@click.argument("public", metavar="FILE|NAME")
def trust(public: str) -> None:
    """Use bundles signed by this key from now on. FILE is a .pub.pem, NAME a key made here."""
    from edge_rsvlm.bundle.signatures import trust as trust_key

    key = trust_key(public)
    click.echo(f"{key.name}  {key.id}")


@command.command("untrust")
@click.argument("key", metavar="NAME|ID")
def untrust(key: str) -> None:
    """Use bundles signed by this key no more."""
    from edge_rsvlm.bundle.signatures import untrust as untrust_key

    gone = untrust_key(key)
    click.echo(f"{gone.name}  {gone.id}")


@command.command("list")
@json_option
def list_keys(as_json: bool) -> None:
    """Keys made here and keys trusted here."""
    from edge_rsvlm.bundle.signatures import own_keys, trusted_keys

    own, trusted = own_keys(), trusted_keys()
    if as_json:
        groups = {"own": own, "trusted": trusted}
        click.echo(json.dumps({kind: [{"name": k.name, "id": k.id} for k in keys] for kind, keys in groups.items()}))
        return
    for kind, keys in (("own", own), ("trusted", trusted)):
        for key in keys:
            click.echo(f"{kind:>8}  {key.name}  {key.id}")
    if not own and not trusted:
        click.echo("no keys yet: make one with `edge-rsvlm keys new NAME`", err=True)
