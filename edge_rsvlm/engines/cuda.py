"""The few calls of the CUDA runtime that an engine needs, through NVIDIA's cuda-bindings."""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from edge_rsvlm.errors import BudgetError, BundleError, UsageError

INSTALL = "pip install 'edge-rsvlm[cuda12]' (CUDA 12, JetPack 6) or 'edge-rsvlm[cuda13]' (CUDA 13, JetPack 7)"
ALIGNMENT = 256
Answer = tuple[Any, ...]
"""What every call gives: the error first, then its results."""


class CudaRuntime(Protocol):
    """The part of ``cuda.bindings.runtime`` that is used."""

    cudaStreamNonBlocking: int

    @property
    def cudaMemcpyKind(self) -> Any: ...
    @property
    def cudaStreamCaptureMode(self) -> Any: ...
    def cudaGetDeviceCount(self) -> Answer: ...
    def cudaGetDeviceProperties(self, device: int) -> Answer: ...
    def cudaMemGetInfo(self) -> Answer: ...
    def cudaMalloc(self, size: int) -> Answer: ...
    def cudaFree(self, address: int) -> Answer: ...
    def cudaMallocHost(self, size: int) -> Answer: ...
    def cudaFreeHost(self, address: int) -> Answer: ...
    def cudaStreamCreateWithFlags(self, flags: int) -> Answer: ...
    def cudaStreamDestroy(self, stream: Any) -> Answer: ...
    def cudaStreamSynchronize(self, stream: Any) -> Answer: ...
    def cudaMemcpyAsync(self, to: int, source: int, size: int, kind: Any, stream: Any) -> Answer: ...
    def cudaStreamBeginCapture(self, stream: Any, mode: Any) -> Answer: ...
    def cudaStreamEndCapture(self, stream: Any) -> Answer: ...
    def cudaGraphInstantiate(self, graph: Any, flags: int) -> Answer: ...
    def cudaGraphLaunch(self, graph: Any, stream: Any) -> Answer: ...
    def cudaGraphDestroy(self, graph: Any) -> Answer: ...
    def cudaGraphExecDestroy(self, graph: Any) -> Answer: ...


class CudaError(BundleError):
    """A call failed; another of our errors tells it where it is known what was wanted. ``reason`` is CUDA's name."""

    def __init__(self, call: str, code: Any) -> None:
        self.reason = f"{call}: {getattr(code, 'name', code)}"
        super().__init__(f"the GPU failed ({self.reason})", fix="build the engines again, or run with --device cpu")


@dataclass(frozen=True)
class Gpu:
    """``compute_capability`` as "8.7"; ``integrated``: it shares the memory of the CPU, as on a Jetson."""

    name: str
    compute_capability: str
    integrated: bool


