"""The only composition of stages: raster, tiles, engine, task, merge and geo, one module per task."""
