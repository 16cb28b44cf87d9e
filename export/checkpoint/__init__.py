"""Checkpoints of transformers: read lazily, built empty, run without being held, written tensor by tensor."""
