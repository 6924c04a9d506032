"""From rows of text to token-budget micro-batches."""
