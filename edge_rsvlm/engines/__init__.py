"""Engines run graphs. One file each, and the engine's library is imported only inside it."""
