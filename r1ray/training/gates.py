"""Training the gates of block-sparse attention: the model runs as it is, frozen, and they watch.

1. Every step draws a few units of queries, 64 tokens that choose together, of those that do not
   attend densely: up to half of them with target tokens (an answer looks for what it needs).
2. In the forward of every layer, the gate's scores of these units are compared with the attention
   that the model itself pays to every earlier block (`r1ray.ops.block_gate`). All their tokens up
   to the sequence's last target count: prompts are read by the gates as well.
3. What the gates would have missed at the target tokens marks the heads that choose by the keys
   themselves; every sequence with such tokens counts the same.

Price: one forward of the model without gradients, and N·64·T scores a layer and unit.
"""

import contextlib
import dataclasses
import random
from collections.abc import Iterator

import torch
from torch import Tensor

from r1ray.config.training import GatesConfig
from r1ray.data.batch_set import IGNORED, MicroBatch
from r1ray.errors import ConfigError, ShapeError
from r1ray.models.decoder import Attention, Decoder, Observer
from r1ray.models.gates import list_attentions
from r1ray.models.rope import rotary_tables
from r1ray.ops.block_gate import (
    BlockGate,
    count_missed,
    gate_loss,
    gate_targets,
    kept_blocks,
    mark_heads,
    pool_keys,
    unit_recall,
)
from r1ray.ops.block_selection import BLOCK, DENSE_BLOCKS

__all__ = ["GateTraining", "check_gate_lengths"]


_NEWEST = 0.05  # weight of a batch in what a gate missed lately
_FIRST_UNIT = 4  # before, none can be chosen: the first, the one before and the own are kept


