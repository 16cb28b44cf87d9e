"""Rasters: open, plan windows, read each block once, keep mask, transform and CRS with the pixels."""
