"""An image and a text written as the one string that a model was trained to read, and where its tokens stand.

Letters: S tokens of the prompt, H, W visual tokens of a tile by row and column.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_rsvlm.config.task_specs import VisualTokens
from edge_rsvlm.errors import BundleError

REMAKE = "export the bundle again"


@dataclass(frozen=True)
class Layout:
    """An image as the encoder sees it: one tile, or a split of ``rows`` x ``cols`` followed by an overview."""

    tiles: int
    rows: int
    cols: int
    tile_hw: tuple[int, int]
    """Pixels."""


def grid(visual: VisualTokens, tile_hw: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of the visual tokens of one tile."""
    if visual.unit_px is None:
        raise BundleError("the manifest does not say how visual tokens lie ('unit_px')", fix=REMAKE)
    return tile_hw[0] // visual.unit_px, tile_hw[1] // visual.unit_px


def write_image(visual: VisualTokens, layout: Layout) -> str:
    """The image's part of the prompt."""
    tokens = ""
    if visual.token is not None:
        height, width = (1, visual.per_tile) if visual.per_tile else grid(visual, layout.tile_hw)
        tokens = visual.token * (height * width)
    if layout.tiles == 1:
        return visual.single.replace("{tokens}", tokens)
    if visual.tile is None or visual.overview is None or layout.tiles != layout.rows * layout.cols + 1:
        raise BundleError(
            f"the manifest does not say how {layout.rows} x {layout.cols} tiles and {layout.tiles} images are written",
            fix=REMAKE,
        )
    written = ""
    for row in range(1, layout.rows + 1):
        for col in range(1, layout.cols + 1):
            written += visual.tile.replace("{row}", str(row)).replace("{col}", str(col))
        written += visual.row_end
    return (written + visual.overview).replace("{tokens}", tokens)


def sequence_positions(length: int) -> NDArray[np.int64]:
    """0, 1, 2 ... [S]."""
    return np.arange(length, dtype=np.int64)


def mrope_positions(visual_S: NDArray[np.bool_], grid_hw: tuple[int, int]) -> NDArray[np.int64]:
    """Positions in time, height and width [3, S].

    The tokens of a tile (each run of H * W in ``visual_S``) stand at one time, and at their row and column; what
    follows goes on after the greatest of these. Source: Wang et al. 2024, "Qwen2-VL", section 2.1.
    """
    height, width = grid_hw
    inside_3T = np.stack([np.zeros(height * width, np.int64), *np.divmod(np.arange(height * width), width)])
    positions_3S = np.zeros((3, len(visual_S)), np.int64)
    token, start = 0, 0
    while token < len(visual_S):
        if visual_S[token]:
            here = positions_3S[:, token : token + height * width]
            here[:] = start + inside_3T[:, : here.shape[1]]
            token, start = token + height * width, start + max(grid_hw)
        else:
            positions_3S[:, token] = start
            token, start = token + 1, start + 1
    return positions_3S
