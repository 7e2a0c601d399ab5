"""From raw text to batches: sources, cleaning, tokens on disk, and the stream that mixes them."""
