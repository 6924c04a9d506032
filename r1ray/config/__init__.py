"""Configuration: `load_config` reads it, `schema` defines it."""

from r1ray.config.loader import load_config
from r1ray.config.schema import PipelineConfig

__all__ = ["PipelineConfig", "load_config"]
