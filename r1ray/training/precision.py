"""Which number format the matrix products of training run in, and how far the loss is scaled.

A step asks `Precision` for the context of a forward and for the loss scale S, has it measure and
unscale the gradients, and tells it the outcome. Master weights, norms, softmax and the loss stay
float32 in every format.

Price in fp32 or with policy none: nothing. Else that of `range_meter` a step, and one more pass
over the gradients where S is not 1.
"""

import contextlib
import dataclasses
import json
import logging
import math
from typing import Any, Literal

import torch
from torch import nn

from r1ray.config.training import TrainConfig
from r1ray.errors import DivergenceError
from r1ray.exchange import StepOutcome, Transport
from r1ray.models.decoder import Decoder
from r1ray.training.precision_policy import (
    MAX_STRIKES,
    GroupRange,
    PrecisionPolicy,
    StepRange,
    ThresholdPolicy,
)
from r1ray.training.range_controller import RangeController
from r1ray.training.range_meter import RangeMeter, split_groups

__all__ = ["Precision", "PrecisionName", "agree_precision", "resolve_precision"]

logger = logging.getLogger(__name__)

PrecisionName = Literal["fp32", "bf16", "fp16"]
Choice = Literal["auto", "fp32", "bf16", "fp16"]
_NAMES: tuple[PrecisionName, ...] = ("fp32", "bf16", "fp16")
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_NUM_FIELDS = len(dataclasses.fields(GroupRange))


def resolve_precision(
    choice: Choice, policy: Literal["range", "threshold", "none"], device: torch.device
) -> PrecisionName:
    """`choice`, with auto as bf16 where the device multiplies bf16 in hardware.

    Elsewhere auto is fp16 on CUDA, if the policy scales the loss, and fp32 else: without such
    instructions a CPU emulates narrow formats and is several times slower than in fp32.
    """
    if choice != "auto":
        return choice
    if device.type == "cuda":
        narrow: PrecisionName = "fp16" if policy == "range" else "fp32"
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else narrow
    capabilities = torch.cpu.get_capabilities()
    has_bf16 = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return "bf16" if has_bf16 else "fp32"


def agree_precision(
    mine: PrecisionName, device: torch.device, transport: Transport
) -> PrecisionName:
    """`mine` where all workers have the same, else fp32."""
    votes = torch.zeros(len(_NAMES), device=device)
    votes[_NAMES.index(mine)] = 1.0
    transport.all_reduce_sum(votes).wait()
    is_shared = int(votes[_NAMES.index(mine)].item()) == transport.world_size
    return mine if is_shared else "fp32"


