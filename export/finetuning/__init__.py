"""Training an adapter on a JSONL of captions, questions or boxes."""
