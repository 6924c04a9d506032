"""The plain training loss, computed only where a target token follows."""

import torch
from torch import Tensor

from r1ray.compression.distillation import cross_entropy, target_logits
from r1ray.data.batch_set import MicroBatch
from r1ray.models.decoder import Decoder

__all__ = ["summed_loss"]


def summed_loss(model: Decoder, batch: MicroBatch) -> Tensor:
    """Cross-entropy summed over the batch's target tokens: a float32 scalar.

    The sum, not the mean: dividing by the global number of targets comes after the exchange, so
    that accumulation and bucketing leave the gradient that of one big batch.
    """
    loss = cross_entropy(target_logits(model, batch), batch)
    if torch.is_grad_enabled() and not loss.requires_grad:
        # A batch of text, and a decoder that is frozen: a loss to be counted, and no gradient.
        loss = loss + sum(item.sum() * 0.0 for item in model.parameters() if item.requires_grad)
    return loss
