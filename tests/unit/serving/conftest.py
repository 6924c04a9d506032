"""What tests of answers share."""

import pytest

from r1ray.models.tokenizer import Tokenizer
from tests.fakes import write_tiny_model


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_tiny_model(tmp_path_factory.mktemp("tiny")))
