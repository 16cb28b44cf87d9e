"""Graphs for TensorRT: what it would not take, the shapes that engines are built for, and a compile check."""
