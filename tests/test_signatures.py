"""Who may be trusted, and which versions may follow which."""

from __future__ import annotations

import json
import stat
import subprocess

import pytest
from click.testing import CliRunner

import edge_rsvlm.cli
from edge_rsvlm.bundle import load_bundle
from edge_rsvlm.bundle.signatures import new_key, own_keys, sign, signer, trust, trusted_keys, untrust
from edge_rsvlm.bundle.signing import sign_bundle
from edge_rsvlm.errors import BundleError, EdgeRsvlmError, UsageError
from tests import tiny_bundle

MANIFEST = b'{"a": 1}\n'


@pytest.fixture
def keys():
    """(a trusted key, a stranger's) by name."""
    new_key("ours")
    new_key("theirs")
    trust("ours")
    return "ours", "theirs"


def signed(folder, key, **changed):
    return sign_bundle(tiny_bundle.write(folder, **changed), key)


def test_a_signature_says_who_signed_exactly_these_bytes(keys):
    signature = sign(MANIFEST, "ours")
    assert signer(MANIFEST, signature) == trusted_keys()[0].id
    for altered in (MANIFEST + b" ", MANIFEST[:-1], b""):
        with pytest.raises(BundleError, match="does not belong"):
            signer(altered, signature)


def test_every_byte_of_the_signature_file_counts(keys):
    signature = sign(MANIFEST, "ours")
    for at in range(len(signature)):
        for flip in (1, 0x20, 0x80):
            altered = signature[:at] + bytes([signature[at] ^ flip]) + signature[at + 1 :]
            with pytest.raises(BundleError):
                signer(MANIFEST, altered)
    for altered in (b"", signature + b"\n", signature[:-1], signature.upper(), b" " + signature):
        with pytest.raises(BundleError, match=r"not a signature"):
            signer(MANIFEST, altered)


def test_openssl_agrees(keys, tmp_path, home):
    (tmp_path / "m").write_bytes(MANIFEST)
    (tmp_path / "s").write_bytes(bytes.fromhex(json.loads(sign(MANIFEST, "ours"))["signature"]))
    command = ["openssl", "pkeyutl", "-verify", "-pubin", "-rawin", "-inkey", str(home / "trusted" / "ours.pub.pem")]
    try:
        done = subprocess.run(
            [*command, "-in", str(tmp_path / "m"), "-sigfile", str(tmp_path / "s")], capture_output=True, text=True
        )
    except FileNotFoundError:
        pytest.skip("needs openssl: not installed")
    assert "Verified Successfully" in done.stdout


def test_private_keys_are_private_and_never_replaced(keys, home):
    private = home / "keys" / "ours.pem"
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    before = private.read_bytes()
    with pytest.raises(UsageError, match="already"):
        new_key("ours")
    assert private.read_bytes() == before
    private.chmod(0o644)
    with pytest.raises(UsageError, match=r"chmod 600"):
        sign(MANIFEST, "ours")


@pytest.mark.parametrize("name", ["", ".", "../x", "a/b", "-x", "x.pub", "a.pem", "ü", "x" * 65, "a b", "a\0b"])
def test_names_that_are_none(name):
    with pytest.raises(UsageError, match="cannot name"):
        new_key(name)


def test_trust_and_untrust(keys, tmp_path, home):
    theirs = (home / "keys" / "theirs.pub.pem").read_bytes()
    (tmp_path / "ours.pub.pem").write_bytes(theirs)
    with pytest.raises(UsageError, match="another trusted key"):
        trust(str(tmp_path / "ours.pub.pem"))
    (tmp_path / "friend.pem").write_bytes(theirs)
    assert trust(str(tmp_path / "friend.pem")).name == "friend"
    assert trust("theirs").name == "friend"  # the same key is not kept twice
    assert [key.name for key in trusted_keys()] == ["friend", "ours"]
    assert untrust(trusted_keys()[0].id).name == "friend"
    with pytest.raises(UsageError, match="trusted are: ours"):
        untrust("friend")
    assert [key.name for key in own_keys()] == ["ours", "theirs"]


