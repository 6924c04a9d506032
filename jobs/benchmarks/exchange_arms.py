"""The arms of the exchange benchmark as one worker runs them: r1ray's exchanges, and torch's DDP.

DDP is the outside baseline, tuned where its defaults would handicap it here: buckets of 1 MiB, so
that a model of 8 MB is sent while the backward pass still runs; gradients that are views of them;
and the global number of target tokens known to it for free, where r1ray's arms send it. Its hooks:

- `ddp_bf16`: cast, asynchronous all-reduce, cast back. Torch's own hook refuses gloo.
- `ddp_powersgd`: torch's PowerSGD of rank 4 with error feedback after a fifteenth of the run in
  plain steps, in a single bucket: with several, its chained collectives would be issued in a
  different order on each worker.
"""

import contextlib
import functools
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from r1ray.config.training import TrainConfig
from r1ray.data.batch_set import MicroBatch
from r1ray.exchange import CollectiveTransport, LocalTransport, UpdateRule, build_exchange
from r1ray.models import Decoder
from r1ray.training.loss import summed_loss
from r1ray.training.step import TrainState, learning_rate_at

__all__ = ["DDP_PREFIX", "ArmRunner", "build_arm"]

DDP_PREFIX = "ddp_"
_BUCKET_MIB, _ONE_BUCKET_MIB = 1, 1 << 14
_POWERSGD_RANK, _POWERSGD_PLAIN_SHARE = 4, 1 / 15


class ArmRunner(Protocol):
    """One worker's training under one arm."""

    def step(
        self, batches: Sequence[MicroBatch], num_targets: int, *, is_last: bool
    ) -> float | None:
        """One step over this worker's micro-batches; the seconds it waited for others, if it tells.

        Args:
            num_targets: target tokens of the step over all workers.
            is_last: leave the same weights on all workers.
        """

    def close(self) -> None:
        """End what the exchange started."""


def build_arm(arm: str, model: Decoder, config: TrainConfig) -> ArmRunner:
    """The runner of `arm`; torch.distributed's default group is up unless it is `alone`."""
    if arm.startswith(DDP_PREFIX):
        return _DdpRunner(arm, model, config)
    return _R1RayRunner(arm, model, config)


class _R1RayRunner:
    def __init__(self, arm: str, model: Decoder, config: TrainConfig) -> None:
        transport = (
            LocalTransport()
            if arm == "alone"
            else CollectiveTransport(timeout_s=config.resources.timeout_s)
        )
        self._state = TrainState(model, config, build_exchange(config.exchange), transport)

    def step(
        self, batches: Sequence[MicroBatch], num_targets: int, *, is_last: bool
    ) -> float | None:
        del num_targets
        return self._state.run_step(batches, flush=is_last).exchange_wait_s

    def close(self) -> None:
        self._state.exchange.close()


class _SummedLoss(nn.Module):
    """The training loss as the forward of a module, which is what DDP wraps."""

    def __init__(self, model: Decoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: MicroBatch) -> Tensor:
        return summed_loss(self.model, batch)


class _DdpRunner:
    def __init__(self, arm: str, model: Decoder, config: TrainConfig) -> None:
        self._parameters = list(model.parameters())
        self._rule = UpdateRule(
            functools.partial(learning_rate_at, config=config),
            num_steps=config.num_steps,
            betas=(config.adam_beta1, config.adam_beta2),
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
        )
        self._optimizer = self._rule.build_optimizer(
            [item for item in self._parameters if item.dim() >= 2],
            [item for item in self._parameters if item.dim() < 2],
        )
        self._num_updates = 0
        self._ddp = DistributedDataParallel(
            _SummedLoss(model.train()),
            bucket_cap_mb=_ONE_BUCKET_MIB if arm == "ddp_powersgd" else _BUCKET_MIB,
            gradient_as_bucket_view=True,
            init_sync=False,  # all workers build the same weights from the seed
        )
        if arm == "ddp_bf16":
            self._ddp.register_comm_hook(None, _bf16_hook)
        elif arm == "ddp_powersgd":
            state = powerSGD_hook.PowerSGDState(
                None,
                matrix_approximation_rank=_POWERSGD_RANK,
                start_powerSGD_iter=max(2, round(_POWERSGD_PLAIN_SHARE * config.num_steps)),
            )
            self._ddp.register_comm_hook(state, powerSGD_hook.powerSGD_hook)

    def step(
        self, batches: Sequence[MicroBatch], num_targets: int, *, is_last: bool
    ) -> float | None:
        del is_last  # synchronous
        # DDP averages over workers; the mean is per target token, as in r1ray.
        scale = dist.get_world_size() / num_targets
        for index, batch in enumerate(batches):
            is_sent = index == len(batches) - 1
            with contextlib.nullcontext() if is_sent else self._ddp.no_sync():
                (self._ddp(batch) * scale).backward()
        nn.utils.clip_grad_norm_(self._parameters, self._rule.max_grad_norm)
        self._rule.set_rate(self._optimizer, self._rule.learning_rate_at(self._num_updates))
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._num_updates += 1
        return None  # DDP does not tell

    def close(self) -> None:
        return None


def _bf16_hook(state: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """The mean over the workers, summed and sent in bf16.

    Source: torch's `bf16_compress_hook`, which is for NCCL.
    """
    del state
    buffer = bucket.buffer()
    small = buffer.to(torch.bfloat16).div_(dist.get_world_size())
    work = dist.all_reduce(small, async_op=True)
    assert work is not None, "async collectives return a handle"

    def widen(future: torch.futures.Future[list[Tensor]]) -> Tensor:
        return buffer.copy_(future.value()[0])

    return work.get_future().then(widen)
