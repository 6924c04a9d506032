"""Training the gates of block-sparse attention: the model runs as it is served, and they watch.

1. Every step draws a few units of queries, 64 tokens that choose together, of those that do not
   attend densely: up to half of them with target tokens (an answer looks for what it needs).
2. A copy of the model in INT8 reads the batch in chunks, densely, into int8 keys and values. In
   every layer, the gate's scores of these units are compared with the attention that the model
   itself pays to every earlier block (`r1ray.ops.block_gate`). All their tokens up to the
   sequence's last target count: prompts are read by the gates as well.
3. What the gates would have missed at the target tokens marks the heads that choose by the keys
   themselves; every sequence with such tokens counts the same. Workers average it before each
   checkpoint.

Price: one forward in INT8 without gradients, N·64·T scores a layer and unit, a byte a weight, and
the keys of the batch in float32.
"""

import contextlib
import copy
import dataclasses
import random
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from r1ray.config.training import GatesConfig
from r1ray.data.batch_set import IGNORED, MicroBatch
from r1ray.errors import ConfigError, ShapeError
from r1ray.exchange import Transport
from r1ray.models.decoder import Attention, Decoder, Observer
from r1ray.models.gates import list_attentions
from r1ray.models.kv_cache import KVCache
from r1ray.models.quantization import quantize_modules
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

__all__ = ["GateTraining", "average_missed", "check_gate_lengths"]


_NEWEST = 0.05  # weight of a batch in what a gate missed lately
_FIRST_UNIT = 4  # before, none can be chosen: the first, the one before and the own are kept
_CHUNK = 16 * BLOCK  # tokens that are read together


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
        self._reader: Decoder | None = None

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
        positions_1T = torch.arange(ids_BT.shape[1], device=ids_BT.device)[None]
        gates = _list_gates(model)
        units = _UnitObserver(
            gates, rotary_tables(model.config, positions_1T), is_target_BT, is_answer_BT
        )
        if self._reader is None:
            self._reader = _copy_as_served(model)
        if units.num_tokens:  # what is behind, nothing looks at
            with _observing(self._reader, units.observe), torch.no_grad():
                _read(self._reader, ids_BT[:, : units.num_tokens])
        self.recall = float(torch.cat(units.recalls).mean()) if units.recalls else None
        num_answering = int(is_answer_BT.any(1).sum())
        if num_answering:
            for gate, missed_N in zip(gates, units.missed, strict=True):
                gate.missed.lerp_(missed_N / num_answering, _NEWEST)
        mark_heads(gates, self._exact_share)
        if not units.losses:  # too short for anything to choose: nothing to learn
            return sum(item.sum() for item in model.parameters() if item.requires_grad) * 0.0  # type: ignore[return-value]
        return torch.stack(units.losses).sum() / model.config.num_layers


def average_missed(model: Decoder, transport: Transport, config: GatesConfig) -> None:
    """Mark heads by what was missed on every worker's batches; all workers call it together."""
    gates = _list_gates(model)
    missed_GN = torch.stack([gate.missed for gate in gates])
    transport.all_reduce_sum(missed_GN).wait()
    for gate, missed_N in zip(gates, missed_GN / transport.world_size, strict=True):
        gate.missed.copy_(missed_N)
    mark_heads(gates, config.exact_heads)


