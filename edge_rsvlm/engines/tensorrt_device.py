"""The GPU with the libraries that run on it."""

from __future__ import annotations

from dataclasses import dataclass

from edge_rsvlm.engines.cuda import Cuda, CudaError, Gpu, load_cuda
from edge_rsvlm.engines.tensorrt_library import Complaints, TensorRt, load_tensorrt
from edge_rsvlm.errors import UsageError


@dataclass(frozen=True)
class Device:
    """The libraries and the GPU that engines run on."""

    library: TensorRt
    cuda: Cuda
    gpu: Gpu
    complaints: Complaints


def open_device() -> Device:
    """UsageError where TensorRT, cuda-bindings or a GPU is missing, or the GPU does not answer."""
    library, runtime = load_tensorrt(), load_cuda()
    try:
        return device_of(library, Cuda(runtime))
    except CudaError as exc:
        raise UsageError(
            f"the GPU does not answer ({exc.reason})", fix="run with --device cpu, or mend the driver"
        ) from exc


def device_of(library: TensorRt, cuda: Cuda) -> Device:
    return Device(library, cuda, cuda.gpu(), Complaints(library))
