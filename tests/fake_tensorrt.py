"""TensorRT and CUDA without a GPU: a library of the same calls that runs the ONNX file by onnxruntime, in host memory
that stands in for the device's, and writes down what it was asked.

It is stricter than the real ones: whatever they leave undefined fails here.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from edge_rsvlm.engines.onnxruntime import ort

NUMPY = {"float": "f4", "float16": "f2", "int64": "i8", "int32": "i4", "bool": "?"}
TYPES = {"float": "FLOAT", "float16": "HALF", "int64": "INT64", "int32": "INT32", "bool": "BOOL"}
OK, OUT_OF_MEMORY, INVALID = 0, 2, 1


@dataclass
class FakeCuda:
    """``cuda.bindings.runtime``. ``events`` is what reached the device, in order; ``largest`` the largest piece."""

    free: int = 1 << 34
    largest: int = 1 << 34
    integrated: int = 0
    name: str = "Fake GPU"
    major: int = 8
    minor: int = 7
    capturable: bool = True
    failing: int = OK
    events: list[tuple[Any, ...]] = field(default_factory=list)
    blocks: dict[int, Any] = field(default_factory=dict)
    captured: list[Callable[[], None]] | None = None

    cudaStreamNonBlocking = 1
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice="h2d", cudaMemcpyDeviceToHost="d2h")
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal="thread")

    def count(self, kind: str) -> int:
        return sum(event[0] == kind for event in self.events)

    def cudaGetDeviceCount(self):
        return OK, 1

    def cudaGetDeviceProperties(self, device):
        return OK, SimpleNamespace(
            name=self.name.encode(), major=self.major, minor=self.minor, integrated=self.integrated
        )

    def cudaMemGetInfo(self):
        return OK, (self.free), 1 << 35

    def _take(self, kind, size):
        assert size > 0
        if size > min(self.free, self.largest):
            return OUT_OF_MEMORY, None
        block = (ctypes.c_uint8 * size)()
        self.blocks[ctypes.addressof(block)] = block
        self.free -= size
        self.events.append((kind, size))
        return OK, ctypes.addressof(block)

    def _give_back(self, kind, address):
        block = self.blocks.pop(address, None)
        if block is None:
            return (INVALID,)
        self.free += len(block)
        self.events.append((kind, len(block)))
        return (OK,)

    def cudaMalloc(self, size):
        return self._take("malloc", size)

    def cudaFree(self, address):
        return self._give_back("free", address)

    def cudaMallocHost(self, size):
        return self._take("malloc_host", size)

    def cudaFreeHost(self, address):
        return self._give_back("free_host", address)

    def cudaStreamCreateWithFlags(self, flags):
        return OK, 7

    def cudaStreamDestroy(self, stream):
        return (OK,)

    def cudaStreamSynchronize(self, stream):
        assert self.captured is None, "a stream that captures cannot be waited for"
        self.events.append(("wait",))
        return (self.failing,)

    def enqueue(self, event, work):
        if self.captured is not None:
            self.captured.append(work)
        else:
            self.events.append(event)
            work()

    def cudaMemcpyAsync(self, to, source, size, kind, stream):
        assert stream == 7 and size <= min(len(self.blocks[to]), len(self.blocks[source]))
        self.enqueue((kind, size), lambda: ctypes.memmove(to, source, size))
        return (OK,)

    def cudaStreamBeginCapture(self, stream, mode):
        assert self.captured is None
        self.captured = []
        return (OK,)

    def cudaStreamEndCapture(self, stream):
        found, self.captured = self.captured, None
        return (OK, found) if self.capturable else (INVALID, None)

    def cudaGraphInstantiate(self, graph, flags):
        self.events.append(("instantiate", len(graph)))
        return OK, tuple(graph)

    def cudaGraphDestroy(self, graph):
        return (OK,)

    def cudaGraphExecDestroy(self, graph):
        self.events.append(("forget",))
        return (OK,)

    def cudaGraphLaunch(self, graph, stream):
        assert self.captured is None
        self.events.append(("launch",))
        for work in graph:
            work()
        return (OK,)


class Logger:
    INTERNAL_ERROR, ERROR, WARNING = "internal", "error", "warning"


class FakeTensorRt:
    """The module ``tensorrt``; ``builds`` are the graphs built, ``refuses`` makes the parser fail."""

    ILogger = Logger
    TensorIOMode = SimpleNamespace(INPUT="in", OUTPUT="out")
    MemoryPoolType = SimpleNamespace(WORKSPACE="workspace")
    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="ours")
    NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=1)

    def __init__(self, cuda: FakeCuda, version: str = "10.3.0", refuses: str = "") -> None:
        self.__name__, self.__version__, self.cuda, self.refuses = "tensorrt", version, cuda, refuses
        self.builds: list[Path] = []
        self.timing_caches: list[bytes] = []

    def Builder(self, logger):
        return _Builder(self, logger)

    def OnnxParser(self, network, logger):
        return _Parser(network, self.refuses)

    def Runtime(self, logger):
        return _Runtime(self.cuda, logger)


@dataclass
class _Network:
    flags: int
    path: Path | None = None
    inputs: list[Any] = field(default_factory=list)

    @property
    def num_inputs(self):
        return len(self.inputs)

    def get_input(self, index):
        return self.inputs[index]


@dataclass
class _Parser:
    network: _Network
    refuses: str

    @property
    def num_errors(self):
        return int(bool(self.refuses))

    def get_error(self, index):
        return SimpleNamespace(desc=lambda: self.refuses, node_name=lambda: "node_3", node_operator=lambda: "NonZero")

    def parse_from_file(self, path):
        if self.refuses:
            return False
        session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
        self.network.path = Path(path)
        self.network.inputs = [
            SimpleNamespace(name=v.name, shape=[d if isinstance(d, int) else -1 for d in v.shape])
            for v in session.get_inputs()
        ]
        return True


class _Builder:
    def __init__(self, library, logger):
        self._library, self._logger = library, logger

    def create_network(self, flags):
        return _Network(flags)

    def create_builder_config(self):
        return _Config(self._library)

    def create_optimization_profile(self):
        return _Profile()

    def build_serialized_network(self, network, config):
        assert network.flags == 2 and config.workspace > 0 and len(config.profiles) == 1
        if config.workspace < 1 << 20:
            self._logger.log(Logger.ERROR, "no tactic fits the workspace")
            return None
        self._library.builds.append(network.path)
        shapes = {v.name: config.profiles[0].shapes.get(v.name, [v.shape] * 3) for v in network.inputs}
        return json.dumps({"path": str(network.path), "shapes": shapes}).encode()


class _Profile:
    def __init__(self):
        self.shapes = {}

    def set_shape(self, name, least, usual, most):
        if not all(low <= mid <= high for low, mid, high in zip(least, usual, most, strict=True)):
            raise ValueError(f"{name}: not in order")
        self.shapes[name] = [list(least), list(usual), list(most)]


class _Config:
    def __init__(self, library):
        self._library, self.profiles, self.workspace = library, [], 0

    def add_optimization_profile(self, profile):
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def set_memory_pool_limit(self, pool, size):
        assert pool == "workspace"
        self.workspace = size

    def create_timing_cache(self, data):
        self._library.timing_caches.append(data)
        return SimpleNamespace(serialize=lambda: b"timings")

    def set_timing_cache(self, cache, ignore_mismatch):
        self._cache = cache
        return True

    def get_timing_cache(self):
        return self._cache


class _Runtime:
    def __init__(self, cuda, logger):
        self._cuda, self._logger = cuda, logger

    def deserialize_cuda_engine(self, plan):
        try:
            facts = json.loads(plan)
        except ValueError:
            self._logger.log(Logger.ERROR, "magic tag does not match")
            return None
        return _Engine(self._cuda, facts)


class _Engine:
    device_memory_size_v2 = 4096

    def __init__(self, cuda, facts):
        self.cuda, self.shapes = cuda, facts["shapes"]
        self.session = ort.InferenceSession(facts["path"], providers=["CPUExecutionProvider"])
        self.inputs = {v.name: v.type[7:-1] for v in self.session.get_inputs()}
        self.outputs = {v.name: v.type[7:-1] for v in self.session.get_outputs()}

    @property
    def num_io_tensors(self):
        return len(self.inputs) + len(self.outputs)

    def get_tensor_name(self, index):
        return [*self.inputs, *self.outputs][index]

    def get_tensor_mode(self, name):
        return "in" if name in self.inputs else "out"

    def get_tensor_dtype(self, name):
        return SimpleNamespace(name=TYPES[(self.inputs | self.outputs)[name]])

    def get_tensor_profile_shape(self, name, profile):
        assert profile == 0
        return self.shapes[name]

    def create_execution_context(self, strategy):
        assert strategy == "ours"
        self.cuda.events.append(("context",))
        return _Context(self)


class _Context:
    def __init__(self, engine):
        self._engine, self._shapes, self._addresses, self._memory = engine, {}, {}, None
        self._outputs: dict[str, tuple[int, ...]] | None = None

    def set_device_memory(self, address, size):
        assert size >= self._engine.device_memory_size_v2 <= len(self._engine.cuda.blocks[address])
        self._memory = address

    def set_input_shape(self, name, shape):
        least, _, most = self._engine.shapes[name]
        if not all(low <= size <= high for low, size, high in zip(least, shape, most, strict=True)):
            return False
        self._shapes[name], self._outputs = tuple(shape), None
        return True

    def set_tensor_address(self, name, address):
        assert address in self._engine.cuda.blocks
        self._addresses[name] = address
        return True

    def get_tensor_shape(self, name):
        if self._outputs is None:
            zeros = {n: np.zeros(self._shapes[n], NUMPY[kind]) for n, kind in self._engine.inputs.items()}
            found = self._engine.session.run(None, zeros)
            self._outputs = {n: v.shape for n, v in zip(self._engine.outputs, found, strict=True)}
        return self._outputs[name]

    def get_max_output_size(self, name):
        return int(np.prod(self.get_tensor_shape(name))) * np.dtype(NUMPY[self._engine.outputs[name]]).itemsize

    def _array(self, name, shape, kind):
        count = int(np.prod(shape)) * np.dtype(NUMPY[kind]).itemsize
        held = np.ctypeslib.as_array(self._engine.cuda.blocks[self._addresses[name]])
        return held[:count].view(NUMPY[kind]).reshape(shape)

    def execute_async_v3(self, stream):
        assert stream == 7 and self._memory is not None
        engine, shapes = self._engine, dict(self._shapes)
        assert self._addresses.keys() == engine.inputs.keys() | engine.outputs.keys()

        def work():
            assert self._shapes == shapes, "a recorded graph is launched after its context took other shapes"
            fed = {name: self._array(name, shapes[name], kind) for name, kind in engine.inputs.items()}
            for (name, kind), value in zip(engine.outputs.items(), engine.session.run(None, fed), strict=True):
                self._array(name, value.shape, kind)[...] = value

        engine.cuda.enqueue(("execute", tuple(shapes.values())), work)
        return True
