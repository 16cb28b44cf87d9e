"""Training data: decoded image stores, labels, and crops cut by the runtime's own `tile_gather`."""
