"""What only a CUDA device can show; the same code's CPU side is tested in tests/unit."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _needs_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("NO GPU: the CUDA paths of tests/gpu are NOT TESTED here")
