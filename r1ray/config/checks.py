"""What a configuration must keep to once the model is known."""

from r1ray.config.schema import PipelineConfig
from r1ray.errors import ConfigError

__all__ = ["check_lengths", "check_padding"]


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


def check_padding(config: PipelineConfig, even_context: int | None) -> None:
    """Raise ConfigError where padding would change how a row's positions are rotated.

    Args:
        even_context: tokens up to which rotations do not depend on a row's length; None where they
            never do.
    """
    prepare, distill = config.prepare, config.distill
    padded = {}
    if prepare.batching.type == "buckets":
        padded["prepare.batching {type: buckets}"] = prepare.max_tokens
    if distill is not None and distill.on_policy is not None:
        padded["distill.on_policy"] = prepare.max_tokens + distill.on_policy.max_new_tokens
    for key, tokens in padded.items():
        if even_context is not None and tokens > even_context:
            raise ConfigError(
                f"{key} pads rows of up to {tokens} tokens, and beyond {even_context} the model's "
                "rotary positions depend on a row's length; leave it out (buckets: set "
                "{type: packing}), or lower prepare.max_tokens"
            )
