"""Distillation objectives, with a teacher that is stored, online, or scores the student."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from r1ray.compression.distillation import target_logits
from r1ray.compression.logit_store import INDEX_NAME, LogitStore, encode_part, part_name
from r1ray.config.distill import (
    DistillConfig,
    OnlineLogitsConfig,
    OnPolicyConfig,
    StoredLogitsConfig,
)
from r1ray.config.training import TrainConfig
from r1ray.data.batch_set import IGNORED, MicroBatch
from r1ray.exchange import LocalTransport, build_exchange
from r1ray.training.loss import summed_loss
from r1ray.training.objective import (
    CrossEntropy,
    OnlineDistillation,
    OnPolicyDistillation,
    StoredDistillation,
    list_prompts,
)
from r1ray.training.step import TrainState
from tests.fakes import EOS_ID, VOCAB_SIZE, tiny_model
from tests.unit.training.batches import random_batch

TEACHER = tiny_model(seed=1)
BATCH = dataclasses.replace(random_batch(4, 16, seed=0), index=0)


def _config(**changes: object) -> DistillConfig:
    return DistillConfig(teacher="x", **{"ce_share": 0.25, "temperature": 2.0, **changes})


def _store(directory: Path, top_k: int) -> LogitStore:
    data = encode_part(TEACHER, [BATCH], top_k=top_k, temperature=2.0)
    (directory / part_name(0)).write_bytes(data)
    index = {"top_k": top_k, "temperature": 2.0, "vocab_size": VOCAB_SIZE, "num_batches": 1}
    index |= {"num_targets": BATCH.num_targets, "bytes_per_target": 1.0}
    (directory / INDEX_NAME).write_text(json.dumps(index))
    return LogitStore(directory)


def _loss_and_gradient(objective: CrossEntropy) -> tuple[float, Tensor]:
    model = tiny_model()
    loss = objective.loss(model, BATCH)
    loss.backward()
    gradient = model.model.layers[0].mlp.up_proj.weight.grad
    assert gradient is not None
    return loss.item(), gradient


def test_a_store_of_the_whole_vocabulary_is_the_online_teacher(tmp_path: Path) -> None:
    online, g_online = _loss_and_gradient(OnlineDistillation(_config(), TEACHER))
    stored, g_stored = _loss_and_gradient(
        StoredDistillation(_config(), _store(tmp_path, VOCAB_SIZE))
    )
    assert stored == pytest.approx(online, rel=1e-3)  # log-probabilities have 11 bits
    assert (g_stored - g_online).norm() < 0.01 * g_online.norm()


def test_a_few_tokens_and_the_tail_come_close_to_it(tmp_path: Path) -> None:
    _, g_online = _loss_and_gradient(OnlineDistillation(_config(), TEACHER))
    _, g_stored = _loss_and_gradient(StoredDistillation(_config(), _store(tmp_path, 64)))
    assert torch.nn.functional.cosine_similarity(g_stored.flatten(), g_online.flatten(), 0) > 0.9


def test_the_shares_of_cross_entropy_and_divergence_add_up() -> None:
    model = tiny_model()
    losses = {
        share: OnlineDistillation(_config(ce_share=share), TEACHER).loss(model, BATCH).item()
        for share in (0.0, 0.25, 0.999999)
    }
    assert losses[0.999999] == pytest.approx(summed_loss(model, BATCH).item(), rel=1e-4)
    mixed = 0.25 * losses[0.999999] + 0.75 * losses[0.0]
    assert losses[0.25] == pytest.approx(mixed, rel=1e-4)


def test_the_divergence_counts_the_square_of_the_temperature() -> None:
    model = tiny_model()
    with torch.no_grad():
        mine, theirs = (target_logits(item, BATCH) / 2.0 for item in (model, TEACHER))
    divergence = torch.nn.functional.kl_div(
        mine.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="sum"
    )
    by_hand = 0.25 * summed_loss(model, BATCH) + 0.75 * 2.0**2 * divergence
    found = OnlineDistillation(_config(), TEACHER).loss(model, BATCH)
    torch.testing.assert_close(found, by_hand)


def test_a_teacher_is_asked_in_float32_whatever_the_student_runs_in() -> None:
    model = tiny_model(seed=1)  # the same as the teacher
    objective = OnlineDistillation(_config(ce_share=0.0), TEACHER)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = objective.loss(model, BATCH).item()
    assert narrow > 10 * abs(objective.loss(model, BATCH).item())


def test_a_student_approaches_its_online_teacher() -> None:
    config = TrainConfig(num_steps=30, warmup_steps=2, learning_rate=1e-2, precision="fp32")
    objective = OnlineDistillation(_config(ce_share=0.0), TEACHER)
    state = TrainState(
        tiny_model(), config, build_exchange(config.exchange), LocalTransport(), objective
    )
    losses = [state.run_step([BATCH]).loss for _ in range(30)]
    assert losses[0] is not None
    assert losses[-1] is not None
    assert losses[-1] < 0.3 * losses[0]


def _on_policy(**changes: object) -> OnPolicyDistillation:
    config = OnPolicyConfig(**{"last_steps": 4, "max_new_tokens": 6, **changes})
    return OnPolicyDistillation(
        config, CrossEntropy(), TEACHER, stop_ids=[EOS_ID, 7], num_steps=10, seed=3
    )


def test_on_policy_batches_are_prompts_with_the_students_own_answers() -> None:
    model = tiny_model()
    drawn = _on_policy().draw(model, BATCH, 6)
    prompts = list_prompts(BATCH)
    assert drawn.index is None
    assert drawn.input_ids_BT.numel() <= BATCH.input_ids_BT.numel()
    assert 2 <= len(drawn.input_ids_BT) <= len(prompts)
    total = 0
    for ids, labels in zip(drawn.input_ids_BT, drawn.labels_BT, strict=True):
        (places,) = (labels != IGNORED).nonzero(as_tuple=True)
        # The last prompt token predicts the first of the answer.
        assert ids[: places[0] + 1].tolist() in prompts
        assert torch.equal(labels[places], ids[places + 1])
        answer = labels[places].tolist()
        assert 1 <= len(answer) <= 6
        assert not {EOS_ID, 7} & set(answer[:-1])
        assert len(answer) == 6 or answer[-1] == EOS_ID
        total += len(answer)
    assert drawn.num_targets == total
    again = _on_policy().draw(model, BATCH, 6)
    assert torch.equal(again.input_ids_BT, drawn.input_ids_BT)  # a step done again
    other = _on_policy().draw(model, BATCH, 7)
    assert other.input_ids_BT.tolist() != drawn.input_ids_BT.tolist()


def test_a_low_temperature_samples_the_likeliest_tokens() -> None:
    model = tiny_model()
    drawn = _on_policy(temperature=0.01).draw(model, BATCH, 6)
    with torch.inference_mode():
        greedy = model(drawn.input_ids_BT).argmax(-1)
    is_answer = drawn.labels_BT != IGNORED
    is_answer &= drawn.labels_BT != EOS_ID  # it stands for any stop token
    assert torch.equal(greedy[is_answer], drawn.labels_BT[is_answer])


def test_before_the_last_steps_the_data_itself_is_used() -> None:
    assert _on_policy().draw(tiny_model(), BATCH, 5) is BATCH
    assert _on_policy().loss(tiny_model(), BATCH).item() == summed_loss(tiny_model(), BATCH).item()


def test_packed_documents_have_a_prompt_each() -> None:
    ids = torch.arange(1, 13)[None]
    labels = torch.full_like(ids, IGNORED)
    labels[0, 2:5], labels[0, 8:9] = ids[0, 3:6], ids[0, 9:10]
    packed = MicroBatch(ids, labels, 12, 4, document_lengths=(6, 4, 2))
    assert list_prompts(packed) == [[1, 2, 3], [7, 8, 9]]


def test_on_policy_training_lowers_the_divergence_on_what_the_student_says() -> None:
    config = TrainConfig(num_steps=20, warmup_steps=1, learning_rate=1e-2, precision="fp32")
    objective = _on_policy(last_steps=10)  # of 10: all
    state = TrainState(
        tiny_model(), config, build_exchange(config.exchange), LocalTransport(), objective
    )
    records = [state.run_step([BATCH]) for _ in range(20)]
    assert records[0].loss is not None
    assert records[-1].loss is not None
    assert records[-1].loss < 0.7 * records[0].loss
    assert records[0].num_targets != BATCH.num_targets


def test_configurations_say_which_teacher() -> None:
    assert isinstance(_config().logits, StoredLogitsConfig)
    assert isinstance(_config(logits={"type": "online"}).logits, OnlineLogitsConfig)