def test_files_that_are_no_public_keys(keys, tmp_path, home):
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    other = ec.generate_private_key(ec.SECP256R1()).public_key()
    cases = {
        "rubbish": (b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", "no public key"),
        "empty": (b"", "no public key"),
        "private": ((home / "keys" / "ours.pem").read_bytes(), "is a private key"),
        "ec": (other.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo), "another algorithm"),
    }
    for name, (pem, message) in cases.items():
        (tmp_path / f"{name}.pub.pem").write_bytes(pem)
        with pytest.raises(UsageError, match=message):
            trust(str(tmp_path / f"{name}.pub.pem"))
    with pytest.raises(UsageError, match="cannot read"):
        trust(str(tmp_path / "absent.pub.pem"))
    (home / "trusted" / "broken.pub.pem").write_bytes(b"x")
    with pytest.raises(UsageError, match=r"broken.pub.pem holds no public key"):
        trusted_keys()


def test_only_trusted_signatures_load(keys, tmp_path):
    ours, theirs = keys
    assert load_bundle(signed(tmp_path / "a", ours)).trusted_by == "ours"
    foreign = signed(tmp_path / "b", theirs)
    with pytest.raises(BundleError, match="whom nobody here trusts"):
        load_bundle(foreign)
    assert load_bundle(foreign, allow_unsigned=True).trusted_by is None
    trust(theirs)
    assert load_bundle(foreign).trusted_by == "theirs"
    untrust(ours)
    with pytest.raises(BundleError, match="whom nobody here trusts"):
        load_bundle(tmp_path / "a")


def test_a_wrong_signature_is_refused_even_where_unsigned_is_allowed(keys, tmp_path):
    for key in keys:
        folder = signed(tmp_path / key, key)
        text = (folder / "manifest.json").read_text()
        (folder / "manifest.json").write_text(text.replace("for tests", "for jests"))
        with pytest.raises(BundleError, match="does not belong to this manifest"):
            load_bundle(folder, allow_unsigned=True)
        (folder / "manifest.sig").unlink()
        assert load_bundle(folder, allow_unsigned=True).manifest.description == "for jests"


def test_only_whole_bundles_are_signed(keys, tmp_path):
    folder = tiny_bundle.write(tmp_path / "b")
    (folder / "answers.txt").write_bytes(b"yes\nYES")
    with pytest.raises(BundleError, match=r"'answers.txt' does not match"):
        sign_bundle(folder, "ours")
    assert not (folder / "manifest.sig").exists()


def test_an_altered_bundle_can_be_signed_anew(keys, tmp_path):
    folder = signed(tmp_path / "b", "theirs")
    tiny_bundle.write(folder, description="other")
    sign_bundle(folder, "ours")
    assert load_bundle(folder).manifest.description == "other"


def test_versions_only_go_forward(keys, tmp_path):
    for version in (2, 5, 5):
        load_bundle(signed(tmp_path / f"v{version}", "ours", version=version))
    with pytest.raises(BundleError, match=r"version 2 of 'tiny' is older than 5.*--allow-older"):
        load_bundle(tmp_path / "v2")
    assert load_bundle(tmp_path / "v2", allow_older=True).manifest.version == 2
    with pytest.raises(BundleError, match="older than 5"):
        load_bundle(tmp_path / "v2")
    load_bundle(signed(tmp_path / "other", "ours", version=1, name="other"))


def test_another_trusted_key_cannot_bring_an_old_version_back(keys, tmp_path):
    trust("theirs")
    load_bundle(signed(tmp_path / "new", "ours", version=5))
    with pytest.raises(BundleError, match="older than 5"):
        load_bundle(signed(tmp_path / "old", "theirs", version=4))


