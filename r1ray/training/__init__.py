"""Fine-tuning on Ray Train through the exchange interface."""
