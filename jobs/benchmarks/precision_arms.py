"""What the precision benchmark trains: a small model, a language to learn, and the arms.

The language has irreducible entropy: half of the tokens follow from the token before, half from the
one before that, each by a table of four successors. A model that trains badly shows it in the loss.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from r1ray.config.exchange import DenseExchangeConfig
from r1ray.config.training import TrainConfig
from r1ray.data.batch_set import IGNORED, MicroBatch
from r1ray.exchange import LocalTransport, StepOutcome, build_exchange
from r1ray.models import Decoder, ModelConfig
from r1ray.models.config import RopeConfig
from r1ray.training.loss import summed_loss
from r1ray.training.precision import Precision
from r1ray.training.precision_policy import PrecisionPolicy, StepRange, ThresholdPolicy
from r1ray.training.range_controller import RangeController
from r1ray.training.range_meter import split_groups
from r1ray.training.step import TrainState

__all__ = [
    "ARMS",
    "Arm",
    "ArmState",
    "GradScalerPolicy",
    "Shape",
    "TimedPrecision",
    "build_model",
    "draw_batches",
    "heldout_loss",
]


@dataclass(frozen=True)
class Shape:
    """Of a decoder: the sizes of its matrix products, and how many there are."""

    width: int
    intermediate: int
    num_heads: int
    num_kv_heads: int
    num_layers: int
    vocab_size: int


Arm = Literal["fp32", "plain", "gradscaler", "threshold", "range"]
ARMS: tuple[Arm, ...] = ("fp32", "plain", "gradscaler", "threshold", "range")
_SUCCESSORS = (0.55, 0.25, 0.15, 0.05)
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class GradScalerPolicy(PrecisionPolicy):
    """The decisions of torch.amp.GradScaler: halve on overflow, double after 2,000 clean steps."""

    def __init__(self, init_scale: float = 2.0**16, growth_interval: int = 2000) -> None:
        super().__init__()
        self.loss_scale = init_scale
        self._growth_interval, self._clean_steps = growth_interval, 0

    def _decide(self, step: StepRange) -> None:
        self._clean_steps = self._clean_steps + 1 if step.is_finite else 0
        if not step.is_finite:
            self.loss_scale *= 0.5
        elif self._clean_steps == self._growth_interval:
            self.loss_scale *= 2.0
            self._clean_steps = 0


class TimedPrecision(Precision):
    """Counts the seconds that watching and deciding take: measure, update and forward hooks."""

    def __init__(self, model: Decoder, *arguments: Any) -> None:
        super().__init__(model, *arguments)
        self.seconds = 0.0
        for module in model.modules():
            for hooks in (module._forward_hooks, module._forward_pre_hooks):
                for key, hook in hooks.items():
                    hooks[key] = self._timed(hook)

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            started = time.perf_counter()
            result = call(*arguments)
            self.seconds += time.perf_counter() - started
            return result

        return run

    def measure(self) -> tuple[float, ...]:
        peaks: tuple[float, ...] = self._timed(super().measure)()
        return peaks

    def update(self, outcome: StepOutcome, *, is_local: bool = False) -> None:
        started = time.perf_counter()
        super().update(outcome, is_local=is_local)
        self.seconds += time.perf_counter() - started


class ArmState(TrainState):
    """Training in one arm.

    Args:
        low: what arms other than fp32 multiply in.
        patience: (steps of underflow before the controller acts, clean steps before it demotes);
            GradScaler raises its scale after twice the latter, as by default.
        targets: of a step; GradScaler's scale is that of a mean loss, r1ray's of the sum.
    """

    def __init__(
        self,
        model: Decoder,
        arm: Arm,
        low: Literal["bf16", "fp16"],
        config: TrainConfig,
        *,
        patience: tuple[int, int],
        targets: int,
    ) -> None:
        exchange = build_exchange(DenseExchangeConfig(type="dense"))
        super().__init__(model, config, exchange, LocalTransport())
        groups = split_groups(model)
        self.num_product_groups = sum(bool(group.products) for group in groups)
        has_products = [bool(group.products) for group in groups]
        policies: dict[Arm, Callable[[], PrecisionPolicy]] = {
            "gradscaler": lambda: GradScalerPolicy(
                2.0 ** round(16 - np.log2(targets)), growth_interval=2 * patience[1]
            ),
            "threshold": lambda: ThresholdPolicy(has_products),
            "range": lambda: RangeController(
                has_products, _DTYPES[low], raise_after=patience[0], demote_after=patience[1]
            ),
        }
        if arm in policies:
            self._precision = TimedPrecision(model, config, LocalTransport(), policies[arm]())

    @property
    def controller_seconds(self) -> float:
        """Seconds spent on watching and deciding so far."""
        precision = self._precision
        return precision.seconds if isinstance(precision, TimedPrecision) else 0.0


def build_model(shape: Shape, *, max_positions: int) -> Decoder:
    """A seeded model of the demo's family: Llama, grouped queries, tied head."""
    config = ModelConfig(
        family="llama",
        vocab_size=shape.vocab_size,
        hidden_size=shape.width,
        intermediate_size=shape.intermediate,
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.width // shape.num_heads,
        max_positions=max_positions,
        rms_norm_eps=1e-5,
        rope=RopeConfig(theta=10_000.0),
        tie_embeddings=True,
        eos_token_ids=(2,),
        bos_token_id=0,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = Decoder(config)
    with torch.no_grad():
        model.lm_head.get_parameter("weight").mul_(0.02)  # nn.Embedding draws from N(0, 1)
    return model


def draw_batches(
    count: int, rows: int, tokens: int, *, vocab_size: int, seed: int
) -> list[MicroBatch]:
    """`count` micro-batches of the language; every token but the first is a target."""
    tables = np.random.default_rng(0).integers(0, vocab_size, (2, vocab_size, len(_SUCCESSORS)))
    rng = np.random.default_rng([seed, 1])
    ids = rng.integers(0, vocab_size, (count, rows, tokens))
    for column in range(2, tokens):
        back = rng.integers(0, 2, (count, rows))
        choice = rng.choice(len(_SUCCESSORS), (count, rows), p=_SUCCESSORS)
        source = np.where(back == 0, ids[..., column - 1], ids[..., column - 2])
        ids[..., column] = tables[back, source, choice]
    batches = []
    for ids_BT in torch.from_numpy(ids):
        labels_BT = torch.full_like(ids_BT, IGNORED)
        labels_BT[:, :-1] = ids_BT[:, 1:]
        batches.append(MicroBatch(ids_BT, labels_BT, rows * tokens, rows * (tokens - 1)))
    return batches


@torch.no_grad()
def heldout_loss(model: Decoder, batches: list[MicroBatch]) -> float:
    """Mean loss per target in fp32, in nats."""
    total = sum(float(summed_loss(model, batch)) for batch in batches)
    return total / sum(batch.num_targets for batch in batches)
