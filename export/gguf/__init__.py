"""Models as GGUF files, which llama.cpp reads: language models, projectors, and both with fewer bits."""
