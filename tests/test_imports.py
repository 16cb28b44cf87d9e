"""Who may import whom, and how little `import edge_rsvlm` brings."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import edge_rsvlm

ROOT = Path(edge_rsvlm.__file__).parent
FOUNDATION = {"errors", "types"}
FACTS = FOUNDATION | {"config", "profiles", "geo", "scoring"}
STAGES = ("raster", "tiles", "engines", "tasks", "merge", "sinks", "budget", "report", "bundle", "alerts")
BELOW_VERBS = FACTS | {*STAGES, "pipeline"}
ALLOWED = (
    {"errors": set(), "types": set()}
    | dict.fromkeys(("config", "profiles", "geo", "scoring"), FOUNDATION)
    | dict.fromkeys(STAGES, FACTS)
    | {"pipeline": FACTS | set(STAGES)}
    | dict.fromkeys(("evaluate", "verify", "planning", "doctor", "demonstrate", "watch"), BELOW_VERBS)
    | {"cli": BELOW_VERBS | {"evaluate", "verify", "planning", "doctor", "demonstrate", "watch", "cli", "export"}}
)
MODULES = sorted(p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py")


def imported(path: Path) -> set[str]:
    """Units of edge_rsvlm that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{a.name}" for a in node.names]
        found |= {n.split(".")[1] for n in names if n.startswith("edge_rsvlm.")}
    return found - {"__version__", "_kernels"}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_layers(path):
    unit = path.relative_to(ROOT).parts[0].removesuffix(".py")
    assert imported(path) <= ALLOWED[unit] | {unit}


def test_import_is_lean():
    code = "import sys, edge_rsvlm, edge_rsvlm.cli; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "onnxruntime", "rasterio", "numpy", "pydantic", "rich"} & set(loaded)
