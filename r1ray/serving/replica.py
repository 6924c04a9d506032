"""The Serve deployment that runs the model: an `Engine` in an actor.

Errors cross to the ingress as values (`Failure`), since exceptions would arrive wrapped by Ray.
"""

import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Literal

import torch

from r1ray.config.schema import AttentionKind
from r1ray.errors import ConfigError, ServingError
from r1ray.models import ModelConfig, load_model
from r1ray.models.decoder import Decoder
from r1ray.models.gates import set_attention
from r1ray.models.generation import BatchGenerator, GenerationRequest, TokenEvent
from r1ray.models.grammar import FormCompiler
from r1ray.models.kv_cache import cache_bytes
from r1ray.models.quantization import tie_head
from r1ray.models.tiered import load_to_serve, move_to_device
from r1ray.models.tokenizer import Tokenizer
from r1ray.observability.logging import setup_logging
from r1ray.ops import native
from r1ray.serving.engine import Engine

__all__ = ["Failure", "ModelReplica", "build_engine", "check_context", "compile_forms"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Failure:
    """A ServingError on its way between processes."""

    message: str
    status: int
    code: str | None
    param: str | None

    @classmethod
    def of(cls, error: ServingError) -> "Failure":
        """The failure that `to_error` turns back into `error`."""
        return cls(str(error), error.status, error.code, error.param)

    def to_error(self) -> ServingError:
        """The error to raise in the receiving process."""
        return ServingError(self.message, status=self.status, code=self.code, param=self.param)


def check_context(max_context_tokens: int, config: ModelConfig) -> None:
    """Raise ConfigError when requests could be longer than the model's positions."""
    if max_context_tokens > config.max_context:
        raise ConfigError(
            f"serve.max_context_tokens ({max_context_tokens}) is above the model's "
            f"{config.max_context} positions; lower it"
        )


def compile_forms(model_dir: str) -> FormCompiler:
    """For the model in `model_dir` and its end tokens."""
    config, tokenizer = ModelConfig.load(model_dir), Tokenizer(model_dir)
    stops = {tokenizer.eos_token_id, *config.eos_token_ids}
    return FormCompiler(tokenizer, vocab_size=config.vocab_size, stop_token_ids=stops)


def build_engine(
    model_dir: str,
    *,
    max_concurrency: int,
    max_queued_requests: int,
    max_context_tokens: int,
    max_step_tokens: int = 256,
    attention: AttentionKind = "auto",
    kv_cache: Literal["float", "int8"] = "float",
    budget_mib: int | None = None,
) -> Engine:
    """An engine over the model in `model_dir`, on the GPU that Ray gave this process, if any."""
    check_context(max_context_tokens, ModelConfig.load(model_dir))
    kv_dtype = torch.int8 if kv_cache == "int8" else None
    kv_bytes = cache_bytes(
        ModelConfig.load(model_dir),
        max_rows=max_concurrency,
        max_tokens=max_context_tokens,
        dtype=kv_dtype or torch.float32,
    )
    model = _load(model_dir, budget_mib, kv_bytes)
    set_attention(model, attention)
    forms = compile_forms(model_dir)
    return Engine(
        lambda: BatchGenerator(
            model,
            max_concurrency=max_concurrency,
            max_context_tokens=max_context_tokens,
            max_step_tokens=max_step_tokens,
            kv_dtype=kv_dtype,
            forms=forms,
        ),
        max_concurrency=max_concurrency,
        max_queued_requests=max_queued_requests,
    )


class ModelReplica:
    """Streams tokens for the ingress; unhealthy as soon as its engine thread has died."""

    def __init__(
        self,
        model_dir: str,
        *,
        max_concurrency: int,
        max_queued_requests: int,
        max_context_tokens: int,
        max_step_tokens: int,
        attention: AttentionKind,
        kv_cache: Literal["float", "int8"],
        budget_mib: int | None,
        num_threads: int,
    ) -> None:
        setup_logging()
        torch.set_num_threads(num_threads)
        self._engine = build_engine(
            model_dir,
            max_concurrency=max_concurrency,
            max_queued_requests=max_queued_requests,
            max_context_tokens=max_context_tokens,
            max_step_tokens=max_step_tokens,
            attention=attention,
            kv_cache=kv_cache,
            budget_mib=budget_mib,
        )
        logger.info("%s is loaded; %d torch threads; %s", model_dir, num_threads, native.describe())

    async def generate(
        self, request: GenerationRequest
    ) -> AsyncIterator[Sequence[TokenEvent] | Failure]:
        """The tokens of `request` as they come; a Failure is the last item.

        Cancelling the call, which Serve does when the client is gone, frees the request's row.
        """
        try:
            async with aclosing(self._engine.submit(request)) as batches:
                async for events in batches:
                    yield events
        except ServingError as error:
            yield Failure.of(error)

    async def ping(self) -> tuple[int, int]:
        """(requests open, requests that hold a row).

        Raises:
            RuntimeError: the engine thread has died.
        """
        self.check_health()
        return self._engine.num_open, self._engine.num_running

    def check_health(self) -> None:
        """Called by Serve, which replaces the replica when this raises."""
        if not self._engine.is_alive:
            raise RuntimeError("the engine thread has died")

    def __del__(self) -> None:
        if hasattr(self, "_engine"):  # absent when loading failed
            self._engine.close()


def _load(model_dir: str, budget_mib: int | None, kv_bytes: int) -> Decoder:
    has_gpu = torch.cuda.is_available()
    if budget_mib is not None and not has_gpu:
        if kv_bytes >= budget_mib << 20:
            raise ConfigError(
                f"serve.budget_mib ({budget_mib}) is below the {kv_bytes / 2**20:.0f} MiB of "
                "max_concurrency requests of max_context_tokens; raise it or lower them"
            )
        budget_bytes = budget_mib << 20
        return load_to_serve(model_dir, budget_bytes=budget_bytes, reserved_bytes=kv_bytes).model
    model = load_model(model_dir)
    if budget_mib is not None:
        move_to_device(model, torch.device("cuda"), budget_bytes=budget_mib << 20)
    elif has_gpu:
        model = model.to("cuda")
        tie_head(model)
    return model
