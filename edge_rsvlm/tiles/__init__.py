"""Fused tiling: raster pixels in, model tiles out. Training, calibration and the device share this one definition."""

from edge_rsvlm.tiles.gather import ABSENT, VALIDITY, GatherResult, tile_gather, variants

__all__ = ["ABSENT", "VALIDITY", "GatherResult", "tile_gather", "variants"]