class Precision:
    """The number format of one worker's steps; the same on every worker, but for `is_local` steps.

    Args:
        model: its modules run in float32 from the next forward on, when their group is promoted.
        policy: instead of the one that `config.precision_policy` names.

    Attributes:
        name: what products run in that are not promoted.
    """

    def __init__(
        self,
        model: Decoder,
        config: TrainConfig,
        transport: Transport,
        policy: PrecisionPolicy | None = None,
    ) -> None:
        self._device = model.model.norm.weight.device
        self._transport = transport
        self._rank, self._world_size = transport.rank, transport.world_size
        mine = resolve_precision(config.precision, config.precision_policy, self._device)
        self.name = agree_precision(mine, self._device, transport)
        self._parameters = [item for item in model.parameters() if item.requires_grad]
        self._groups = split_groups(model)
        self._head = next(
            (i for i, group in enumerate(self._groups) if model.lm_head in group.products), None
        )
        self._policy = policy or self._build_policy(config)
        self._meter: RangeMeter | None = None
        if self._policy.is_watching:
            self._meter = RangeMeter(self._groups, _DTYPES[self.name])
            for index, group in enumerate(self._groups):
                for module in group.products:
                    self._widen_when_promoted(module, index)

    @property
    def loss_scale(self) -> float:
        """S of the next backward, a power of two."""
        return self._policy.loss_scale

    @property
    def num_promoted(self) -> int:
        """Groups whose products run in float32 in the next forward."""
        return len(self._policy.promoted)

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """The context of a forward."""
        if self.name == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self._device.type, dtype=_DTYPES[self.name])

    def measure(self) -> tuple[float, ...]:
        """Measure the gradients of S·loss in `.grad`, then divide them by S, in place.

        Returns:
            What `update` needs, for `StepTotals.peaks`: the greatest over the workers is right.
        """
        peaks: list[float] = []
        if self._meter is not None:
            peaks.append(self._policy.generation)
            for seen in self._meter.measure():
                peaks += dataclasses.astuple(seen)
        if self.loss_scale != 1.0:
            gradients = [item.grad for item in self._parameters if item.grad is not None]
            torch._foreach_mul_(gradients, 1.0 / self.loss_scale)
        return tuple(peaks)

    def update(self, outcome: StepOutcome, *, is_local: bool = False) -> None:
        """Take in what became of a step, and decide on the next.

        Args:
            is_local: the outcome is of this worker alone, and so is what follows from it.
        Raises:
            DivergenceError: several steps in a row were not finite, whatever was done.
        """
        if outcome.verdict == "wait":
            return
        step = self._read(outcome, 1 if is_local else self._world_size)
        before = self._policy.promoted
        self._policy.update(step)
        self._log_changes(before)
        if self._policy.strikes >= MAX_STRIKES:
            raise DivergenceError(
                f"the gradient was not finite in {MAX_STRIKES} steps in a row; {self._blame(step)} "
                f"(the loss was scaled by {self.loss_scale:g} at last); "
                "lower train.learning_rate or look at the data"
            )

    def agree(self) -> None:
        """Go on from rank 0's decisions, after steps that were local; every worker calls it."""
        if not self._policy.is_watching:
            return
        text = json.dumps(self._policy.state_dict()).encode()
        size = int(self._transport.all_gather(torch.tensor([len(text)]))[0])
        mine = torch.zeros(size, dtype=torch.uint8)
        if self._transport.rank == 0:
            mine = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        shared = self._transport.all_gather(mine)[0].numpy().tobytes()
        self._policy.load_state_dict(json.loads(shared))

    def state_dict(self) -> dict[str, Any]:
        """Plain values; the same on every worker after a step that was not local, or `agree`."""
        return {"precision": self.name, "policy": self._policy.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`; on hardware with another precision, start anew."""
        if state["precision"] == self.name:
            self._policy.load_state_dict(state["policy"])

    def _build_policy(self, config: TrainConfig) -> PrecisionPolicy:
        if self.name == "fp32" or config.precision_policy == "none":
            return PrecisionPolicy()
        has_products = [bool(group.products) for group in self._groups]
        if config.precision_policy == "threshold":
            return ThresholdPolicy(has_products)
        return RangeController(has_products, _DTYPES[self.name])

    def _widen_when_promoted(self, module: nn.Module, index: int) -> None:
        """Run `module` outside of autocast while group `index` is promoted."""
        contexts = contextlib.ExitStack()

        def enter(*_: Any) -> None:
            if index in self._policy.promoted:
                contexts.enter_context(torch.autocast(self._device.type, enabled=False))

        def leave(*_: Any) -> None:
            contexts.close()

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave, always_call=True)

    def _read(self, outcome: StepOutcome, num_workers: int) -> StepRange:
        generation, *values = outcome.totals.peaks or (0.0,)
        groups = [
            GroupRange(*values[begin : begin + _NUM_FIELDS])
            for begin in range(0, len(values), _NUM_FIELDS)
        ]
        if groups and self._head is not None and not math.isfinite(outcome.totals.loss_sum):
            is_found = any(seen.forward_fault for seen in groups)
            head = groups[self._head]
            groups[self._head] = head if is_found else dataclasses.replace(head, forward_fault=1.0)
        return StepRange(
            is_finite=outcome.verdict == "apply",
            groups=tuple(groups),
            generation=int(generation),
            targets_per_worker=max(1.0, outcome.totals.num_targets / num_workers),
        )

    def _log_changes(self, before: frozenset[int]) -> None:
        if self._rank != 0:
            return
        after = self._policy.promoted
        for index in sorted(before ^ after):
            name = "fp32" if index in after else self.name
            logger.info("%s runs in %s from the next step on", self._groups[index].name, name)

    def _blame(self, step: StepRange) -> str:
        """Where the values that are not finite come from, as far as this worker can tell."""
        fault = step.find_fault()
        if fault is None or self._meter is None:
            return "which tensor it comes from is not watched"
        group = self._groups[fault[0]]
        for name, tensor in (item for each in self._groups for item in each.tensors.items()):
            if not tensor.isfinite().all():
                return f"the weight {name} is itself not finite"
        place = "forward" if fault[1] else "backward"
        name = self._meter.culprits.get(fault[0], f"a tensor of {group.name} on another worker")
        return f"it comes from the {place} of {group.name}, first seen in the gradient of {name}"
