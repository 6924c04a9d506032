"""The training loss, computed only where a target token follows.

Price: the vocabulary projection, often the largest matrix of a small model, runs on target
positions alone instead of on all tokens.

Shape legend: B rows, T tokens, D hidden size, V vocabulary, P target positions.
"""

import torch.nn.functional as F
from torch import Tensor

from r1ray.data.batch_set import IGNORED, MicroBatch
from r1ray.models.decoder import Decoder

__all__ = ["summed_loss"]


def summed_loss(model: Decoder, batch: MicroBatch) -> Tensor:
    """Cross-entropy summed over the batch's target tokens: a float32 scalar.

    The sum, not the mean: dividing by the global number of targets comes after the exchange, so
    that accumulation and bucketing leave the gradient that of one big batch.
    """
    is_target_BT = batch.labels_BT != IGNORED
    hidden_BTD = model.hidden(batch.input_ids_BT, document_lengths=batch.document_lengths)
    hidden_PD = hidden_BTD[is_target_BT]
    logits_PV = model.lm_head(hidden_PD).float()
    return F.cross_entropy(logits_PV, batch.labels_BT[is_target_BT], reduction="sum")
