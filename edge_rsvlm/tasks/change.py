"""Change: features of two dates, compared by the head, give a probability per cell of ``stride`` tile pixels."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edge_rsvlm.config.task_specs import ChangeTask
from edge_rsvlm.tasks.encode import Features, encode
from edge_rsvlm.types import InferenceSession


class ChangeDetector:
    """Tiles of two dates -> probability of change [N, h, w]."""

    def __init__(self, spec: ChangeTask, encoder: InferenceSession, head: InferenceSession) -> None:
        self._spec, self._encoder, self._head = spec, encoder, head

    def __call__(self, before_NCHW: NDArray[np.float32], after_NCHW: NDArray[np.float32]) -> NDArray[np.float32]:
        seen = self._compare(before_NCHW, after_NCHW)
        if not self._spec.mirrored:
            return seen
        in_mirror = self._compare(_mirrored(before_NCHW), _mirrored(after_NCHW))
        mean: NDArray[np.float32] = (seen + _mirrored(in_mirror)) / np.float32(2)
        return mean

    def _compare(self, before_NCHW: NDArray[np.float32], after_NCHW: NDArray[np.float32]) -> NDArray[np.float32]:
        outputs = self._spec.encoder_outputs
        inputs: Features = {}
        for date, tiles_NCHW in (("before", before_NCHW), ("after", after_NCHW)):
            maps = encode(self._encoder, tiles_NCHW, outputs)
            inputs |= {f"{date}_{name}": maps[name] for name in outputs}
        (change_N1hw,) = self._head.run(inputs, ["change"])
        probability: NDArray[np.float32] = change_N1hw[:, 0]
        return probability


def _mirrored(maps: NDArray[np.float32]) -> NDArray[np.float32]:
    """Left and right swapped."""
    return np.ascontiguousarray(maps[..., ::-1])