class GateTraining:
    """The objective of `train.gates`; every layer of the model has a gate.

    Args:
        seed: of the units, which are the same when a step is done again.

    Attributes:
        recall: of the last batch: what units need of the blocks that there are to choose from, the
            share in those that gates alone choose; None where all attend densely.
    """

    def __init__(self, config: GatesConfig, seed: int) -> None:
        self._seed = seed
        self.recall: float | None = None
        self._num_units, self._exact_share = config.num_units, config.exact_heads
        self._is_answer_BT: Tensor | None = None  # of the batch that was drawn last

    def draw(self, model: Decoder, batch: MicroBatch, step: int) -> MicroBatch:  # noqa: ARG002
        """The batch with a target at every token of the step's units that one follows."""
        is_answer_BT = self._is_answer_BT = batch.labels_BT != IGNORED
        is_read_BT = is_answer_BT.flip(1).cumsum(1).flip(1) > 0
        chance = random.Random(f"{self._seed}-{step}-{batch.index}")
        units = self._draw_units(is_answer_BT, is_read_BT, chance)
        unit_T = torch.arange(is_read_BT.shape[1], device=is_read_BT.device) // BLOCK
        is_drawn_T = torch.isin(unit_T, unit_T.new_tensor(units))
        is_drawn_T[0] = not units  # with nothing to learn, one target: a step averages over them
        is_read_BT &= is_drawn_T
        labels_BT = torch.where(is_read_BT, batch.input_ids_BT.roll(-1, 1), IGNORED)
        num_targets = int(is_read_BT.sum())
        return dataclasses.replace(batch, labels_BT=labels_BT, num_targets=num_targets)

    def _draw_units(
        self, is_answer_BT: Tensor, is_read_BT: Tensor, chance: random.Random
    ) -> list[int]:
        """Their numbers; of shorter sequences, they are of those with anything to choose from."""
        answering, reading = (
            {at // BLOCK for at in where.any(0).nonzero().flatten().tolist()}
            for where in (is_answer_BT, is_read_BT)
        )
        first = DENSE_BLOCKS if max(reading, default=0) >= DENSE_BLOCKS else _FIRST_UNIT
        answering, reading = ({unit for unit in of if unit >= first} for of in (answering, reading))
        units = chance.sample(sorted(answering), min(len(answering), -(-self._num_units // 2)))
        others = sorted(reading.difference(units))
        return units + chance.sample(others, min(len(others), self._num_units - len(units)))

    def loss(self, model: Decoder, batch: MicroBatch) -> Tensor:
        """Summed over target tokens.

        Raises:
            ShapeError: the batch is packed.
        """
        if batch.document_lengths is not None:
            raise ShapeError(
                "gates learn from whole sequences; use prepare.batching {type: buckets}"
            )
        ids_BT = batch.input_ids_BT
        is_target_BT = batch.labels_BT != IGNORED
        is_answer_BT = is_target_BT
        if self._is_answer_BT is not None:
            is_answer_BT = is_target_BT & self._is_answer_BT
        weight_BT = is_answer_BT / is_answer_BT.sum(1, keepdim=True).clamp_min(1)
        num_answering = int(is_answer_BT.any(1).sum())
        positions_1T = torch.arange(ids_BT.shape[1], device=ids_BT.device)[None]
        cos, sin = rotary_tables(model.config, positions_1T)
        block_cos, block_sin = cos[:, :, ::BLOCK], sin[:, :, ::BLOCK]
        units = {at // BLOCK for at in is_target_BT.any(0).nonzero().flatten().tolist()}
        losses: list[Tensor] = []
        recalls: list[Tensor] = []

        @torch.enable_grad()
        def observe(
            attention: Attention, q_BTNH: Tensor, k_BTKH: Tensor, q_BNTH: Tensor, k_BKTH: Tensor
        ) -> None:
            gate, pooled = attention.gate, pool_keys(k_BTKH)
            assert isinstance(gate, BlockGate)
            missed_N = torch.zeros_like(gate.missed)
            blocks = pooled.shape[2]
            keys = gate.keys(pooled, block_cos[:, :, :blocks], block_sin[:, :, :blocks])
            for unit in sorted(units):
                if unit < _FIRST_UNIT:
                    continue
                start = unit * BLOCK
                part = slice(start, start + BLOCK)
                queries = gate.queries(q_BTNH[:, part], cos[:, :, part], sin[:, :, part])
                scores = gate.scores(queries, keys[:, :, :unit])
                largest = gate_targets(q_BNTH[:, :, part], k_BKTH, start)
                losses.append(gate_loss(scores, largest, is_target_BT[:, part]))
                missed = count_missed(kept_blocks(scores, start), largest)
                missed_N += (missed * weight_BT[:, None, part]).sum((0, 2))
                if unit >= DENSE_BLOCKS:
                    recalls.append(unit_recall(scores, largest, is_target_BT[:, part]))
            if num_answering:
                gate.missed.lerp_(missed_N / num_answering, _NEWEST)

        with _observing(model, observe), torch.no_grad():
            model.hidden(ids_BT)
        self.recall = float(torch.cat(recalls).mean()) if recalls else None
        gates = [attention.gate for attention in list_attentions(model)]
        mark_heads([gate for gate in gates if isinstance(gate, BlockGate)], self._exact_share)
        if not losses:  # too short for anything to choose: nothing to learn
            return sum(item.sum() for item in model.parameters() if item.requires_grad) * 0.0  # type: ignore[return-value]
        return torch.stack(losses).sum() / model.config.num_layers


def check_gate_lengths(longest: int) -> None:
    """Whether gates can learn from sequences of which the longest has so many tokens.

    Raises:
        ConfigError: there is nothing to choose in any of them.
    """
    if longest <= _FIRST_UNIT * BLOCK:
        raise ConfigError(
            f"train.gates: the longest prepared sequence has {longest} tokens, and gates learn "
            f"from more than {_FIRST_UNIT * BLOCK}, best from {2 * DENSE_BLOCKS * BLOCK} and more; "
            "raise prepare.max_tokens and take longer sources, such as {type: long_context}"
        )


@contextlib.contextmanager
def _observing(model: Decoder, observe: Observer) -> Iterator[None]:
    attentions = list_attentions(model)
    for attention in attentions:
        attention.observe = observe
    try:
        yield
    finally:
        for attention in attentions:
            attention.observe = None
