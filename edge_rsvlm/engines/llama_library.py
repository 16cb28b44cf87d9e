"""llama.cpp as llama-cpp-python binds it: found, of the version that this code speaks to, and silent.

Its low-level functions change from release to release, so that one version is wanted and no other.
"""

from __future__ import annotations

import platform
from collections import deque
from importlib import metadata
from typing import Any

from edge_rsvlm.errors import UsageError

__all__ = ["INSTALL", "VERSION", "C", "reason", "repacks_safely"]

VERSION = "0.3.36"
# Off x86 a build for the machine itself is the fast one, and a plain install makes that.
_PORTABLE = 'CMAKE_ARGS="-DGGML_NATIVE=OFF" ' if platform.machine() in ("x86_64", "AMD64") else ""
INSTALL = f"{_PORTABLE}pip install 'edge-rsvlm[gguf]'"
_ERROR = 4  # a level of ggml's log (ggml.h)

try:
    _found = metadata.version("llama-cpp-python")
except metadata.PackageNotFoundError as missing:
    raise UsageError("llama-cpp-python, which runs GGUF models, is not installed", fix=INSTALL) from missing
if _found != VERSION:
    raise UsageError(f"llama-cpp-python {_found} is installed, and {VERSION} is needed", fix=INSTALL)
try:
    from llama_cpp import llama_cpp as C
except (ImportError, OSError, RuntimeError) as broken:
    raise UsageError(f"llama-cpp-python {_found} does not load ({broken})", fix=INSTALL) from broken

_complaints: deque[str] = deque(maxlen=3)


@C.llama_log_callback  # type: ignore[untyped-decorator, unused-ignore]
def listen(level: int, text: bytes, _: Any) -> None:
    """Keeps complaints for the message of an error, and prints nothing. llama.cpp calls it: it must never go away."""
    if level == _ERROR:
        _complaints.append(text.decode("utf-8", "replace").strip())


C.llama_log_set(listen, None)
C.llama_backend_init()


def reason() -> str:
    """What llama.cpp complained of last, and forgets it."""
    found = "; ".join(complaint for complaint in _complaints if complaint)
    _complaints.clear()
    return found or "it does not say why"


def repacks_safely() -> bool:
    """Whether weights may be copied into the layouts that some processors multiply faster.

    Builds for Intel's AMX by gcc 12 crash on every quantized model: its intrinsic for the tile configuration hides most
    of that configuration from the optimiser, and the instruction then faults.
    """
    return b"AMX_INT8 = 1" not in C.llama_print_system_info()
