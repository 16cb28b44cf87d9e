"""GGUF files with fewer bits, by llama.cpp's own quantization, and a look at what it really did.

Where a row of a matrix is no multiple of a type's block, llama.cpp takes another type and says so in its log alone;
here that is a metric, and an error where most of the model is concerned.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections import Counter
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
from numpy.typing import NDArray

from edge_rsvlm.errors import BundleError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

Metrics = dict[str, float | int | str]
Importance = Mapping[str, NDArray[np.float32]]
"""Mean square of every input of a matrix, by the matrix's name in the file."""

TYPES: dict[str, frozenset[str]] = {
    "Q8_0": frozenset({"Q8_0"}),
    "Q6_K": frozenset({"Q6_K"}),
    "Q5_K_M": frozenset({"Q5_K", "Q6_K"}),
    "Q4_K_M": frozenset({"Q4_K", "Q5_K", "Q6_K"}),
    "Q4_0": frozenset({"Q4_0", "Q4_1", "Q6_K"}),
    "IQ4_XS": frozenset({"IQ4_XS", "Q5_K", "Q6_K"}),
}
"""What llama.cpp makes matrices of a model where their rows allow it (src/llama-quant.cpp): the name's own type, and
wider ones for those that need it."""
MOST = 0.5


@dataclass(frozen=True)
class Stored:
    """What is in a file: numbers in matrices by their type, and matrices of a type that was not asked for."""

    numbers: Mapping[str, int]
    others: Mapping[str, str]
    other_share: float
    """Of the numbers."""


def quantize(text_gguf: Path, out: Path, kind: str, importance: Importance | None = None) -> Metrics:
    """Write ``out``; the metrics are its bytes, bits per weight, and the share of every type.

    UsageError when most of the model had to take another type; BundleError when llama.cpp fails.
    """
    from edge_rsvlm.engines.llama_library import C, reason

    params = C.llama_model_quantize_default_params()
    params.ftype = getattr(C, f"LLAMA_FTYPE_MOSTLY_{kind}")
    params.nthread = len(os.sched_getaffinity(0))
    with _in_c(C, importance or {}) as matrices:
        if importance:
            params.imatrix = matrices
        failed = C.llama_model_quantize(str(text_gguf).encode(), str(out).encode(), ctypes.byref(params))
    if failed:
        raise BundleError(f"llama.cpp cannot quantize {text_gguf.name} to {kind}: {reason()}", fix="quantize from F16")
    stored = inspect(out, kind)
    if stored.other_share > MOST:
        raise UsageError(
            f"{stored.other_share:.0%} of the model cannot be {kind}, whose blocks do not divide its rows",
            fix="take Q8_0 or Q4_0, of blocks of 32 numbers" if kind.endswith(("K", "K_M", "XS")) else "take F16",
        )
    return _metrics(out, stored)


def inspect(path: Path, kind: str) -> Stored:
    """Read back which type every matrix has."""
    numbers: Counter[str] = Counter()
    others: dict[str, str] = {}
    missed = 0
    for tensor in gguf.GGUFReader(path).tensors:
        if len(tensor.shape) > 1:
            numbers[tensor.tensor_type.name] += int(tensor.n_elements)
            if tensor.tensor_type.name not in TYPES[kind]:
                others[tensor.name] = tensor.tensor_type.name
                missed += int(tensor.n_elements)
    return Stored(numbers, others, missed / max(1, sum(numbers.values())))


def _metrics(path: Path, stored: Stored) -> Metrics:
    total, size = sum(stored.numbers.values()), path.stat().st_size
    shares = {f"share of {kind}": count / total for kind, count in sorted(stored.numbers.items())}
    found: Metrics = {"bytes": size, "bits per weight": 8 * size / total, **shares}
    if stored.others:
        found |= {"matrices of other types": len(stored.others), "share of other types": stored.other_share}
    return found


@contextmanager
def _in_c(C: Any, importance: Importance) -> Iterator[Any]:
    """The array that llama.cpp wants, ended by an entry without a name; alive inside the block."""
    arrays = {name: np.ascontiguousarray(values, np.float32) for name, values in importance.items()}
    for name, values in arrays.items():
        if not math.isfinite(float(values.sum())):
            raise BundleError(f"the importance of '{name}' is not finite", fix="calibrate on other images")
    entries = (C.llama_model_imatrix_data * (len(arrays) + 1))()
    for entry, (name, values) in zip(entries, arrays.items(), strict=False):
        entry.name, entry.size = name.encode(), values.size
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    yield entries
