"""Training the gates of block-sparse attention: the model runs as it is, frozen, and they watch.

1. Every step draws a few units of queries, 64 tokens that choose together, from the whole length of
   its sequences: half of them from those with target tokens (an answer looks for what it needs).
2. In the forward of every layer, the gate's scores of these units are compared with the attention
   that the model itself pays to every earlier block (`r1ray.ops.block_gate`). All their tokens up
   to the sequence's last target count: prompts are read by the gates as well.
3. What the gates would have missed at the target tokens marks the heads that choose by the keys
   themselves; every sequence counts the same.

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
from r1ray.errors import ShapeError
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

__all__ = ["GateTraining"]


_NEWEST = 0.05  # weight of a batch in what a gate missed lately
_FIRST_UNIT = 3  # the first, the own block and the one before are always kept


class GateTraining:
    """The objective of `train.gates`; every layer of the model has a gate.

    Attributes:
        recall: of the last batch, as in `Objective`: of what units need of the blocks that there
            are to choose from, the share in those that gates alone choose, beyond the tokens that
            attend densely; None where there are none.
    """

    def __init__(self, config: GatesConfig) -> None:
        self.recall: float | None = None
        self._num_units, self._exact_share = config.num_units, config.exact_heads
        self._is_answer_BT: Tensor | None = None  # of the batch that was drawn last

    def draw(self, model: Decoder, batch: MicroBatch, step: int) -> MicroBatch:  # noqa: ARG002
        """The batch with a target at every token of the step's units that one follows."""
        is_answer_BT = self._is_answer_BT = batch.labels_BT != IGNORED
        is_read_BT = is_answer_BT.flip(1).cumsum(1).flip(1) > 0
        units = self._draw_units(is_answer_BT, is_read_BT, random.Random(step))
        if units:
            unit_T = torch.arange(is_read_BT.shape[1], device=is_read_BT.device) // BLOCK
            is_read_BT &= torch.isin(unit_T, torch.tensor(units, device=unit_T.device))
        labels_BT = torch.where(is_read_BT, batch.input_ids_BT.roll(-1, 1), IGNORED)
        num_targets = int(is_read_BT.sum())
        return dataclasses.replace(batch, labels_BT=labels_BT, num_targets=num_targets)

    def _draw_units(
        self, is_answer_BT: Tensor, is_read_BT: Tensor, rng: random.Random
    ) -> list[int]:
        """Numbers of those that have blocks to choose from; with answers, half of them."""
        answering, reading = (
            {at // BLOCK for at in where.any(0).nonzero().flatten().tolist()}
            for where in (is_answer_BT, is_read_BT)
        )
        answering = {unit for unit in answering if unit >= _FIRST_UNIT}
        units = rng.sample(sorted(answering), min(len(answering), -(-self._num_units // 2)))
        others = sorted(unit for unit in reading.difference(units) if unit >= _FIRST_UNIT)
        return units + rng.sample(others, min(len(others), self._num_units - len(units)))

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
        weight_BT = is_answer_BT / is_answer_BT.sum(1, keepdim=True).clamp_min(1) / len(ids_BT)
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
            gate.missed.lerp_(missed_N, _NEWEST)

        with _observing(model, observe), torch.no_grad():
            model.hidden(ids_BT)
        self.recall = float(torch.cat(recalls).mean()) if recalls else None
        gates = [attention.gate for attention in list_attentions(model)]
        mark_heads([gate for gate in gates if isinstance(gate, BlockGate)], self._exact_share)
        if not losses:  # too short for anything to choose: nothing to learn
            return sum(item.sum() for item in model.parameters() if item.requires_grad) * 0.0  # type: ignore[return-value]
        return torch.stack(losses).sum() / model.config.num_layers


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
