"""The documents are true: the reference is generated, README commands run and print what README shows."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
TOLERANCE = 0.05  # processors round differently; what is found must not change


def console_blocks() -> list[tuple[str, str]]:
    """(command, shown output) of every `$` line in README's console blocks."""
    found = []
    for block in re.findall(r"```console\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, output = part.partition("\n")
            found.append((command, output.strip()))
    return found


def test_reference_is_up_to_date():
    # In a process of its own: click keeps help options of commands that other tests ran on their own.
    command = [sys.executable, "-m", "edge_rsvlm.cli.reference"]
    made = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert (ROOT / "docs" / "cli.md").read_text() == made, "run: python -m edge_rsvlm.cli.reference > docs/cli.md"


@pytest.mark.parametrize(("command", "shown"), console_blocks(), ids=[c[:50] for c, _ in console_blocks()])
def test_readme_commands(command, shown, tmp_path):
    if command.startswith("make"):
        assert re.search(rf"^{command.split()[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return
    (tmp_path / "edge_rsvlm").symlink_to(ROOT / "edge_rsvlm")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    run = subprocess.run(
        command, shell=True, cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=True
    )
    same_up_to_rounding(run.stdout.strip(), shown)


def same_up_to_rounding(actual: str, shown: str) -> None:
    assert NUMBER.sub("#", actual) == NUMBER.sub("#", shown)
    for a, b in zip(NUMBER.findall(actual), NUMBER.findall(shown), strict=True):
        assert abs(float(a) - float(b)) <= TOLERANCE * max(abs(float(b)), 1.0)


def test_readme_shows_six_commands():
    assert sum(command.startswith("edge-rsvlm") for command, _ in console_blocks()) >= 6
