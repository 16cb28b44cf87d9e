"""The default model that is asked by words and by examples: its stages as a checkpoint, and its export."""
