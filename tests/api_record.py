"""The calls of TensorRT and CUDA that the engine uses, as an installed library offers them.

    python -m tests.api_record tensorrt > tests/api_records/tensorrt-10.3.0.json

The Python bindings of a version that is not here load with empty libraries in the place of libnvinfer.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
import sys
import typing
from pathlib import Path
from typing import Any

from edge_rsvlm.engines import tensorrt_library as ours
from edge_rsvlm.engines.cuda import CudaRuntime
from edge_rsvlm.engines.tensorrt import DTYPES

FOLDER = Path(__file__).parent / "api_records"
CUDA = "cuda.bindings.runtime"
CLASSES = {
    "IExecutionContext": ours.Context, "ICudaEngine": ours.Engine, "Runtime": ours.Runtime,
    "ITensor": ours.NetworkInput, "INetworkDefinition": ours.Network, "IOptimizationProfile": ours.Profile,
    "ParserError": ours.ParserError, "OnnxParser": ours.Parser, "ITimingCache": ours.TimingCache,
    "IBuilderConfig": ours.Config, "Builder": ours.Builder, "MemoryPoolType": ours.MemoryPools,
    "TensorIOMode": ours.Modes, "ExecutionContextAllocationStrategy": ours.Strategies,
    "NetworkDefinitionCreationFlag": ours.NetworkFlags,
}  # fmt: skip
LISTED = {"DataType": tuple(DTYPES), "ILogger": ("INTERNAL_ERROR", "ERROR")}
WORDS = {
    "int": "int", "typing.SupportsInt": "int", "buffer": "bytes", "typing_extensions.Buffer": "bytes", "str": "str",
    "bool": "bool", "None": "None", "tuple": "sizes", "list": "sizes", "Dims": "sizes",
}  # fmt: skip
OURS = {int: "int", bytes: "bytes", str: "str", bool: "bool", type(None): "None", ours.Shape: "sizes"}


def used(protocol: type) -> dict[str, Any]:
    """Its attributes and methods by name."""
    found = {name: value for name, value in vars(protocol).items() if inspect.isfunction(value) and name[0] != "_"}
    found |= {name: value for name, value in vars(protocol).items() if isinstance(value, property)}
    return found | dict(vars(protocol).get("__annotations__", {}))


def wanted() -> dict[str, list[str]]:
    """Names by class of the library."""
    return {name: sorted(used(protocol)) for name, protocol in CLASSES.items()} | {k: [*v] for k, v in LISTED.items()}


def offered(library: Any) -> dict[str, list[str]]:
    """``Class.name`` -> its signatures, or none for a property and a member; what is not there is left out."""
    found = {}
    for holder, names in wanted().items():
        for name in names:
            member = getattr(getattr(library, holder, None), name, None)
            if member is not None:
                found[f"{holder}.{name}"] = _signatures(name, member.__doc__ or "") if callable(member) else []
    return found


def _signatures(name: str, documentation: str) -> list[str]:
    """Of every overload, in the words of WORDS: ``name: str, shape: sizes -> bool``."""
    lines = re.findall(rf"^(?:\d+\. )?{name}\(self: [\w.]+(?:, )?(.*)\) -> (.+)$", documentation, re.MULTILINE)
    return [f"{', '.join(map(_parameter, _split(given)))} -> {_word(answer)}".strip() for given, answer in lines]


def _split(given: str) -> list[str]:
    return [part for part in re.split(r", (?=\w+: )", given) if part]


def _parameter(text: str) -> str:
    name, kind = text.split(": ", 1)
    kind, _, default = kind.partition(" = ")
    return f"{name}: {_word(kind)}{' = ...' if default else ''}"


def _word(kind: str) -> str:
    kind = re.sub(r"^tensorrt(_rtx_bindings)?\.(tensorrt(_rtx)?\.)?", "", kind.strip())
    return WORDS.get(kind, kind)


def accepts(signature: str, method: Any) -> bool:
    """Whether a call as our protocol has it is one that the library takes."""
    hints = typing.get_type_hints(method, vars(ours))
    answer = hints.pop("return", None)
    given, _, answers = signature.rpartition("-> ")
    parameters = [part.split(": ", 1)[1] for part in _split(given.strip())]
    required = [kind for kind in parameters if not kind.endswith(" = ...")]
    kinds = [kind.removesuffix(" = ...") for kind in parameters]
    if not len(required) <= len(hints) <= len(kinds):
        return False
    said = [*zip(hints.values(), kinds, strict=False), (answer, answers)]
    return all(OURS[ours_] == theirs for ours_, theirs in said if ours_ in OURS)


def cuda_names() -> dict[str, int | None]:
    """How many arguments each call has; None for what is no function."""
    return {
        name: len(inspect.signature(value).parameters) - 1 if inspect.isfunction(value) else None
        for name, value in used(CudaRuntime).items()
    }


def cuda_offered(library: Any) -> dict[str, int | None]:
    """The same of the library, by the first line of its documentation."""
    found: dict[str, int | None] = {}
    for name, count in cuda_names().items():
        member = getattr(library, name, None)
        if member is not None:
            first = (member.__doc__ or "").partition("\n")[0]
            arguments = first.partition("(")[2].rpartition(")")[0]
            found[name] = None if count is None else len([part for part in arguments.split(",") if part])
    return found


if __name__ == "__main__":
    module = importlib.import_module(sys.argv[1])
    print(json.dumps(cuda_offered(module) if sys.argv[1] == CUDA else offered(module), indent=1))
