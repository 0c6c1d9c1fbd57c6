"""Text to batches: tokenizer, sources, packing, mixture. Knows config, never the model."""
