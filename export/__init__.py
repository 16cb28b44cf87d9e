"""Ground side: training stages, ONNX compilation and bundle assembly. Needs the `export` extra (torch)."""
