import pytest
import torch

from r1ray.data.batch_set import IGNORED, MicroBatch
from r1ray.training.loss import summed_loss
from tests.fakes import tiny_model
from tests.unit.training.batches import random_batch


def _by_hand(batch: MicroBatch) -> float:
    with torch.inference_mode():
        log_probabilities = tiny_model()(batch.input_ids_BT).double().log_softmax(-1)
    total = 0.0
    for row, position in (batch.labels_BT != IGNORED).nonzero().tolist():
        total -= float(log_probabilities[row, position, batch.labels_BT[row, position]])
    return total


def test_the_loss_is_the_summed_cross_entropy_of_the_targets() -> None:
    batch = random_batch(3, 12, seed=0)
    # float32 against float64, relative rounding over some twenty terms.
    assert summed_loss(tiny_model(), batch).item() == pytest.approx(_by_hand(batch), rel=1e-5)


def test_only_targets_count() -> None:
    batch = random_batch(2, 12, seed=1)
    labels = torch.full_like(batch.labels_BT, IGNORED)
    labels[1, 4] = batch.input_ids_BT[1, 5]
    single = MicroBatch(batch.input_ids_BT, labels, batch.num_tokens, 1)
    changed = batch.input_ids_BT.clone()
    changed[0] = 7  # the other row
    changed[1, 5:] = 9  # tokens behind the target's position
    other = MicroBatch(changed, labels, batch.num_tokens, 1)
    torch.testing.assert_close(
        summed_loss(tiny_model(), single), summed_loss(tiny_model(), other), rtol=1e-5, atol=0
    )


def test_padding_adds_neither_loss_nor_gradient() -> None:
    batch = random_batch(1, 12, seed=2)
    wide_ids, wide_labels = torch.zeros(1, 20, dtype=torch.long), torch.full((1, 20), IGNORED)
    wide_ids[:, :12], wide_labels[:, :12] = batch.input_ids_BT, batch.labels_BT
    wide = MicroBatch(wide_ids, wide_labels, batch.num_tokens, batch.num_targets)
    gradients = []
    for item in (batch, wide):
        model = tiny_model()
        summed_loss(model, item).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for narrow, padded in zip(*gradients, strict=True):
        torch.testing.assert_close(narrow, padded, atol=1e-5, rtol=1e-5)


def test_no_targets_give_a_loss_of_zero_that_can_be_differentiated() -> None:
    batch = random_batch(2, 8, seed=3)
    empty = MicroBatch(batch.input_ids_BT, torch.full_like(batch.labels_BT, IGNORED), 16, 0)
    model = tiny_model()
    loss = summed_loss(model, empty)
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_a_packed_batch_has_the_summed_loss_and_gradient_of_its_documents() -> None:
    documents = [random_batch(1, length, seed=length) for length in (12, 5, 3, 9)]
    padding = torch.zeros(1, 6, dtype=torch.long)
    packed = MicroBatch(
        torch.cat([*(document.input_ids_BT for document in documents), padding], dim=1),
        torch.cat([*(document.labels_BT for document in documents), padding + IGNORED], dim=1),
        sum(document.num_tokens for document in documents),
        sum(document.num_targets for document in documents),
        document_lengths=(12, 5, 3, 9, 6),
    )
    together, apart = tiny_model(), tiny_model()
    loss = summed_loss(together, packed)
    loss.backward()
    total = 0.0
    for document in documents:
        alone = summed_loss(apart, document)
        alone.backward()
        total += alone.item()
    # float32 sums in another order; the gradient is a sum as well, of order 1 to 10.
    assert loss.item() == pytest.approx(total, rel=1e-5)
    for one, many in zip(together.parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(one.grad, many.grad, atol=1e-5, rtol=1e-5)


def test_a_document_of_a_packed_batch_does_not_see_its_neighbours() -> None:
    batch = random_batch(1, 20, seed=4)
    labels = torch.full_like(batch.labels_BT, IGNORED)
    labels[0, 9:18] = batch.input_ids_BT[0, 10:19]  # targets in the second of three documents
    changed = batch.input_ids_BT.clone()
    changed[0, :8], changed[0, 19:] = 7, 9  # the others
    losses = [
        summed_loss(tiny_model(), MicroBatch(ids, labels, 20, 9, document_lengths=(8, 11, 1)))
        for ids in (batch.input_ids_BT, changed)
    ]
    assert losses[0].item() == losses[1].item()
