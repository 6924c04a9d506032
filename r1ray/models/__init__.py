"""The decoder and everything that reads, writes and runs it."""

from r1ray.models.checkpoint import load_model, save_model
from r1ray.models.config import ModelConfig
from r1ray.models.decoder import Decoder

__all__ = ["Decoder", "ModelConfig", "load_model", "save_model"]
