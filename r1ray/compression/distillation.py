"""What a student learns from a teacher: the divergence from its distribution over next tokens.

    loss = a · CE + (1 - a) · T² · KL(teacher ‖ student), both at temperature T

1. Of a stored teacher, the k likeliest tokens are kept, with one log-mass for all others (a "ghost"
   token). KL over these k + 1 outcomes is a lower bound of the dense one, and close to it; over the
   k tokens alone, renormalised, it would pull the student towards a distribution without a tail.
2. Of a teacher that runs beside the student, all logits are used.
3. On-policy, the student's own samples are scored: KL(student ‖ teacher), which punishes what the
   teacher would not say.

Price: stored, k · 4 + 2 bytes a target token with 16-bit ids; online, one forward of the teacher.

Source: Hinton et al. 2015, arXiv:1503.02531; sparse logits: Anshumann et al. 2025,
arXiv:2503.16870; on-policy: Agarwal et al. 2024, arXiv:2306.13649.

Shape legend: B rows, T tokens, D hidden size, P target positions, V vocabulary, K kept tokens.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from r1ray.data.batch_set import IGNORED, MicroBatch
from r1ray.errors import ShapeError
from r1ray.models.decoder import Decoder

__all__ = [
    "SparseTargets",
    "cross_entropy",
    "dense_kl",
    "keep_top_k",
    "reverse_kl",
    "sparse_kl",
    "target_logits",
    "top_k_kl",
]


@dataclass(frozen=True)
class SparseTargets:
    """A teacher's distribution at its temperature, by its likeliest tokens.

    Attributes:
        ids_PK: int64, likeliest first.
        log_probs_PK: float32.
        tail_P: float32, log of the mass of all other tokens; -inf where there is none.
    """

    ids_PK: Tensor
    log_probs_PK: Tensor
    tail_P: Tensor

    def to(self, device: torch.device) -> "SparseTargets":
        return SparseTargets(
            self.ids_PK.to(device), self.log_probs_PK.to(device), self.tail_P.to(device)
        )


def target_logits(model: Decoder, batch: MicroBatch) -> Tensor:
    """Logits [P, V] at the positions of `batch` that a target follows, row by row.

    The vocabulary projection, often the largest matrix of a small model, runs on these alone.
    """
    images = None
    if model.fusion is not None:
        images = model.fusion.look(batch.images, len(batch.input_ids_BT))
    hidden_BTD = model.hidden(
        batch.input_ids_BT, document_lengths=batch.document_lengths, images=images
    )
    logits_PV: Tensor = model.lm_head(hidden_BTD[batch.labels_BT != IGNORED])
    return logits_PV


def cross_entropy(logits_PV: Tensor, batch: MicroBatch) -> Tensor:
    """Cross-entropy of `target_logits` with the target tokens, summed: a float32 scalar."""
    labels_P = batch.labels_BT[batch.labels_BT != IGNORED]
    return F.cross_entropy(logits_PV.float(), labels_P, reduction="sum")


def keep_top_k(logits_PV: Tensor, top_k: int, temperature: float) -> SparseTargets:
    """The `top_k` likeliest tokens of softmax(logits / temperature), and the mass of the others.

    Raises:
        ShapeError: the vocabulary is smaller than `top_k`.
    """
    if top_k > logits_PV.shape[1]:
        raise ShapeError(
            f"top_k ({top_k}) is above the vocabulary of {logits_PV.shape[1]}; lower it"
        )
    log_probs_PV = torch.log_softmax(logits_PV.float() / temperature, dim=-1)
    log_probs_PK, ids_PK = log_probs_PV.topk(top_k, dim=-1)
    return SparseTargets(ids_PK, log_probs_PK, _tail(log_probs_PV, ids_PK))


def sparse_kl(logits_PV: Tensor, targets: SparseTargets, temperature: float) -> Tensor:
    """KL(teacher ‖ student) over the kept tokens and the tail: float32 [P]."""
    log_probs_PV = torch.log_softmax(logits_PV.float() / temperature, dim=-1)
    mine_PK = log_probs_PV.gather(1, targets.ids_PK)
    kept_P = _divergence(targets.log_probs_PK, mine_PK)
    (places,) = (targets.tail_P > -math.inf).nonzero(as_tuple=True)
    mine_tail = _tail(log_probs_PV[places], targets.ids_PK[places])
    return kept_P.index_add(
        0, places, _divergence(targets.tail_P[places, None], mine_tail[:, None])
    )


def top_k_kl(logits_PV: Tensor, targets: SparseTargets, temperature: float) -> Tensor:
    """KL over the kept tokens alone, both sides renormalised: float32 [P].

    What `sparse_kl` is measured against.
    """
    mine_PK = torch.gather(logits_PV.float() / temperature, 1, targets.ids_PK)
    theirs_PK = torch.log_softmax(targets.log_probs_PK, dim=-1)
    return _divergence(theirs_PK, torch.log_softmax(mine_PK, dim=-1))


def dense_kl(logits_PV: Tensor, teacher_logits_PV: Tensor, temperature: float) -> Tensor:
    """KL(teacher ‖ student) over the whole vocabulary: float32 [P]."""
    theirs_PV = torch.log_softmax(teacher_logits_PV.float() / temperature, dim=-1)
    mine_PV = torch.log_softmax(logits_PV.float() / temperature, dim=-1)
    return _divergence(theirs_PV, mine_PV)


def reverse_kl(logits_PV: Tensor, teacher_logits_PV: Tensor, temperature: float) -> Tensor:
    """KL(student ‖ teacher) over the whole vocabulary: float32 [P]."""
    return dense_kl(teacher_logits_PV, logits_PV, temperature)


def _divergence(theirs: Tensor, mine: Tensor) -> Tensor:
    """Σ p (log p - log q) over the last dimension, of log-probabilities."""
    return (theirs.exp() * (theirs - mine)).sum(dim=-1)


def _tail(log_probs_PV: Tensor, ids_PK: Tensor) -> Tensor:
    """log of the mass outside of `ids_PK`, by summing that mass: 1 - sum would lose small ones."""
    if ids_PK.shape[1] == log_probs_PV.shape[1]:
        return log_probs_PV.new_full(log_probs_PV.shape[:1], -math.inf)
    return log_probs_PV.scatter(1, ids_PK, -math.inf).logsumexp(dim=-1)