class _UnitObserver:
    """Compares what gates would choose, in every layer, with the attention that the model pays.

    Args:
        rotary: cos and sin of all positions.
        is_target_BT: tokens of the units that are looked at.
        is_answer_BT: of these, the ones at which misses count.

    Attributes:
        num_tokens: to be read, up to the end of the last unit.
        losses: of each layer and unit, summed over its target tokens.
        recalls: of units that do not attend densely.
        missed: attention that gates miss, by layer and head; summed over sequences with answers.
    """

    def __init__(
        self,
        gates: Sequence[BlockGate],
        rotary: tuple[Tensor, Tensor],
        is_target_BT: Tensor,
        is_answer_BT: Tensor,
    ) -> None:
        self._cos, self._sin = rotary
        self._is_target_BT = is_target_BT
        self._weight_BT = is_answer_BT / is_answer_BT.sum(1, keepdim=True).clamp_min(1)
        found = {at // BLOCK for at in is_target_BT.any(0).nonzero().flatten().tolist()}
        self._units = sorted(unit for unit in found if unit >= _FIRST_UNIT)
        self.num_tokens = (max(self._units, default=-1) + 1) * BLOCK
        self._read: dict[int, tuple[Tensor, Tensor]] = {}  # of a layer: keys pooled, and rotated
        self.losses: list[Tensor] = []
        self.recalls: list[Tensor] = []
        self.missed = [torch.zeros_like(gate.missed) for gate in gates]

    @torch.enable_grad()
    def observe(
        self, attention: Attention, q_BTNH: Tensor, k_BTKH: Tensor, q_BNTH: Tensor, k_BKTH: Tensor
    ) -> None:
        """A chunk in one layer: queries and keys before and after rotary positions."""
        gate, first, pooled, rotated = attention.gate, 0, pool_keys(k_BTKH), k_BKTH
        assert isinstance(gate, BlockGate)
        if attention.layer in self._read:
            pooled_before, rotated_before = self._read[attention.layer]
            first = rotated_before.shape[2]
            pooled = torch.cat([pooled_before, pooled], dim=2)
            rotated = torch.cat([rotated_before, rotated], dim=2)
        self._read[attention.layer] = pooled, rotated
        units = [unit for unit in self._units if first <= unit * BLOCK < rotated.shape[2]]
        if not units:
            return
        last = pooled.shape[2] * BLOCK
        keys = gate.keys(pooled, self._cos[:, :, :last:BLOCK], self._sin[:, :, :last:BLOCK])
        for unit in units:
            start = unit * BLOCK
            part, here = (slice(at, at + BLOCK) for at in (start, start - first))
            is_target_BL, weight_BL = self._is_target_BT[:, part], self._weight_BT[:, part]
            queries = gate.queries(q_BTNH[:, here], self._cos[:, :, part], self._sin[:, :, part])
            scores = gate.scores(queries, keys[:, :, :unit])
            largest = gate_targets(q_BNTH[:, :, here], rotated, start)
            self.losses.append(gate_loss(scores, largest, is_target_BL))
            missed_BNL = count_missed(kept_blocks(scores, start), largest)
            self.missed[attention.layer] += (missed_BNL * weight_BL[:, None]).sum((0, 2))
            if unit >= DENSE_BLOCKS:
                self.recalls.append(unit_recall(scores, largest, is_target_BL))


def _list_gates(model: Decoder) -> list[BlockGate]:
    gates = [attention.gate for attention in list_attentions(model)]
    assert all(isinstance(gate, BlockGate) for gate in gates)
    return gates  # type: ignore[return-value]


def _copy_as_served(model: Decoder) -> Decoder:
    """`model` in INT8, with the very same gates."""
    shared: list[nn.Module | nn.Parameter] = [*model.parameters(), *_list_gates(model)]
    reader = copy.deepcopy(model, {id(item): item for item in shared})
    quantize_modules(reader)
    return reader


def _read(model: Decoder, ids_BT: Tensor) -> None:
    """Run `model` over `ids_BT` in chunks, densely: the cache keeps no summaries."""
    rows, tokens = ids_BT.shape
    cache = KVCache(
        model.config, max_rows=rows, max_tokens=tokens, dtype=torch.int8, device=ids_BT.device
    )
    cache.add_rows(rows)
    for ids in ids_BT.split(_CHUNK, dim=1):
        active = cache.active()
        model.hidden(ids, active)
        active.advance([ids.shape[1]] * rows)


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
