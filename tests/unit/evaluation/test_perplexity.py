"""Perplexity by windows."""

import math

import pytest
import torch
import torch.nn.functional as F

from r1ray.data.texts import read_english
from r1ray.evaluation.perplexity import measure_perplexity
from r1ray.models.tokenizer import Tokenizer
from tests.fakes import VOCAB_SIZE, tiny_model, write_tiny_model


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_tiny_model(tmp_path_factory.mktemp("model")))


def test_uniform_logits_have_the_vocabulary_as_perplexity(tokenizer: Tokenizer) -> None:
    model = tiny_model()
    torch.nn.init.zeros_(model.lm_head.weight)
    measured = measure_perplexity(model, tokenizer, read_english(), max_tokens=200, window=64)
    assert measured == pytest.approx(VOCAB_SIZE, rel=1e-4)


def test_windows_are_scored_apart_and_their_first_tokens_not_at_all(tokenizer: Tokenizer) -> None:
    model, text = tiny_model(), read_english()
    ids = torch.tensor(tokenizer.encode(text)[:100])
    losses = []
    for window in (ids[:64], ids[64:]):
        with torch.inference_mode():
            logits = model(window[None])[0, :-1]
        losses.append(F.cross_entropy(logits, window[1:], reduction="none"))
    expected = math.exp(torch.cat(losses).mean())
    measured = measure_perplexity(model, tokenizer, text, max_tokens=100, window=64)
    assert measured == pytest.approx(expected, rel=1e-5)


def test_english_is_the_same_text_every_time() -> None:
    text = read_english()
    assert len(text) > 300_000
    assert text == read_english()
    assert "statement" in text
