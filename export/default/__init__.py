"""The packaged model: its data, training, evaluation and bundle."""
