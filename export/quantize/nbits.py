"""The numbers of a weight in blocks, and the two layouts in which graphs hold them. NumPy, written to be read: this is
what the engines' own packing must equal to the bit.

Letters: N outputs and K inputs of a layer, G blocks of a row. A weight is ``(number - zero) * scale``, with a scale and
a zero for every block of ``block`` inputs of an output. Numbers are unsigned: 0 to 15 of 4 bits, 0 to 255 of 8 bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Floats = NDArray[np.floating]


@dataclass(frozen=True)
class Blocks:
    """A weight [N, K] in ``bits``; ``zeros_NG`` is None where every zero is the middle number (symmetric)."""

    numbers_NK: Bytes
    scales_NG: Floats
    zeros_NG: Bytes | None
    block: int
    bits: int

    @property
    def middle(self) -> int:
        return 1 << (self.bits - 1)

    def values_NK(self) -> NDArray[np.float32]:
        """The weight that the numbers stand for."""
        zeros_NG = np.full(self.scales_NG.shape, self.middle, np.uint8) if self.zeros_NG is None else self.zeros_NG
        scales_NK, zeros_NK = (self._per_input(part) for part in (self.scales_NG, zeros_NG))
        return (self.numbers_NK.astype(np.float32) - zeros_NK) * scales_NK

    def _per_input(self, values_NG: NDArray[np.generic]) -> NDArray[np.float32]:
        return np.repeat(values_NG.astype(np.float32), self.block, axis=1)[:, : self.numbers_NK.shape[1]]


def pack(blocks: Blocks) -> tuple[Bytes, Bytes | None]:
    """Numbers [N, G, block * bits / 8] and zeros [N, bytes] of ``com.microsoft::MatMulNBits``.

    Of two numbers in a byte the first has the low half. What pads the last block is 0, and so is what pads the zeros.
    """
    outputs, inputs = blocks.numbers_NK.shape
    padded_NK = np.pad(blocks.numbers_NK, ((0, 0), (0, -inputs % blocks.block)))
    packed = _pack_pairs(padded_NK, blocks.bits).reshape(outputs, blocks.scales_NG.shape[1], -1)
    if blocks.zeros_NG is None:
        return packed, None
    return packed, _pack_pairs(np.pad(blocks.zeros_NG, ((0, 0), (0, blocks.scales_NG.shape[1] % 2))), blocks.bits)


def unpack(packed: Bytes, scales_NG: Floats, zeros: Bytes | None, inputs: int, bits: int) -> Blocks:
    """The opposite of ``pack`` for a layer of ``inputs``."""
    outputs, count = scales_NG.shape
    numbers_NK = _unpack_pairs(packed.reshape(outputs, -1), bits)
    block = numbers_NK.shape[1] // count
    zeros_NG = None if zeros is None else _unpack_pairs(zeros.reshape(outputs, -1), bits)[:, :count]
    return Blocks(numbers_NK[:, :inputs], scales_NG, zeros_NG, block, bits)


def pack_int4_KN(blocks: Blocks) -> Bytes:
    """Bytes of an ONNX INT4 tensor [K, N], row by row, of symmetric numbers in 4 bits: each less the middle."""
    signed_KN = (blocks.numbers_NK.T.astype(np.int8) - blocks.middle).astype(np.uint8) & 0xF
    return _pack_pairs(np.pad(signed_KN.reshape(-1), (0, signed_KN.size % 2)), 4)


def _pack_pairs(numbers: Bytes, bits: int) -> Bytes:
    return numbers if bits == 8 else (numbers[..., ::2] | numbers[..., 1::2] << 4).astype(np.uint8)


def _unpack_pairs(packed: Bytes, bits: int) -> Bytes:
    if bits == 8:
        return packed
    return np.stack([packed & 0xF, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
