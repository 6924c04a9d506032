"""Models on CUDA, whole and streamed from the host, answer as they do on a CPU."""

import dataclasses

import pytest
import torch

from r1ray.config.schema import Scheme
from r1ray.errors import BudgetError
from r1ray.evaluation.latency import measure_latency
from r1ray.models import Decoder
from r1ray.models.batch_generation import generate_batch
from r1ray.models.config import Family
from r1ray.models.quantization import fake_quantize_modules, quantize_modules, tie_head
from r1ray.models.tiered import move_to_device
from tests.fakes import tiny_config, tiny_model
from tests.unit.oracle import FAMILIES, random_ids

CUDA = torch.device("cuda")
MIB = 1 << 20


@torch.inference_mode()
def _logits(model: Decoder, ids: torch.Tensor) -> torch.Tensor:
    return model(ids.to(model.model.norm.weight.device)).cpu()


@pytest.mark.parametrize("tie_embeddings", [False, True])
@pytest.mark.parametrize("is_int8", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_greedy_answers_are_the_same(
    family: Family, is_int8: bool, tie_embeddings: bool
) -> None:
    models = [tiny_model(family, tie_embeddings=tie_embeddings) for _ in range(2)]
    for model in models:
        if is_int8:
            quantize_modules(model)
    models[1].to(CUDA)
    tie_head(models[1])
    ids = random_ids(2, 20)
    # An activation at the middle between two integers may be rounded either way.
    torch.testing.assert_close(
        _logits(models[1], ids), _logits(models[0], ids), rtol=0, atol=2e-2 if is_int8 else 1e-4
    )
    prompts = [[5, 6, 7], [8, 9], list(range(10, 40))]
    if not is_int8:
        answers = [
            generate_batch(
                model, prompts, max_new_tokens=8, stop_token_ids=frozenset(), max_concurrency=2
            )
            for model in models
        ]
        assert answers[0] == answers[1]


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8"])
def test_the_served_model_is_the_fake_quant_one(scheme: Scheme) -> None:
    trained, served = tiny_model().to(CUDA), tiny_model()
    fake_quantize_modules(trained, scheme)
    quantize_modules(served, scheme)
    ids = random_ids(2, 20)
    found = _logits(served.to(CUDA), ids)
    torch.testing.assert_close(found, _logits(trained, ids), rtol=0, atol=1e-4)


def _wide_model(*, tie_embeddings: bool, is_int8: bool) -> Decoder:
    """Twelve layers of about 1.3 million parameters each."""
    config = dataclasses.replace(
        tiny_config(tie_embeddings=tie_embeddings),
        hidden_size=256,
        intermediate_size=1024,
        head_dim=64,
        num_layers=12,
    )
    torch.manual_seed(0)
    model = Decoder(config).eval()
    if is_int8:
        quantize_modules(model)
    return model


@pytest.mark.parametrize("tie_embeddings", [False, True])
@pytest.mark.parametrize("is_int8", [False, True])
@pytest.mark.parametrize("share", [0.5, 0.8, 4.0])
def test_a_model_larger_than_its_budget_is_streamed_from_the_host(
    share: float, is_int8: bool, tie_embeddings: bool
) -> None:
    plain, streamed = (
        _wide_model(tie_embeddings=tie_embeddings, is_int8=is_int8) for _ in range(2)
    )
    size = sum(item.nbytes for item in plain.state_dict().values())
    plain.to(CUDA)
    tie_head(plain)
    ids = random_ids(1, 6)
    expected = _logits(plain, ids)  # also loads the libraries' own memory
    plain.cpu()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    budget = int(share * size)
    placement = move_to_device(streamed, CUDA, budget_bytes=budget)
    assert bool(placement.static) == (share < 1)
    for _ in range(3):
        assert torch.equal(_logits(streamed, ids), expected)
    assert torch.cuda.max_memory_allocated() - before <= budget
    assert torch.cuda.memory_allocated() - before <= placement.core_bytes + 2 * MIB
    assert measure_latency(streamed, repeats=1).decode_ms_per_token > 0


def test_a_budget_below_the_largest_parts_is_refused() -> None:
    with pytest.raises(BudgetError, match="raise it to at least"):
        move_to_device(_wide_model(tie_embeddings=False, is_int8=False), CUDA, budget_bytes=4 * MIB)