@dataclass(frozen=True)
class Buffer:
    """``host_bytes`` are page-locked, and copied to and from as many bytes at ``device``."""

    device: int
    host: int
    size: int

    def view(self, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
        """The first elements of the host's copy, not copied."""
        held = (ctypes.c_uint8 * self.size).from_address(self.host)
        count = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        return np.ctypeslib.as_array(held)[:count].view(dtype).reshape(shape)


def load_cuda() -> CudaRuntime:
    """UsageError says how to install it, or that there is no GPU."""
    try:
        runtime = cast(CudaRuntime, importlib.import_module("cuda.bindings.runtime"))
    except ImportError as missing:
        raise UsageError("cuda-bindings, which speaks to the GPU, is not installed", fix=INSTALL) from missing
    reason = _no_gpu(runtime)
    if reason:
        raise UsageError(f"CUDA finds no GPU here ({reason})", fix="run with --device cpu, or mend the driver")
    return runtime


def _no_gpu(runtime: CudaRuntime) -> str:
    """Why, or empty. Without a driver, cuda-bindings of CUDA 12 raise where those of CUDA 13 answer."""
    try:
        error, count = runtime.cudaGetDeviceCount()
    except RuntimeError as exc:
        return str(exc)
    if int(error):
        return str(getattr(error, "name", error))
    return "" if count else "it counts none"


class Cuda:
    """The first GPU, and one stream of it."""

    def __init__(self, runtime: CudaRuntime) -> None:
        self._runtime = runtime
        self.stream = self._call(runtime.cudaStreamCreateWithFlags, runtime.cudaStreamNonBlocking)

    def _call(self, function: Callable[..., Answer], *arguments: Any) -> Any:
        error, *found = function(*arguments)
        if int(error):
            raise CudaError(getattr(function, "__name__", "CUDA"), error)
        return found[0] if len(found) == 1 else tuple(found)

    def gpu(self) -> Gpu:
        facts = self._call(self._runtime.cudaGetDeviceProperties, 0)
        name = facts.name.decode() if isinstance(facts.name, bytes) else str(facts.name)
        return Gpu(name.rstrip("\0"), f"{facts.major}.{facts.minor}", bool(facts.integrated))

    def free_bytes(self) -> int:
        free, _ = self._call(self._runtime.cudaMemGetInfo)
        return int(free)

    def allocate(self, size: int) -> int:
        """Address of device memory; BudgetError where there is none left."""
        return int(self._allocate(self._runtime.cudaMalloc, size))

    def buffer(self, size: int) -> Buffer:
        """Device memory with its page-locked copy on the host."""
        size = max(size, ALIGNMENT)  # addresses of empty tensors may not be null
        device = self.allocate(size)
        return Buffer(device, int(self._allocate(self._runtime.cudaMallocHost, size)), size)

    def _allocate(self, function: Callable[..., Answer], size: int) -> Any:
        try:
            return self._call(function, size)
        except CudaError as exc:
            raise BudgetError(
                f"the GPU gives no block of {size} bytes ({exc.reason})",
                fix="stop what else uses it, or run with --device cpu",
            ) from exc

    def free(self, address: int) -> None:
        with suppress(CudaError):
            self._call(self._runtime.cudaFree, address)

    def release(self, buffer: Buffer) -> None:
        self.free(buffer.device)
        with suppress(CudaError):
            self._call(self._runtime.cudaFreeHost, buffer.host)

    def to_device(self, buffer: Buffer, size: int) -> None:
        """Copy the first bytes of the host's copy, in the order of the stream."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        if size:
            self._call(self._runtime.cudaMemcpyAsync, buffer.device, buffer.host, size, kind, self.stream)

    def to_host(self, buffer: Buffer, size: int) -> None:
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        if size:
            self._call(self._runtime.cudaMemcpyAsync, buffer.host, buffer.device, size, kind, self.stream)

    def wait(self) -> None:
        """Until the stream is done; CudaError where something in it failed."""
        self._call(self._runtime.cudaStreamSynchronize, self.stream)

    def capture(self, work: Callable[[], None]) -> Any:
        """What ``work`` puts into the stream as a graph that can be launched; nothing runs yet.

        CudaError where the work cannot be captured; the stream is then as it was.
        """
        mode = self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call(self._runtime.cudaStreamBeginCapture, self.stream, mode)
        with self._captured() as ended:
            work()
            graph = ended()
        try:
            return self._call(self._runtime.cudaGraphInstantiate, graph, 0)
        finally:
            self._call(self._runtime.cudaGraphDestroy, graph)

    @contextmanager
    def _captured(self) -> Iterator[Callable[[], Any]]:
        """A stream that captures takes no other work: capturing ends also where the work failed."""
        open_capture = [True]

        def end() -> Any:
            open_capture.clear()
            return self._call(self._runtime.cudaStreamEndCapture, self.stream)

        try:
            yield end
        finally:
            if open_capture:
                with suppress(CudaError):
                    end()

    def launch(self, graph: Any) -> None:
        self._call(self._runtime.cudaGraphLaunch, graph, self.stream)

    def forget(self, graph: Any) -> None:
        with suppress(CudaError):
            self._call(self._runtime.cudaGraphExecDestroy, graph)

    def close(self) -> None:
        with suppress(CudaError):
            self._call(self._runtime.cudaStreamDestroy, self.stream)
