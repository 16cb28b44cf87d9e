"""The GPU with the libraries that run on it."""

from __future__ import annotations

from dataclasses import dataclass

from edge_rsvlm.engines.cuda import Cuda, Gpu, load_cuda
from edge_rsvlm.engines.tensorrt_library import Complaints, TensorRt, load_tensorrt


@dataclass(frozen=True)
class Device:
    """The libraries and the GPU that engines run on."""

    library: TensorRt
    cuda: Cuda
    gpu: Gpu
    complaints: Complaints


def open_device() -> Device:
    """UsageError where TensorRT, cuda-bindings or a GPU is missing."""
    return device_of(load_tensorrt(), Cuda(load_cuda()))


def device_of(library: TensorRt, cuda: Cuda) -> Device:
    return Device(library, cuda, cuda.gpu(), Complaints(library))
