"""onnxruntime on the CPU, with bounded threads and a bounded memory arena.

PyPI's aarch64 wheel is CPU-only: on a Jetson this engine uses the CPU.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from edge_rsvlm.errors import BudgetError, BundleError, UsageError
from edge_rsvlm.types import InferenceSession

# Its wheels for Linux report to their maker from the moment of the import, and keep a device id in the user's cache.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
try:
    import onnxruntime as ort
except ImportError as missing:
    raise UsageError("onnxruntime is not installed", fix="pip install onnxruntime") from missing

__all__ = ["VERSION", "OnnxRuntimeEngine", "ort"]

VERSION: str = ort.__version__
CPU_INFO = Path("/proc/cpuinfo")
_SAME_AS_REQUESTED = 1  # arena_extend_strategy: grow by what is needed, not by powers of two


def sums_in_32_bits(cpu_info: Path = CPU_INFO) -> bool:
    """Whether an x86 processor has VNNI, which sums products of 8 bits in 32.

    Older ones sum pairs in 16 bits and cut what does not fit; onnxruntime then has an exact way, half as fast. Nothing
    is known of other systems than Linux, which take that way. Other processors have no such trouble.
    """
    try:
        text = cpu_info.read_text()
    except OSError:
        return False
    return bool({"avx_vnni", "avx512_vnni"} & set(text.split()))


class OnnxRuntimeEngine:
    """Opens ONNX files as sessions that share one arena of at most ``arena_bytes`` (0: no bound).

    The arena belongs to the process: the first engine made in a process sets the bound.
    """

    _arena_registered = False

    def __init__(self, *, threads: int = 1, arena_bytes: int = 0) -> None:
        self._options = ort.SessionOptions()
        self._options.intra_op_num_threads = threads
        self._options.inter_op_num_threads = 1
        self._options.log_severity_level = 3
        # Spinning workers would burn a flying device's battery between tiles.
        self._options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._options.add_session_config_entry("session.use_env_allocators", "1")
        if not sums_in_32_bits():
            self._options.add_session_config_entry("session.x64quantprecision", "1")
        if not OnnxRuntimeEngine._arena_registered:
            config = {"max_mem": arena_bytes, "arena_extend_strategy": _SAME_AS_REQUESTED}
            info = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
            ort.create_and_register_allocator(info, ort.OrtArenaCfg(config))
            OnnxRuntimeEngine._arena_registered = True

    def open(self, graph: Path) -> InferenceSession:
        """Load ``graph``; BundleError when onnxruntime cannot."""
        try:
            session = ort.InferenceSession(str(graph), self._options, providers=["CPUExecutionProvider"])
        except Exception as exc:
            first_line = str(exc).splitlines()[0]
            raise BundleError(
                f"onnxruntime {VERSION} cannot load {graph.name}: {first_line}", fix="make the bundle again"
            ) from exc
        return _Session(session, graph.name)


class _Session:
    def __init__(self, session: Any, name: str) -> None:
        self._session, self._name = session, name

    def run(self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> list[NDArray[Any]]:
        try:
            found: list[NDArray[Any]] = self._session.run(list(outputs), dict(inputs))
        except Exception as exc:
            text = str(exc)
            if "Available memory" in text or "Failed to allocate" in text:
                raise BudgetError(
                    f"{self._name} needs more memory than the plan gave onnxruntime", fix="raise --memory"
                ) from exc
            raise BundleError(f"{self._name} failed: {text.splitlines()[0]}", fix="run `edge-rsvlm verify`") from exc
        return found
