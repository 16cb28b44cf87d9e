"""Tasks: one file each. Features of tiles in, predictions in tile pixels out; they get sessions, never engines."""
