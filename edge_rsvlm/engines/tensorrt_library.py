"""TensorRT found and loaded: what is common to its versions 10.3 (JetPack 6.2) to 11 and to TensorRT for RTX.

The protocols are all that is used of it; tests hold them against the signatures of every one of these libraries.
JetPack's own Python has the library; a virtual environment sees it where it was made with --system-site-packages.
TensorRT for RTX comes from PyPI and compiles without a GPU, for desktop GPUs alone.
"""

from __future__ import annotations

import importlib
from collections import deque
from collections.abc import Sequence
from functools import cache
from typing import Any, Protocol, cast

from edge_rsvlm.errors import UsageError

CLASSIC, WITHOUT_GPU = "tensorrt", "tensorrt_rtx"
"""Modules; the second compiles on a machine without a GPU."""
INSTALL = (
    "on a Jetson make the environment with `python3 -m venv --system-site-packages`, so that it sees JetPack's "
    "TensorRT; elsewhere `pip install tensorrt-cu12`, or 'edge-rsvlm[tensorrt-rtx]' for desktop GPUs"
)
Shape = tuple[int, ...]


class Context(Protocol):
    """IExecutionContext."""

    def set_device_memory(self, memory: int, size: int) -> None: ...
    def set_input_shape(self, name: str, shape: Shape) -> bool: ...
    def get_tensor_shape(self, name: str) -> Sequence[int]: ...
    def get_max_output_size(self, name: str) -> int: ...
    def set_tensor_address(self, name: str, address: int) -> bool: ...
    def execute_async_v3(self, stream_handle: int) -> bool: ...


class Engine(Protocol):
    """ICudaEngine."""

    @property
    def num_io_tensors(self) -> int: ...
    @property
    def device_memory_size_v2(self) -> int: ...
    def get_tensor_name(self, index: int) -> str: ...
    def get_tensor_mode(self, name: str) -> Any: ...
    def get_tensor_dtype(self, name: str) -> Any: ...
    def get_tensor_shape(self, name: str) -> Sequence[int]: ...
    def get_tensor_profile_shape(self, name: str, profile_index: int) -> Sequence[Sequence[int]]: ...
    def create_execution_context(self, strategy: Any) -> Context | None: ...


class Runtime(Protocol):
    def deserialize_cuda_engine(self, serialized_engine: bytes) -> Engine | None: ...


class NetworkInput(Protocol):
    """ITensor."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> Sequence[int]: ...


class Network(Protocol):
    """INetworkDefinition."""

    @property
    def num_inputs(self) -> int: ...
    def get_input(self, index: int) -> NetworkInput: ...


class Profile(Protocol):
    """IOptimizationProfile."""

    def set_shape(self, input: str, min: Shape, opt: Shape, max: Shape) -> None: ...


class ParserError(Protocol):
    def desc(self) -> str: ...
    def node_name(self) -> str: ...
    def node_operator(self) -> str: ...


class Parser(Protocol):
    """OnnxParser."""

    @property
    def num_errors(self) -> int: ...
    def parse_from_file(self, model: str) -> bool: ...
    def get_error(self, index: int) -> ParserError: ...
    def supports_model_v2(self, model: bytes, path: str) -> bool: ...


class TimingCache(Protocol):
    """ITimingCache."""

    def serialize(self) -> Any: ...


class Config(Protocol):
    """IBuilderConfig."""

    def add_optimization_profile(self, profile: Profile) -> int: ...
    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None: ...
    def create_timing_cache(self, serialized_timing_cache: bytes) -> TimingCache: ...
    def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool: ...
    def get_timing_cache(self) -> TimingCache: ...


class RtxConfig(Config, Protocol):
    """IBuilderConfig of TensorRT for RTX."""

    num_compute_capabilities: int

    def set_compute_capability(self, compute_capability: Any, index: int) -> bool: ...


class Builder(Protocol):
    def create_network(self, flags: int) -> Network: ...
    def create_builder_config(self) -> Config: ...
    def create_optimization_profile(self) -> Profile: ...
    def build_serialized_network(self, network: Network, config: Config) -> Any | None: ...


class MemoryPools(Protocol):
    """MemoryPoolType."""

    WORKSPACE: Any


class Modes(Protocol):
    """TensorIOMode."""

    INPUT: Any
    OUTPUT: Any


class Strategies(Protocol):
    """ExecutionContextAllocationStrategy."""

    USER_MANAGED: Any


class NetworkFlags(Protocol):
    """NetworkDefinitionCreationFlag. Its number is another in every major version."""

    STRONGLY_TYPED: Any


class TensorRt(Protocol):
    """The module itself."""

    __name__: str
    __version__: str
    ILogger: Any

    @property
    def MemoryPoolType(self) -> MemoryPools: ...
    @property
    def TensorIOMode(self) -> Modes: ...
    @property
    def ExecutionContextAllocationStrategy(self) -> Strategies: ...
    @property
    def NetworkDefinitionCreationFlag(self) -> NetworkFlags: ...

    def Builder(self, logger: Any) -> Builder: ...
    def Runtime(self, logger: Any) -> Runtime: ...
    def OnnxParser(self, network: Network, logger: Any) -> Parser: ...


@cache
def load_tensorrt(*names: str) -> TensorRt:
    """The first of these that is there, or TensorRT, else TensorRT for RTX; UsageError says how to get one."""
    broken = ""
    for name in names or (CLASSIC, WITHOUT_GPU):
        try:
            return cast(TensorRt, importlib.import_module(name))
        except ModuleNotFoundError:
            continue
        except (ImportError, OSError, RuntimeError) as exc:
            broken = f": {name} does not load ({exc})"
    raise UsageError(f"TensorRT is not installed{broken}", fix=INSTALL)


def new_network(library: TensorRt, builder: Builder) -> Network:
    """An empty network, strongly typed: the types in the file are those that are computed in."""
    return builder.create_network(1 << int(library.NetworkDefinitionCreationFlag.STRONGLY_TYPED))


class Complaints:
    """What TensorRT logged as errors, for the message of ours; it prints nothing. ``logger`` must outlive its users."""

    def __init__(self, library: TensorRt) -> None:
        lines: deque[str] = deque(maxlen=4)

        class Listener(library.ILogger):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                library.ILogger.__init__(self)

            def log(self, severity: Any, msg: str) -> None:
                if severity in (library.ILogger.INTERNAL_ERROR, library.ILogger.ERROR):
                    lines.append(msg.strip().splitlines()[0] if msg.strip() else "")

        self._lines, self.logger = lines, Listener()

    def reason(self) -> str:
        """And forgets it."""
        found = "; ".join(line for line in self._lines if line)
        self._lines.clear()
        return found or "it does not say why"
