"""What training minimises: the targets themselves, or what a teacher says of them as well.

A step hands every micro-batch to `draw`, which may put another in its place, and then to `loss`.

1. `CrossEntropy`: the target tokens alone.
2. `StoredDistillation`, `OnlineDistillation`: a · CE + (1 - a) · T² · KL(teacher ‖ student).
3. `OnPolicyDistillation`: in the last steps, the student's own answers to the batch's prompts, and
   KL(student ‖ teacher) on each of their tokens.

Price: `r1ray.compression.distillation`; on-policy, decoding the answers as well.

Shape legend: B rows, T tokens, P target positions, V vocabulary.
"""

import random
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from r1ray.compression.distillation import (
    cross_entropy,
    dense_kl,
    reverse_kl,
    sparse_kl,
    target_logits,
)
from r1ray.compression.logit_store import LogitStore
from r1ray.config.distill import DistillConfig, OnPolicyConfig
from r1ray.data.batch_set import IGNORED, MicroBatch
from r1ray.models.batch_generation import generate_batch
from r1ray.models.decoder import Decoder
from r1ray.models.sampling import SamplingParams
from r1ray.ops.fake_quant import held_weights
from r1ray.training.loss import summed_loss

__all__ = [
    "CrossEntropy",
    "Objective",
    "OnPolicyDistillation",
    "OnlineDistillation",
    "StoredDistillation",
    "list_prompts",
]


class Objective(Protocol):
    """One instance per worker.

    Attributes:
        recall: where gates learn to choose blocks (`r1ray.training.gates`), the share of what is
            needed that they choose, in what `loss` was called with last; else None.
    """

    @property
    def recall(self) -> float | None: ...

    def draw(self, model: Decoder, batch: MicroBatch, step: int) -> MicroBatch:
        """What step `step`, from 0, trains on in place of `batch`; outside of autograd."""
        ...

    def loss(self, model: Decoder, batch: MicroBatch) -> Tensor:
        """The loss summed, as in `summed_loss`, over the batch's target tokens."""
        ...


class CrossEntropy:
    """Cross-entropy with the target tokens."""

    recall = None

    def draw(self, model: Decoder, batch: MicroBatch, step: int) -> MicroBatch:  # noqa: ARG002
        return batch

    def loss(self, model: Decoder, batch: MicroBatch) -> Tensor:
        return summed_loss(model, batch)


class StoredDistillation(CrossEntropy):
    """Distillation from a logit store of the BatchSet that the batches come from."""

    def __init__(self, config: DistillConfig, store: LogitStore) -> None:
        self._config = config
        self._store = store

    def loss(self, model: Decoder, batch: MicroBatch) -> Tensor:
        assert batch.index is not None, "stored logits are of a BatchSet"
        logits_PV = target_logits(model, batch)
        targets = self._store.read(batch.index).to(logits_PV.device)
        divergence = sparse_kl(logits_PV, targets, self._config.temperature).sum()
        return _mix(self._config, cross_entropy(logits_PV, batch), divergence)


class OnlineDistillation(CrossEntropy):
    """Distillation from a teacher that runs beside the student, on the same device."""

    def __init__(self, config: DistillConfig, teacher: Decoder) -> None:
        self._config = config
        self._teacher = teacher

    def loss(self, model: Decoder, batch: MicroBatch) -> Tensor:
        logits_PV = target_logits(model, batch)
        theirs_PV = _teacher_logits(self._teacher, batch)
        divergence = dense_kl(logits_PV, theirs_PV, self._config.temperature).sum()
        return _mix(self._config, cross_entropy(logits_PV, batch), divergence)


class OnPolicyDistillation:
    """`before` until the last steps; then the student's own answers, scored by the teacher.

    As many of a batch's prompts are answered as fit, with their answers, into its own size.

    Args:
        stop_ids: tokens that end an answer, the usual one first.
        num_steps: of the whole training.
        seed: of the samples, which are the same when a step is done again.
    """

    recall = None

    def __init__(
        self,
        config: OnPolicyConfig,
        before: Objective,
        teacher: Decoder,
        *,
        stop_ids: Sequence[int],
        num_steps: int,
        seed: int,
    ) -> None:
        self._stop_ids = list(stop_ids)
        self._config = config
        self._before = before
        self._teacher = teacher
        self._first_step = num_steps - config.last_steps
        self._seed = seed

    def draw(self, model: Decoder, batch: MicroBatch, step: int) -> MicroBatch:
        if step < self._first_step:
            return self._before.draw(model, batch, step)
        chance = random.Random(f"{self._seed}-{step}-{batch.index}")
        prompts = list_prompts(batch)
        longest = max(map(len, prompts)) + self._config.max_new_tokens
        prompts = chance.sample(
            prompts, min(len(prompts), max(1, batch.input_ids_BT.numel() // longest))
        )
        with held_weights(model):
            answers = generate_batch(
                model,
                prompts,
                max_new_tokens=self._config.max_new_tokens,
                stop_token_ids=frozenset(self._stop_ids),
                max_concurrency=len(prompts),
                sampling=[
                    SamplingParams(
                        temperature=self._config.temperature, seed=chance.getrandbits(31)
                    )
                    for _ in prompts
                ],
            )
        for answer in answers:
            if len(answer) < self._config.max_new_tokens:
                answer += self._stop_ids[:1]  # it ended there, and is to learn whether it should
        return _lay_out(prompts, answers, batch.input_ids_BT.device)

    def loss(self, model: Decoder, batch: MicroBatch) -> Tensor:
        if batch.index is not None:  # not drawn here
            return self._before.loss(model, batch)
        logits_PV = target_logits(model, batch)
        theirs_PV = _teacher_logits(self._teacher, batch)
        return reverse_kl(logits_PV, theirs_PV, 1.0).sum()


@torch.no_grad()
def _teacher_logits(teacher: Decoder, batch: MicroBatch) -> Tensor:
    """In float32, whatever the student runs in: as they are stored."""
    with torch.autocast(batch.input_ids_BT.device.type, enabled=False):
        return target_logits(teacher, batch)


def list_prompts(batch: MicroBatch) -> list[list[int]]:
    """What comes before the first target, of every sample that has one."""
    if batch.document_lengths is None:
        ids, labels = list(batch.input_ids_BT), list(batch.labels_BT)
    else:
        ids = list(batch.input_ids_BT[0].split(batch.document_lengths))
        labels = list(batch.labels_BT[0].split(batch.document_lengths))
    prompts = []
    for ids_T, labels_T in zip(ids, labels, strict=True):
        targets = (labels_T != IGNORED).nonzero()
        if len(targets):
            prompts.append(ids_T[: int(targets[0]) + 1].tolist())
    return prompts


def _lay_out(
    prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], device: torch.device
) -> MicroBatch:
    rows = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    columns = max(map(len, rows))
    input_ids_BT = torch.zeros(len(rows), columns, dtype=torch.long)
    labels_BT = torch.full((len(rows), columns), IGNORED, dtype=torch.long)
    for index, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        ids_T = torch.tensor(row)
        input_ids_BT[index, : len(row)] = ids_T
        labels_BT[index, len(prompt) - 1 : len(row) - 1] = ids_T[len(prompt) :]
    return MicroBatch(
        input_ids_BT.to(device),
        labels_BT.to(device),
        num_tokens=sum(map(len, rows)),
        num_targets=sum(map(len, answers)),
    )


def _mix(config: DistillConfig, cross_entropy: Tensor, divergence: Tensor) -> Tensor:
    share = config.ce_share
    return share * cross_entropy + (1 - share) * config.temperature**2 * divergence
