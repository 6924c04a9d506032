"""Every error that r1ray raises on purpose.

R1RayError
├── ConfigError      a configuration value, key or override is wrong
├── ArtifactError    a file or directory is missing, damaged or of the wrong kind
├── ShapeError       a tensor or a list of lengths does not fit
├── ImageError       bytes are no image, or one beyond the limits
├── BudgetError      more memory is needed than the budget allows
├── ExchangeError    workers could not exchange gradients or weights
├── DivergenceError  training does not get better by trying again: its gradients are not finite
├── ForgettingError  a new model has lost too much of what the published one knows
└── ServingError     a request cannot be answered; carries the HTTP status and OpenAI's error code

Messages name the value, the rule and the fix. `assert` is kept for r1ray's own invariants.
"""

import functools
from typing import Any

__all__ = [
    "ArtifactError",
    "BudgetError",
    "ConfigError",
    "DivergenceError",
    "ExchangeError",
    "ForgettingError",
    "ImageError",
    "R1RayError",
    "ServingError",
    "ShapeError",
]


class R1RayError(Exception):
    """Base of all errors raised on purpose; the jobs print it without a traceback and exit 2."""


class ConfigError(R1RayError):
    """A configuration value, key or override is wrong."""


class ArtifactError(R1RayError):
    """A file or directory is missing, damaged or of the wrong kind."""


class ShapeError(R1RayError):
    """A tensor, a list of lengths or an index does not fit."""


class ImageError(R1RayError):
    """Bytes are no image that can be read, or one beyond the limits."""


class BudgetError(R1RayError):
    """More memory is needed than the budget allows."""


class ExchangeError(R1RayError):
    """Workers could not exchange gradients or weights."""


class DivergenceError(R1RayError):
    """Gradients are not finite, step after step, whatever was done against it."""


class ForgettingError(R1RayError):
    """A new model has lost more of what the published one knows than is allowed."""


class ServingError(R1RayError):
    """A request cannot be answered.

    Args:
        message: what is wrong, which value, and the fix.
        status: HTTP status, 400-599.
        code: OpenAI's machine-readable error code, such as `context_length_exceeded`.
        param: the request field at fault, where there is one.
    """

    def __init__(
        self, message: str, *, status: int, code: str | None = None, param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param

    def __reduce__(self) -> tuple[Any, ...]:
        """Errors cross from replicas to the ingress."""
        build = functools.partial(type(self), status=self.status, code=self.code, param=self.param)
        return build, self.args
