"""ONNX graphs: traced without weights, filled, switched between adapters, and run a slice at a time."""
