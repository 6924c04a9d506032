"""The shortest configuration, and what becomes of it with overrides."""

from typing import Any

import pytest
import yaml

from r1ray.config import PipelineConfig
from r1ray.config.loader import parse_config
from r1ray.errors import ConfigError

__all__ = ["MINIMAL", "TEXT", "parse", "refuse"]

MINIMAL: dict[str, Any] = {
    "run": {"name": "x"},
    "base": {"source": "model"},
    "tasks": {"families": [{"name": "gcd"}], "system_prompt": "Think."},
    "prepare": {
        "sources": [{"type": "tasks", "num_samples": 10}],
        "max_tokens": 64,
        "batch_tokens": 128,
    },
    "train": {"num_steps": 20},
    "compress": {},
    "evaluate": {},
    "serve": {"model_name": "x"},
}
TEXT = yaml.safe_dump(MINIMAL)


def parse(*overrides: str) -> PipelineConfig:
    return parse_config(TEXT, overrides)


def refuse(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(*overrides)
    return str(caught.value)
