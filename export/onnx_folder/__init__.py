"""ONNX exports that others made, taken as they are."""
