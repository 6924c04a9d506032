"""Training the gates of block-sparse attention: the model runs as it is, frozen, and they watch.

1. In the forward of every layer, a chunk of queries at a time, the gate's scores are compared with
   the attention that the model itself pays to every earlier block (`r1ray.ops.block_gate`).
2. The loss is the divergence of the two, averaged over layers and groups, of every token up to the
   last target: prompts are read by the gates as well.
3. What the gates would have missed where the last batches have targets (an answer looks for what it
   needs) marks the heads that choose by the keys themselves; every sequence counts the same.

Price: one forward of the model without gradients, and one more attention whose scores are there for
a chunk of queries at a time: N·chunk·T floats.
"""

import contextlib
import dataclasses
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
    gate_divergence,
    gate_targets,
    kept_blocks,
    mark_heads,
    pool_keys,
)
from r1ray.ops.block_selection import BLOCK, DENSE_BLOCKS

__all__ = ["GateTraining"]


_NEWEST = 0.05  # weight of a batch in what a gate missed lately


class GateTraining:
    """The objective of `train.gates`; every layer of the model has a gate.

    Attributes:
        recall: of the last batch, as in `Objective`: what the gates' choice alone has of the
            targets, of tokens beyond those that attend densely; None where there are none.
    """

    def __init__(self, config: GatesConfig) -> None:
        self.recall: float | None = None
        self._chunk, self._exact_share = config.query_chunk, config.exact_heads
        self._is_answer_BT: Tensor | None = None  # of the batch that was drawn last

    def draw(self, model: Decoder, batch: MicroBatch, step: int) -> MicroBatch:  # noqa: ARG002
        """The batch with a target at every token that one follows, but for padding."""
        is_target_BT = self._is_answer_BT = batch.labels_BT != IGNORED
        is_read_BT = is_target_BT.flip(1).cumsum(1).flip(1) > 0
        labels_BT = torch.where(is_read_BT, batch.input_ids_BT.roll(-1, 1), IGNORED)
        num_targets = int(is_read_BT.sum())
        return dataclasses.replace(batch, labels_BT=labels_BT, num_targets=num_targets)

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
        is_answer_BT = is_target_BT if self._is_answer_BT is None else self._is_answer_BT
        weight_BT = is_answer_BT / is_answer_BT.sum(1, keepdim=True).clamp_min(1) / len(ids_BT)
        positions_1T = torch.arange(ids_BT.shape[1], device=ids_BT.device)[None]
        cos, sin = rotary_tables(model.config, positions_1T)
        block_cos, block_sin = cos[:, :, ::BLOCK], sin[:, :, ::BLOCK]
        is_far_T = positions_1T[0] >= DENSE_BLOCKS * BLOCK
        is_counted_BT = is_target_BT & is_far_T
        losses: list[Tensor] = []
        recalls: list[Tensor] = []

        @torch.enable_grad()
        def observe(
            attention: Attention, q_BTNH: Tensor, k_BTKH: Tensor, q_BNTH: Tensor, k_BKTH: Tensor
        ) -> None:
            gate, pooled = attention.gate, pool_keys(k_BTKH)
            assert isinstance(gate, BlockGate)
            blocks = pooled.shape[2]
            if blocks == 0:
                return
            missed_N = torch.zeros_like(gate.missed)
            keys = gate.keys(pooled, block_cos[:, :, :blocks], block_sin[:, :, :blocks])
            for start in range(0, q_BTNH.shape[1], self._chunk):
                part = slice(start, start + self._chunk)
                queries = gate.queries(q_BTNH[:, part], cos[:, :, part], sin[:, :, part])
                targets, largest = gate_targets(q_BNTH[:, :, part], k_BKTH, start)
                scores = gate.scores(queries, keys)
                divergence = gate_divergence(scores, targets, start)
                losses.append((divergence.mean(1) * is_target_BT[:, part]).sum())
                kept = kept_blocks(scores, start)
                found_BT = (targets * kept).sum(-1).mean(1)
                recalls.append((found_BT * is_counted_BT[:, part]).sum())
                missed_BNT = count_missed(kept, largest)
                missed_N += (missed_BNT * weight_BT[:, None, part]).sum((0, 2))
            gate.missed.lerp_(missed_N, _NEWEST)

        with _observing(model, observe), torch.no_grad():
            model.hidden(ids_BT)
        count = int(is_counted_BT.sum()) * model.config.num_layers
        self.recall = float(torch.stack(recalls).sum()) / count if count else None
        gates = [attention.gate for attention in list_attentions(model)]
        mark_heads([gate for gate in gates if isinstance(gate, BlockGate)], self._exact_share)
        if not losses:  # sequences of less than a block: nothing to choose, and nothing to learn
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
