"""The Serve deployment that runs the model: an `Engine` in an actor.

Errors cross to the ingress as values, since exceptions would arrive wrapped by Ray.
"""

import asyncio
import logging
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing

import torch
from prometheus_client.metrics_core import Metric
from ray import serve

from r1ray.config.serving import EngineConfig, ModelArgs
from r1ray.errors import ConfigError, ServingError
from r1ray.models import ModelConfig
from r1ray.models.answer_lengths import AnswerLengths, read_answer_lengths
from r1ray.models.generation import BatchGenerator
from r1ray.models.grammar import FormCompiler
from r1ray.models.requests import GenerationRequest, TokenEvent
from r1ray.models.speed import Speed, SpeedMeter, measure_speed
from r1ray.models.tokenizer import Tokenizer
from r1ray.observability.logging import setup_logging
from r1ray.ops import native
from r1ray.serving.devices import load_backend, plan_pages
from r1ray.serving.engine import Engine
from r1ray.serving.engine_metrics import describe_speed
from r1ray.serving.following import EngineFollower
from r1ray.serving.scaling import TOKENS_DUE

__all__ = ["ModelReplica", "build_engine", "check_context", "compile_forms"]

logger = logging.getLogger(__name__)

# A message costs more than a token: they go together, each a little later than it might.
COALESCE_S = 0.04
# The engine thread waits as long for one that answers requests, each time a kernel returns.
SWITCH_S = 0.0002


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


def build_engine(model_dir: str, config: EngineConfig, *, is_measured: bool = False) -> Engine:
    """An engine over the model in `model_dir`, on the device that `config` names.

    Args:
        is_measured: note how fast it is: first with prompts that are made up, for two seconds.
    Raises:
        ConfigError: contexts are longer than the model's, memory is too small for one, or the
            device is not there.
    """
    check_context(config.max_context_tokens, ModelConfig.load(model_dir))
    lengths = AnswerLengths(read_answer_lengths(model_dir))
    backend, forms = load_backend(model_dir, config), compile_forms(model_dir)
    num_pages = plan_pages(config, backend.page_bytes)
    meter = SpeedMeter() if is_measured else None

    def build(lengths: AnswerLengths | None) -> BatchGenerator:
        return BatchGenerator(
            backend,
            max_concurrency=config.max_concurrency,
            max_context_tokens=config.max_context_tokens,
            max_step_tokens=config.max_step_tokens,
            max_step_s=config.max_step_ms / 1e3,
            num_pages=num_pages,
            lengths=lengths,
            forms=forms,
            meter=meter,
        )

    if meter is not None:  # with a generator of its own: nothing of it is to be seen later
        measure_speed(
            build(None),
            meter,
            max_sequences=config.max_concurrency,
            max_context_tokens=config.max_context_tokens,
        )
    return Engine(
        lambda: build(lengths),
        max_concurrency=config.max_concurrency,
        max_queued_requests=config.max_queued_requests,
        timeout_s=config.timeout_s,
        forms=forms,
        meter=meter,
    )


class ModelReplica:
    """Streams tokens for the ingress; unhealthy as soon as its engine computes nothing any more.

    Where `model_dir` is a link, the replica follows it (`r1ray.serving.following`).

    Args:
        group: of replicas that this one belongs to, where a model has several; it is measured then.
    """

    def __init__(self, args: ModelArgs, group: str | None = None) -> None:
        setup_logging()
        sys.setswitchinterval(SWITCH_S)
        num_threads = max(1, int(args.num_cpus_per_replica))
        torch.set_num_threads(num_threads)
        is_measured = group is not None  # who has no choice needs no measurement
        self._follower = EngineFollower(
            args.model_dir,
            lambda path: build_engine(path, args, is_measured=is_measured),
            has_room=args.budget_mib is None,
        )
        logger.info(
            "%s is loaded; %d torch threads; %s", args.model_dir, num_threads, native.describe()
        )
        if is_measured:
            logger.info("group %s measures %s", group, self._follower.engine.speed)

    async def generate(
        self, request: GenerationRequest
    ) -> AsyncIterator[Sequence[TokenEvent] | ServingError]:
        """The tokens of `request` as they come; an error is the last item.

        Cancelling the call, which Serve does when the client is gone, frees the request's memory.
        """
        try:
            self._follower.check_inputs(request.inputs_digest)
            with self._follower.lease() as engine:
                async with aclosing(engine.submit(request)) as batches:
                    async for events in batches:
                        yield events
                        if events[-1].finish_reason is not None:
                            return
                        await asyncio.sleep(COALESCE_S - time.monotonic() % COALESCE_S)
        except ServingError as error:
            yield error

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
        """(which replica this is, what its engine tells and what was measured).

        A new version counts from 0.
        """
        found, speed = self._follower.engine.metrics(), await self.read_speed()
        if speed is not None:
            found += describe_speed(speed)
        return serve.get_replica_context().replica_id.unique_id, found

    async def read_speed(self) -> Speed | None:
        """What it has measured by now; None where it was not asked to."""
        return self._follower.engine.speed

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve, for `r1ray.serving.scaling`."""
        engines = self._follower.engines
        return {TOKENS_DUE: sum(engine.stats.num_tokens_due for engine in engines)}

    def __del__(self) -> None:
        if hasattr(self, "_follower"):  # absent when loading failed
            self._follower.close()
