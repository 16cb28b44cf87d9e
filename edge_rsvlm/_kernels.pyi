from typing import Any

from numpy.typing import NDArray

def variants() -> list[str]: ...
def tile_gather_into(
    source: NDArray[Any],
    interleaved: bool,
    valid_HW: NDArray[Any] | None,
    boxes_N4: NDArray[Any],
    bands_C: NDArray[Any],
    gain_C: NDArray[Any],
    bias_C: NDArray[Any],
    origin: list[int],
    raster_size: list[int],
    tiles: NDArray[Any],
    valid_fraction_N: NDArray[Any],
    texture_N: NDArray[Any],
    resampling: str,
    pillow_rounding: bool,
    threads: int,
    variant: str,
) -> None: ...
