"""PEFT LoRA adapters: read, matched to a model, merged, or applied without merging."""
