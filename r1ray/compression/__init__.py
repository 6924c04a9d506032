"""From a float checkpoint to the served format."""
