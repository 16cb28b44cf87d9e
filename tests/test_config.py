import pytest

from edge_rsvlm.config.job import load_job
from edge_rsvlm.config.manifest import Manifest
from edge_rsvlm.config.model import parse
from edge_rsvlm.config.units import format_bytes, parse_bytes, parse_seconds
from edge_rsvlm.errors import BundleError, UsageError
from tests.fakes import manifest


def test_manifest_round_trips():
    parsed = Manifest.model_validate(manifest())
    assert Manifest.model_validate_json(parsed.model_dump_json()) == parsed


def test_unknown_key_is_refused_with_the_nearest_known_one():
    data = manifest()
    data["tasks"]["detect"]["strid"] = data["tasks"]["detect"].pop("stride")
    with pytest.raises(BundleError, match=r"did you mean 'stride'|stride"):
        parse(Manifest, data, "manifest", BundleError)
    data = manifest() | {"licens": "MIT"}
    with pytest.raises(BundleError, match="did you mean 'licence'"):
        parse(Manifest, data, "manifest", BundleError)


@pytest.mark.parametrize(
    ("text", "value"), [("512MiB", 512 << 20), ("2GB", 2_000_000_000), ("7", 7), ("1.5 KiB", 1536)]
)
def test_bytes(text, value):
    assert parse_bytes(text) == value


@pytest.mark.parametrize("text", ["", "MiB", "-1MB", "0", "512mebi", "1e3MB", "nan"])
def test_bytes_that_are_none(text):
    with pytest.raises(UsageError, match="write it like"):
        parse_bytes(text)


def test_seconds():
    assert parse_seconds("150ms") == pytest.approx(0.15)
    assert parse_seconds("2min") == 120
    with pytest.raises(UsageError):
        parse_seconds("30")


def test_format_bytes():
    assert [format_bytes(n) for n in (5, 2048, 512 << 20, 3 << 30)] == ["5 B", "2.0 KiB", "512 MiB", "3.00 GiB"]


JOB = """
version = 1
tasks = ["detect"]
inputs = ["a.tif"]
output = "out"
"""


def test_job(tmp_path):
    path = tmp_path / "job.toml"
    path.write_text(JOB + '[limits]\nmemory = "1GiB"\n')
    assert load_job(path).limits.memory == "1GiB"
    for text, message in [
        (JOB + "[limits]\nmemroy = '1GiB'\n", "did you mean 'memory'"),
        (JOB + "[limits\n", "not TOML"),
        ("version = 1\noutput = 'x'\n", "nothing to do"),
        ("version = 2\noutput = 'x'\n", "version"),
    ]:
        path.write_text(text)
        with pytest.raises(UsageError, match=message):
            load_job(path)
    with pytest.raises(UsageError, match="cannot read"):
        load_job(tmp_path / "absent.toml")