def test_an_unsigned_version_holds_back_no_signed_one(keys, tmp_path):
    poison = tiny_bundle.write(tmp_path / "poison", version=10**9)
    load_bundle(poison, allow_unsigned=True)
    load_bundle(signed(tmp_path / "a", "ours", version=1))
    with pytest.raises(BundleError, match="older than 1000000000"):
        load_bundle(tiny_bundle.write(tmp_path / "b", version=2), allow_unsigned=True)
    load_bundle(signed(tmp_path / "c", "ours", version=2))


def test_a_signed_version_holds_back_unsigned_ones(keys, tmp_path):
    load_bundle(signed(tmp_path / "a", "ours", version=4))
    with pytest.raises(BundleError, match="older than 4"):
        load_bundle(tiny_bundle.write(tmp_path / "b", version=3), allow_unsigned=True)


def test_what_was_refused_is_not_remembered(keys, tmp_path):
    folder = signed(tmp_path / "new", "ours", version=9)
    (folder / "answers.txt").write_bytes(b"YES\nno\n")
    with pytest.raises(BundleError, match="hash"):
        load_bundle(folder)
    load_bundle(signed(tmp_path / "old", "ours", version=8))


@pytest.mark.parametrize(
    "record",
    [b"", b"{", b"[]", b'{"format": 2}', b'{"format": 1, "signed": {"tiny": "x"}}', b'{"signed": 1}', b"[" * 100_000],
)
def test_a_damaged_record_is_an_error_until_told_otherwise(keys, tmp_path, home, record):
    folder = signed(tmp_path / "a", "ours")
    (home / "accepted.json").write_bytes(record)
    with pytest.raises(BundleError, match=r"record of accepted bundles.*--allow-older once"):
        load_bundle(folder)
    load_bundle(folder, allow_older=True)
    assert json.loads((home / "accepted.json").read_text()) == {"format": 1, "signed": {"tiny": 3}, "unsigned": {}}
    load_bundle(folder)


def test_state_that_cannot_be_written_is_named(keys, tmp_path, home, monkeypatch):
    folder = signed(tmp_path / "a", "ours", version=1)
    monkeypatch.setattr("edge_rsvlm.bundle.home.tempfile.mkstemp", refuse)
    with pytest.raises(UsageError, match=r"accepted.json.*EDGE_RSVLM_HOME"):
        load_bundle(folder)
    monkeypatch.undo()


def refuse(*_, **__):
    raise PermissionError(13, "Permission denied")


@pytest.fixture
def run():
    """Runs `edge-rsvlm keys ...`; returns stdout, or raises our error."""

    def call(*arguments):
        done = CliRunner().invoke(edge_rsvlm.cli.cli, ["keys", *map(str, arguments)])
        if isinstance(done.exception, EdgeRsvlmError):
            raise done.exception
        assert done.exit_code == 0, done.output
        return done.stdout

    return call


def test_command_line(run, tmp_path):
    public = run("new", "team").strip()
    assert public.endswith("team.pub.pem")
    bundle = tiny_bundle.write(tmp_path / "b")
    assert run("sign", bundle, "--key", "team") == f"{bundle}\n"
    assert run("trust", public).startswith("team  ")
    assert load_bundle(bundle).trusted_by == "team"
    packed = tmp_path / "b.ersvlm"
    assert run("sign", bundle, "--key", public.replace(".pub", ""), "--output", packed) == f"{packed}\n"
    assert load_bundle(packed).trusted_by == "team"
    assert [line.split()[:2] for line in run("list").splitlines()] == [["own", "team"], ["trusted", "team"]]
    listed = json.loads(run("list", "--json"))
    assert listed["own"] == listed["trusted"]
    assert run("untrust", "team").startswith("team  ")
    with pytest.raises(BundleError, match="nobody here trusts"):
        load_bundle(packed)
    with pytest.raises(UsageError, match=r"\.ersvlm"):
        run("sign", bundle, "--key", "team", "--output", tmp_path / "b.zip")
    with pytest.raises(UsageError, match="keys list"):
        run("sign", bundle, "--key", "nobody")
