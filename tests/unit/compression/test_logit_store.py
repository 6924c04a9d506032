import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from r1ray.compression.distillation import keep_top_k, sparse_kl, target_logits
from r1ray.compression.logit_store import (
    INDEX_NAME,
    PART_BATCHES,
    LogitStore,
    encode_part,
    part_name,
)
from r1ray.data.batch_set import MicroBatch
from r1ray.errors import ArtifactError, ShapeError
from tests.fakes import tiny_model
from tests.unit.training.batches import random_batch

NUM_BATCHES = PART_BATCHES + 3
TEACHER = tiny_model()


def _batches() -> list[MicroBatch]:
    return [random_batch(1 + seed % 3, 6, seed=seed) for seed in range(NUM_BATCHES)]


@pytest.fixture(scope="module")
def store_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("store")
    batches = _batches()
    for part, start in enumerate(range(0, NUM_BATCHES, PART_BATCHES)):
        data = encode_part(TEACHER, batches[start : start + PART_BATCHES], top_k=4, temperature=2.0)
        (directory / part_name(part)).write_bytes(data)
    index = {
        "top_k": 4,
        "temperature": 2.0,
        "vocab_size": 300,
        "num_batches": NUM_BATCHES,
        "num_targets": sum(batch.num_targets for batch in batches),
        "bytes_per_target": 20.0,
    }
    (directory / INDEX_NAME).write_text(json.dumps(index))
    return directory


@pytest.mark.parametrize("index", [0, 1, PART_BATCHES - 1, PART_BATCHES, NUM_BATCHES - 1])
def test_a_batch_reads_as_the_teacher_saw_it_to_16_bits(store_dir: Path, index: int) -> None:
    batch = _batches()[index]
    found = LogitStore(store_dir).read(index)
    with torch.inference_mode():
        expected = keep_top_k(target_logits(TEACHER, batch), 4, 2.0)
    assert torch.equal(found.ids_PK, expected.ids_PK)
    # float16 keeps 11 bits.
    for mine, theirs in (
        (found.log_probs_PK, expected.log_probs_PK),
        (found.tail_P, expected.tail_P),
    ):
        torch.testing.assert_close(mine, theirs, rtol=2**-11, atol=1e-6)


def test_a_target_takes_four_bytes_a_token_and_two_for_the_tail(store_dir: Path) -> None:
    table = pq.read_table(store_dir / part_name(0))
    num_targets = sum(batch.num_targets for batch in _batches()[:PART_BATCHES])
    payload = sum(column.combine_chunks().flatten().nbytes for column in table.columns)
    assert payload == num_targets * (4 * (2 + 2) + 2)


def test_masses_below_the_range_of_16_bits_give_finite_losses(tmp_path: Path) -> None:
    teacher, batch = tiny_model(), random_batch(1, 6, seed=0)
    with torch.no_grad():
        teacher.lm_head.get_parameter("weight").mul_(1e6)
    data = encode_part(teacher, [batch], top_k=4, temperature=1.0)
    (tmp_path / part_name(0)).write_bytes(data)
    index = {"top_k": 4, "temperature": 1.0, "vocab_size": 300, "num_batches": 1}
    index |= {"num_targets": batch.num_targets, "bytes_per_target": 1.0}
    (tmp_path / INDEX_NAME).write_text(json.dumps(index))
    targets = LogitStore(tmp_path).read(0)
    assert targets.log_probs_PK.min() < -60_000
    assert torch.isfinite(sparse_kl(target_logits(tiny_model(), batch), targets, 1.0)).all()


@pytest.mark.parametrize("index", [-1, NUM_BATCHES])
def test_a_batch_that_is_not_stored_is_refused(store_dir: Path, index: int) -> None:
    with pytest.raises(ShapeError, match=f"batch {index} is not in a logit store of"):
        LogitStore(store_dir).read(index)


def test_a_missing_or_damaged_store_is_named(store_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"logits\.json: no readable logit store"):
        LogitStore(tmp_path)
    (tmp_path / INDEX_NAME).write_text((store_dir / INDEX_NAME).read_text())
    (tmp_path / part_name(0)).write_bytes(b"PAR1 and no more")
    with pytest.raises(ArtifactError, match=r"logits-00000\.parquet: cannot be read"):
        LogitStore(tmp_path).read(0)
