"""What a configuration must keep to once the model is known."""

from r1ray.config.schema import PipelineConfig
from r1ray.errors import ConfigError

__all__ = ["check_lengths"]


def check_lengths(
    config: PipelineConfig,
    max_context: int,
    *,
    of: str = "the base model",
    stages: tuple[str, ...] = ("prepare", "evaluate", "serve"),
) -> None:
    """Raise ConfigError where a stage would go beyond the positions that a model knows."""
    lengths = {
        "prepare.max_tokens": config.prepare.max_tokens,
        "evaluate.max_new_tokens": config.evaluate.max_new_tokens,
        "evaluate.perplexity_window": config.evaluate.perplexity_window,
        "serve.max_context_tokens": config.serve.max_context_tokens,
    }
    if config.distill is not None and config.distill.on_policy is not None:
        new_tokens = config.distill.on_policy.max_new_tokens
        key = "prepare.max_tokens + distill.on_policy.max_new_tokens"
        lengths[key] = config.prepare.max_tokens + new_tokens
    for key, length in lengths.items():
        if length > max_context and key.startswith(stages):
            raise ConfigError(
                f"{key} ({length}) is above {of}'s {max_context} positions; lower it, or scale "
                "the model's with base.context"
            )
