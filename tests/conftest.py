"""A skip is never a pass: ``--must-run torch,data`` fails the run if a test that needs one of these was skipped.

A test that needs something that may be absent asks the fixture ``needs`` for it.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
from pathlib import Path

import pytest

DATA = Path(__file__).parents[2] / "shared" / "data"
WEIGHTS = Path(__file__).parents[1] / "export" / "default" / "weights"


def pytest_addoption(parser):
    parser.addoption("--must-run", default="", help="comma-separated needs whose tests must not be skipped")


def pytest_terminal_summary(terminalreporter, config):
    for report in missing(terminalreporter, config):
        terminalreporter.write_line(f"must run but was skipped: {report.nodeid}", red=True)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter and missing(reporter, session.config) and session.exitstatus == 0:
        session.exitstatus = 1


def missing(reporter, config):
    required = {f"needs {name}:" for name in config.getoption("--must-run").split(",") if name}
    skipped = reporter.stats.get("skipped", [])
    return [report for report in skipped if any(need in str(report.longrepr) for need in required)]


@pytest.fixture(autouse=True, scope="session")
def _session_home(tmp_path_factory):
    """For what is loaded outside a single test; see ``home``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGE_RSVLM_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(autouse=True)
def home(tmp_path_factory, monkeypatch):
    """Keys, accepted versions and unpacked bundles of one test, and of no other, or of the person who runs them."""
    folder = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("EDGE_RSVLM_HOME", str(folder))
    return folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The packaged model as it was trained, in half precision; one export serves every worker."""
    for name in ("torch", "transformers", "onnxscript"):
        pytest.importorskip(name, reason=f"needs {name}: not installed")
    from edge_rsvlm.bundle import load_bundle
    from edge_rsvlm.export.chain import run_export
    from edge_rsvlm.export.recipe import Recipe

    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "trained"
    with (base.parent / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            run_export(Recipe(checkpoint=WEIGHTS, target="onnx:f16", out=folder), lambda *_: None)
    return load_bundle(folder, allow_unsigned=True, allow_older=True)


@pytest.fixture
def needs():
    """``needs("torch")`` skips with a reason where it is absent; ``needs("data", "oscd")`` returns a set's folder."""

    def check(name: str, part: str = ""):
        if name == "data":
            if not (DATA / part).exists():
                pytest.skip(f"needs data: the set '{part}' is not here")
            return DATA / part
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"needs {name}: not installed")
        return None

    return check


@pytest.fixture(scope="session")
def tokenizer():
    """That of the default model, of a few words."""
    from edge_rsvlm.export.default.stages.features import tokenizer_of

    return tokenizer_of(["there is an airplane at the airport", "many cars in a parking lot", "two green trees"] * 20)
