"""TensorRT: one engine as a session, in memory that is taken once.

Buffers are as large as the largest shapes that the engine was built for. Inputs pass through page-locked memory; copies
and kernels run in one stream. Where one call has the shapes of the call before it, the shapes get a context of their
own and the next such call is recorded as a CUDA graph, copies included, which from then on is launched in one step. A
decoder whose caches grow never repeats its shapes, and is never recorded.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_rsvlm.engines.cuda import Buffer
from edge_rsvlm.engines.tensorrt_device import Device
from edge_rsvlm.engines.tensorrt_library import Context, Engine, Shape
from edge_rsvlm.errors import BudgetError, BundleError, InputError, UsageError

REBUILD = "build it again with `edge-rsvlm engine build`, or run with --device cpu"
DTYPES = {
    "FLOAT": "f4", "HALF": "f2", "INT8": "i1", "UINT8": "u1", "INT32": "i4", "INT64": "i8", "BOOL": "?"
}  # fmt: skip
MOST_GRAPHS = 4
"""Recorded at a time; each holds a context."""
Shapes = tuple[Shape, ...]


@dataclass(frozen=True)
class Port:
    """An input or output of an engine; outputs have no range."""

    name: str
    dtype: np.dtype[Any]
    buffer: Buffer
    least: Shape = ()
    most: Shape = ()

    @property
    def batch_axis(self) -> int | None:
        varying = (axis for axis, (low, high) in enumerate(zip(self.least, self.most, strict=True)) if low != high)
        return next(varying, None)

    def bytes(self, shape: Shape) -> int:
        return prod(shape) * self.dtype.itemsize


@dataclass
class Way:
    """A context for inputs of some shapes, and the graph that was recorded of it."""

    context: Context
    warm: bool = False
    graph: Any = None
    recordable: bool = True


class TensorRtSession:
    """One engine. ``name`` is for messages."""

    def __init__(self, device: Device, plan: bytes, name: str) -> None:
        self._device, self._name, self._lock = device, name, threading.Lock()
        self._runtime = device.library.Runtime(device.complaints.logger)
        engine = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise BundleError(f"TensorRT cannot load the engine of {name}: {device.complaints.reason()}", fix=REBUILD)
        self._engine: Engine = engine
        self._memory_bytes = max(engine.device_memory_size_v2, 1)
        self._memory = device.cuda.allocate(self._memory_bytes)
        self._inputs, self._outputs = {}, {}
        self._inputs = {port.name: port for port in self._input_ports()}
        self._roaming = self._context()
        self._outputs = {port.name: port for port in self._output_ports()}
        self._address(self._roaming)
        self._most_batch, self._batch_axes = self._batch()
        self._ways: OrderedDict[Shapes, Way] = OrderedDict()
        self._last: Shapes | None = None

    @property
    def device_bytes(self) -> int:
        """What this session holds beside the engine's weights: activations and buffers, of which the host has half."""
        ports = (*self._inputs.values(), *self._outputs.values())
        return self._memory_bytes + 2 * sum(port.buffer.size for port in ports)

    def close(self) -> None:
        """Give everything back; the session cannot be used any more."""
        cuda = self._device.cuda
        for way in self._ways.values():
            self._forget(way)
        self._ways.clear()
        for port in (*self._inputs.values(), *self._outputs.values()):
            cuda.release(port.buffer)
        cuda.free(self._memory)

    def run(self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> list[NDArray[Any]]:
        """The named outputs; half precision comes back as float32.

        InputError for inputs of a shape that the engine was not built for.
        """
        if unknown := (inputs.keys() - self._inputs.keys()) | (set(outputs) - self._outputs.keys()):
            raise UsageError(
                f"the engine of {self._name} has no {', '.join(sorted(unknown))}; adapters need the CPU",
                fix="run with --device cpu",
            )
        if missing := self._inputs.keys() - inputs.keys():
            raise BundleError(f"{self._name} was not given {', '.join(sorted(missing))}", fix="export the bundle again")
        with self._lock:
            parts = [self._once(part, outputs) for part in self._parts(inputs)]
        return parts[0] if len(parts) == 1 else [np.concatenate(found) for found in zip(*parts, strict=True)]

    def _parts(self, inputs: Mapping[str, NDArray[Any]]) -> list[Mapping[str, NDArray[Any]]]:
        """What the engine takes at once: a larger batch in pieces."""
        sizes = {inputs[name].shape[axis : axis + 1] for name, axis in self._batch_axes.items()}
        if len(sizes) != 1 or not (size := sizes.pop()) or size[0] <= self._most_batch:
            return [inputs]
        starts = range(self._most_batch, size[0], self._most_batch)
        split = {name: np.split(inputs[name], starts, axis) for name, axis in self._batch_axes.items()}
        return [{name: parts[k] for name, parts in split.items()} for k in range(len(starts) + 1)]

    def _once(self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> list[NDArray[Any]]:
        shapes = tuple(self._take(port, inputs[name]) for name, port in self._inputs.items())
        context = self._go(shapes)
        return [self._give(self._outputs[name], context) for name in outputs]

    def _take(self, port: Port, array: NDArray[Any]) -> Shape:
        """Bring an input into its page-locked memory."""
        shape = tuple(array.shape)
        fits = len(shape) == len(port.most) and all(
            low <= size <= high for low, size, high in zip(port.least, shape, port.most, strict=True)
        )
        if not fits:
            raise InputError(
                f"{port.name} of {self._name} is {shape}, its engine takes {port.least} to {port.most}",
                fix="run with --device cpu, or give a smaller input",
            )
        port.buffer.view(port.dtype, shape)[...] = array
        return shape

    def _give(self, port: Port, context: Context) -> NDArray[Any]:
        found = port.buffer.view(port.dtype, tuple(context.get_tensor_shape(port.name)))
        return found.astype(np.float32) if port.dtype == np.float16 else found.copy()

    def _go(self, shapes: Shapes) -> Context:
        """Run, and return the context that knows the outputs' shapes."""
        way = self._ways.get(shapes)
        if way is None and shapes == self._last:
            way = self._dedicate(shapes)
        self._last = shapes
        if way is None:
            self._shape(self._roaming, shapes)
            self._enqueue(self._roaming, shapes)
            context = self._roaming
        else:
            self._ways.move_to_end(shapes)
            self._follow(way, shapes)
            context = way.context
        self._device.cuda.wait()
        return context

    def _dedicate(self, shapes: Shapes) -> Way:
        """A recorded graph holds what its context had: other shapes must not pass through that."""
        if len(self._ways) >= MOST_GRAPHS:
            self._forget(self._ways.popitem(last=False)[1])
        way = self._ways[shapes] = Way(self._context())
        self._address(way.context)
        self._shape(way.context, shapes)
        return way

    def _follow(self, way: Way, shapes: Shapes) -> None:
        """Plainly the first time, since TensorRT may still set things up; then recorded; then launched."""
        if way.warm and way.graph is None and way.recordable:
            try:
                way.graph = self._device.cuda.capture(lambda: self._enqueue(way.context, shapes))
            except BundleError:  # of CUDA or TensorRT
                way.recordable = False
        way.warm = True
        if way.graph is None:
            self._enqueue(way.context, shapes)
        else:
            self._device.cuda.launch(way.graph)

    def _enqueue(self, context: Context, shapes: Shapes) -> None:
        cuda = self._device.cuda
        for port, shape in zip(self._inputs.values(), shapes, strict=True):
            cuda.to_device(port.buffer, port.bytes(shape))
        if not context.execute_async_v3(int(cuda.stream)):
            raise BundleError(f"TensorRT failed in {self._name}: {self._device.complaints.reason()}", fix=REBUILD)
        for port in self._outputs.values():
            cuda.to_host(port.buffer, port.bytes(tuple(context.get_tensor_shape(port.name))))

    def _forget(self, way: Way) -> None:
        if way.graph is not None:
            self._device.cuda.forget(way.graph)

    def _context(self) -> Context:
        """With the session's own memory for activations, which all contexts share: they run one after another."""
        strategy = self._device.library.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self._engine.create_execution_context(strategy)
        if context is None:
            reason = self._device.complaints.reason()
            raise BudgetError(f"TensorRT makes no context for {self._name}: {reason}", fix="run with --device cpu")
        context.set_device_memory(self._memory, self._memory_bytes)
        return context

    def _address(self, context: Context) -> None:
        for port in (*self._inputs.values(), *self._outputs.values()):
            context.set_tensor_address(port.name, port.buffer.device)

    def _shape(self, context: Context, shapes: Shapes) -> None:
        for port, shape in zip(self._inputs.values(), shapes, strict=True):
            if not context.set_input_shape(port.name, shape):
                raise BundleError(
                    f"TensorRT refuses {shape} for {port.name} of {self._name}: {self._device.complaints.reason()}",
                    fix=REBUILD,
                )

    def _batch(self) -> tuple[int, dict[str, int]]:
        """The largest batch, and its axis in every input: the first that varies, as large as the first of all outputs.

        No axes for an engine whose batch cannot be told, which then takes what it was built for. The roaming context
        has the largest shapes.
        """
        most = {tuple(self._roaming.get_tensor_shape(name))[:1] for name in self._outputs}
        axes = {name: axis for name, port in self._inputs.items() if (axis := port.batch_axis) is not None}
        found = {(self._inputs[name].most[axis],) for name, axis in axes.items()}
        known = len(axes) == len(self._inputs) and len(found) == 1 and found == most
        return (found.pop()[0], axes) if known else (0, {})

    def _names(self, mode: Any) -> list[str]:
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        return [name for name in names if self._engine.get_tensor_mode(name) == mode]

    def _dtype(self, name: str) -> np.dtype[Any]:
        found = self._engine.get_tensor_dtype(name).name
        if found not in DTYPES:
            raise BundleError(f"{name} of {self._name} has type {found}", fix="export it with float inputs and outputs")
        return np.dtype(DTYPES[found])

    def _input_ports(self) -> list[Port]:
        found = []
        for name in self._names(self._device.library.TensorIOMode.INPUT):
            least, _, most = (tuple(shape) for shape in self._engine.get_tensor_profile_shape(name, 0))
            dtype = self._dtype(name)
            found.append(Port(name, dtype, self._device.cuda.buffer(prod(most) * dtype.itemsize), least, most))
        return found

    def _output_ports(self) -> list[Port]:
        """Sized for the largest inputs; BundleError where sizes depend on values."""
        self._shape(self._roaming, tuple(port.most for port in self._inputs.values()))
        found = []
        for name in self._names(self._device.library.TensorIOMode.OUTPUT):
            most = self._roaming.get_max_output_size(name)
            if most < 0 or min(self._roaming.get_tensor_shape(name), default=0) < 0:
                raise BundleError(f"the size of {name} of {self._name} depends on values", fix="run with --device cpu")
            found.append(Port(name, self._dtype(name), self._device.cuda.buffer(most)))
        return found
