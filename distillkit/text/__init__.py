"""From learned embeddings to words: projection, swaps, relaxed choice, chosen sentences."""
