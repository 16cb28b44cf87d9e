"""The JSON schema of a bundle's manifest: ``python -m edge_rsvlm.config.schema > docs/manifest.schema.json``."""

from __future__ import annotations

import ast
import inspect
import json
from types import ModuleType
from typing import Any

from edge_rsvlm.config import inputs, manifest, prepare, task_specs

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def schema() -> dict[str, Any]:
    """The manifest's schema, with what the source says about each field."""
    made = {"$schema": DIALECT, **manifest.Manifest.model_json_schema()}
    for module in (prepare, inputs, task_specs, manifest):
        for name, fields in _field_docs(module).items():
            properties = made["$defs"].get(name, made if name == made["title"] else {}).get("properties", {})
            for field, text in fields.items():
                properties[field]["description"] = text
    return made


def _field_docs(module: ModuleType) -> dict[str, dict[str, str]]:
    """Texts below the fields of each class: pydantic reads them at import only at a cost that the runtime would pay."""
    found: dict[str, dict[str, str]] = {}
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.ClassDef):
            found[node.name] = {
                field.target.id: inspect.cleandoc(text.value.value)
                for field, text in zip(node.body, node.body[1:], strict=False)
                if isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
                and isinstance(text.value.value, str)
            }
    return found


if __name__ == "__main__":
    print(json.dumps(schema(), indent=1))
