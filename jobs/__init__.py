"""Entry points: `python -m jobs.<stage> --config FILE [section.key=value ...]`."""
