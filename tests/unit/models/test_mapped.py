import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from r1ray.errors import ArtifactError, ConfigError
from r1ray.models.mapped import MappedTensors
from r1ray.models.tiered import check_is_on_disk
from r1ray.models.tiers import resident_bytes

MIB = 1 << 20


def test_a_safetensors_file_is_mapped_as_the_library_reads_it(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.arange(7, dtype=torch.int8),
        "c": torch.randn(2, 2).bfloat16(),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(2.5),
    }
    save_file(tensors, tmp_path / "m.safetensors", metadata={"format": "pt"})
    mapped = MappedTensors.open(tmp_path / "m.safetensors")
    assert set(mapped) == set(tensors)
    for name, tensor in tensors.items():
        assert mapped[name].dtype == tensor.dtype
        assert torch.equal(mapped[name], tensor)


def _is_in_memory(path: Path) -> bool:
    try:
        check_is_on_disk(str(path))
    except ConfigError:
        return True
    return False


def test_pages_leave_the_process_when_they_are_released_and_come_back_as_they_were(
    tmp_path: Path,
) -> None:
    tensor = torch.randn(16 * MIB // 4)
    save_file({"w": tensor}, tmp_path / "m.safetensors")
    mapped = MappedTensors.open(tmp_path / "m.safetensors")
    if _is_in_memory(tmp_path):
        pytest.skip("FILES OF TESTS ARE IN MEMORY: resident file pages are NOT TESTED here")
    before = resident_bytes()
    total = mapped["w"].sum()
    assert resident_bytes() - before > 12 * MIB
    mapped.release("w")
    assert resident_bytes() - before < 4 * MIB
    assert torch.equal(mapped["w"].sum(), total)


def test_what_is_written_to_a_new_file_stays_when_its_pages_go(tmp_path: Path) -> None:
    like = {"w": torch.empty(1000, 3, device="meta"), "v": torch.empty(5, device="meta")}
    mapped = MappedTensors.create(tmp_path, like)
    assert torch.equal(mapped["w"], torch.zeros(1000, 3))
    mapped["w"][999] = 7.0
    mapped["v"].fill_(1.0)
    mapped.release("w")
    mapped.release("v", 2, 5)
    assert mapped["w"][999].tolist() == [7.0, 7.0, 7.0]
    assert mapped["v"].tolist() == [1.0] * 5
    mapped.prefetch("w")
    assert not list(tmp_path.iterdir())  # without a name, the file goes with the process


def test_writing_to_a_mapped_checkpoint_leaves_the_file_alone(tmp_path: Path) -> None:
    save_file({"w": torch.ones(4)}, tmp_path / "m.safetensors")
    MappedTensors.open(tmp_path / "m.safetensors")["w"].fill_(2.0)
    assert MappedTensors.open(tmp_path / "m.safetensors")["w"].tolist() == [1.0] * 4


@pytest.mark.parametrize("keep_bytes", [0, 4, 8, 20, -1])
def test_a_truncated_file_is_an_artifact_error(keep_bytes: int, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"w": torch.ones(400)}, path)
    path.write_bytes(path.read_bytes()[:keep_bytes])
    with pytest.raises(ArtifactError, match=r"m\.safetensors: cannot be mapped"):
        MappedTensors.open(path)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
        {"dtype": "F32", "shape": [2], "data_offsets": [-4, 4]},
        {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]},
        json.loads("[" * 70 + "]" * 70),
        {"shape": [2]},
        7,
    ],
)
def test_a_header_that_lies_is_an_artifact_error(entry: object, tmp_path: Path) -> None:
    header = json.dumps({"w": entry}).encode()
    path = tmp_path / "m.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(ArtifactError, match="cannot be mapped"):
        MappedTensors.open(path)
