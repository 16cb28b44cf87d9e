"""The default model: one encoder and its heads, as torch modules."""
