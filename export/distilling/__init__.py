"""Training a small checkpoint to answer as a large one does."""
