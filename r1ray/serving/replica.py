"""The Serve deployment that runs the model: an `Engine` in an actor.

Errors cross to the ingress as values (`Failure`), since exceptions would arrive wrapped by Ray.
"""

import asyncio
import logging
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

import torch
from prometheus_client.metrics_core import Metric
from ray import serve

from r1ray.config.serving import EngineConfig, ModelArgs
from r1ray.errors import ConfigError, ServingError
from r1ray.models import ModelConfig, load_model
from r1ray.models.answer_lengths import AnswerLengths, read_answer_lengths
from r1ray.models.decoder import Decoder
from r1ray.models.gates import set_attention
from r1ray.models.generation import BatchGenerator
from r1ray.models.grammar import FormCompiler
from r1ray.models.kv_cache import count_pages, page_bytes
from r1ray.models.quantization import tie_head
from r1ray.models.requests import GenerationRequest, TokenEvent
from r1ray.models.tiered import load_to_serve, move_to_device
from r1ray.models.tokenizer import Tokenizer
from r1ray.observability.logging import setup_logging
from r1ray.ops import native
from r1ray.serving.engine import Engine
from r1ray.serving.following import EngineFollower
from r1ray.serving.scaling import TOKENS_DUE

__all__ = ["Failure", "ModelReplica", "build_engine", "check_context", "compile_forms"]

logger = logging.getLogger(__name__)

# A message costs more than a token: they go together, each a little later than it might.
COALESCE_S = 0.04
# The engine thread waits as long for one that answers requests, each time a kernel returns.
SWITCH_S = 0.0002


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


def build_engine(model_dir: str, config: EngineConfig) -> Engine:
    """An engine over the model in `model_dir`, on the GPU that Ray gave this process, if any.

    Raises:
        ConfigError: contexts are longer than the model's, or memory is too small for one.
    """
    check_context(config.max_context_tokens, ModelConfig.load(model_dir))
    counts = read_answer_lengths(model_dir)
    kv_dtype = torch.int8 if config.kv_cache == "int8" else None
    model = _load(model_dir, config)
    set_attention(model, config.attention)
    num_pages = _count_pages(config, model.config, kv_dtype or model.model.norm.weight.dtype)
    forms, lengths = compile_forms(model_dir), AnswerLengths(counts)
    return Engine(
        lambda: BatchGenerator(
            model,
            max_concurrency=config.max_concurrency,
            max_context_tokens=config.max_context_tokens,
            max_step_tokens=config.max_step_tokens,
            max_step_s=config.max_step_ms / 1e3,
            num_pages=num_pages,
            kv_dtype=kv_dtype,
            lengths=lengths,
            forms=forms,
        ),
        max_concurrency=config.max_concurrency,
        max_queued_requests=config.max_queued_requests,
        timeout_s=config.timeout_s,
    )


class ModelReplica:
    """Streams tokens for the ingress; unhealthy as soon as its engine computes nothing any more.

    Where `model_dir` is a link, the replica follows it (`r1ray.serving.following`).
    """

    def __init__(self, args: ModelArgs) -> None:
        setup_logging()
        sys.setswitchinterval(SWITCH_S)
        num_threads = max(1, int(args.num_cpus_per_replica))
        torch.set_num_threads(num_threads)
        self._follower = EngineFollower(args.model_dir, lambda path: build_engine(path, args))
        logger.info(
            "%s is loaded; %d torch threads; %s", args.model_dir, num_threads, native.describe()
        )

    async def generate(
        self, request: GenerationRequest
    ) -> AsyncIterator[Sequence[TokenEvent] | Failure]:
        """The tokens of `request` as they come; a Failure is the last item.

        Cancelling the call, which Serve does when the client is gone, frees the request's memory.
        """
        try:
            with self._follower.lease() as engine:
                async with aclosing(engine.submit(request)) as batches:
                    async for events in batches:
                        yield events
                        await asyncio.sleep(COALESCE_S - time.monotonic() % COALESCE_S)
        except ServingError as error:
            yield Failure.of(error)

    async def probe(self) -> str:
        """The version that is served, once its model has computed something."""
        with self._follower.lease() as engine:
            version = self._follower.version
            await engine.probe()
        return version

    async def check_health(self) -> None:
        """Called by Serve, which replaces the replica when this raises or takes too long."""
        await self.probe()

    async def read_metrics(self) -> tuple[str, list[Metric]]:
        """(which replica this is, what its engine tells); a new version counts from 0."""
        return serve.get_replica_context().replica_id.unique_id, self._follower.engine.metrics()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve, for `r1ray.serving.scaling`."""
        engines = self._follower.engines
        return {TOKENS_DUE: sum(engine.stats.num_tokens_due for engine in engines)}

    def __del__(self) -> None:
        if hasattr(self, "_follower"):  # absent when loading failed
            self._follower.close()


def _count_pages(config: EngineConfig, model: ModelConfig, dtype: torch.dtype) -> int:
    """Of the pool."""
    one = count_pages(config.max_context_tokens)
    if config.kv_cache_mib is None:
        return config.max_concurrency * one
    size = page_bytes(model, dtype)
    if (found := (config.kv_cache_mib << 20) // size) < one:
        raise ConfigError(
            f"serve.kv_cache_mib ({config.kv_cache_mib}) is below the {one * size / 2**20:.1f} MiB "
            f"of one request of max_context_tokens ({config.max_context_tokens}); raise it or "
            "lower that"
        )
    return found


def _load(model_dir: str, config: EngineConfig) -> Decoder:
    has_gpu = torch.cuda.is_available()
    if config.budget_mib is not None and not has_gpu:
        model_config = ModelConfig.load(model_dir)
        dtype = torch.int8 if config.kv_cache == "int8" else torch.float32
        kv_bytes = _count_pages(config, model_config, dtype) * page_bytes(model_config, dtype)
        if kv_bytes >= config.budget_mib << 20:
            raise ConfigError(
                f"serve.budget_mib ({config.budget_mib}) is below the {kv_bytes / 2**20:.0f} MiB "
                "of keys and values; raise it, or lower kv_cache_mib, max_concurrency or "
                "max_context_tokens"
            )
        budget_bytes = config.budget_mib << 20
        return load_to_serve(model_dir, budget_bytes=budget_bytes, reserved_bytes=kv_bytes).model
    model = load_model(model_dir)
    if config.budget_mib is not None:
        move_to_device(model, torch.device("cuda"), budget_bytes=config.budget_mib << 20)
    elif has_gpu:
        model = model.to("cuda")
        tie_head(model)
    return model
