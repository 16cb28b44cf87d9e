"""Change: features of two dates, compared by the head, give a probability per cell of ``stride`` tile pixels."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edge_rsvlm.config.manifest import ChangeTask
from edge_rsvlm.tasks.encode import Features
from edge_rsvlm.types import InferenceSession


class ChangeDetector:
    """Features of both dates -> probability of change [N, h, w]."""

    def __init__(self, spec: ChangeTask, head: InferenceSession) -> None:
        self._spec, self._head = spec, head

    def __call__(self, before: Features, after: Features) -> NDArray[np.float32]:
        inputs = {
            f"{date}_{name}": features[name]
            for date, features in (("before", before), ("after", after))
            for name in self._spec.encoder_outputs
        }
        (change_N1hw,) = self._head.run(inputs, ["change"])
        probability: NDArray[np.float32] = change_N1hw[:, 0]
        return probability
