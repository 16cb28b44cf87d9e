"""Fewer bits: ranges from calibration images, weights in 8 or 4 bits, and what that costs."""
