"""The decoder against transformers' own models, on tiny random weights."""

from pathlib import Path
from typing import Any

import pytest
import torch

from r1ray.models import load_model
from r1ray.models.batch_generation import generate_batch
from tests.unit.oracle import build_oracle, edit_config, random_ids, save_oracle

# Both sides compute in float32 with sums in a different order: a few ulp of logits around 10.
TOLERANCE = 1e-4

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama_tied": ("llama", {"tie_word_embeddings": True}),
    "llama_biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama_wide_heads": ("llama", {"head_dim": 24}),
    "llama_one_kv_head": ("llama", {"num_key_value_heads": 1}),
    "llama_no_groups": ("llama", {"num_key_value_heads": 4}),
    "qwen2": ("qwen2", {}),
    "qwen2_tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3_tied": ("qwen3", {"head_dim": 8, "tie_word_embeddings": True}),
    "qwen3_biases": ("qwen3", {"head_dim": 16, "attention_bias": True}),
}
_FACTORS = {"short_factor": [1.0, 1.1, 1.3, 1.8], "long_factor": [1.0, 2.0, 3.5, 5.0]}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 500_000.0},
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0},
    "yarn": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "rope_theta": 10_000.0,
    },
    "yarn_tuned": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 4.0,
        "beta_slow": 0.5,
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
        "truncate": False,
        "rope_theta": 1_000.0,
    },
    "yarn_attention_factor": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "attention_factor": 1.3,
        "rope_theta": 10_000.0,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
        "rope_theta": 10_000.0,
    },
    "longrope": {
        "rope_type": "longrope",
        "original_max_position_embeddings": 32,
        "rope_theta": 10_000.0,
        **_FACTORS,
    },
    "longrope_factor": {
        "rope_type": "longrope",
        "original_max_position_embeddings": 32,
        "factor": 3.0,
        "rope_theta": 10_000.0,
        **_FACTORS,
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers(variant: str, tmp_path: Path) -> None:
    family, changes = VARIANTS[variant]
    oracle = build_oracle(family, **changes)
    model = load_model(save_oracle(oracle, tmp_path))
    input_ids = random_ids(3, 20)
    with torch.inference_mode():
        torch.testing.assert_close(
            model(input_ids), oracle(input_ids).logits, atol=TOLERANCE, rtol=0
        )


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_continuation_equals_transformers_token_for_token(
    variant: str, tmp_path: Path
) -> None:
    family, changes = VARIANTS[variant]
    oracle = build_oracle(family, max_position_embeddings=128, **changes)
    model = load_model(save_oracle(oracle, tmp_path))
    prompt = random_ids(1, 9)
    expected = oracle.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=64,
        do_sample=False,
        eos_token_id=None,
    )[0, 9:].tolist()
    [found] = generate_batch(
        model,
        prompt.tolist(),
        max_new_tokens=64,
        stop_token_ids=frozenset(),
        max_concurrency=1,
    )
    assert found == expected
    assert len(found) == 64


# 20 tokens stay within every trained length above; 90 exceed the 64 of `dynamic` and the 32 of
# `longrope`, where the frequencies depend on the length.
@pytest.mark.parametrize("num_tokens", [20, 90])
@pytest.mark.parametrize("rope", ROPES)
def test_logits_equal_transformers_for_every_rope_type(
    rope: str, num_tokens: int, tmp_path: Path
) -> None:
    oracle = build_oracle("llama", rope_parameters=ROPES[rope])
    model = load_model(save_oracle(oracle, tmp_path))
    input_ids = random_ids(2, num_tokens)
    with torch.inference_mode():
        torch.testing.assert_close(
            model(input_ids), oracle(input_ids).logits, atol=TOLERANCE, rtol=0
        )


@pytest.mark.parametrize("rope", ROPES)
def test_rope_scaling_of_older_checkpoints_reads_like_rope_parameters(
    rope: str, tmp_path: Path
) -> None:
    save_oracle(build_oracle("llama", rope_parameters=ROPES[rope]), tmp_path)
    recent = load_model(tmp_path)
    scaling = dict(ROPES[rope])
    theta = scaling.pop("rope_theta")
    scaling["type"] = scaling.pop("rope_type")
    edit_config(tmp_path, rope_parameters=None, rope_theta=theta, rope_scaling=scaling)
    older = load_model(tmp_path)
    assert older.config == recent.config
    input_ids = random_ids(1, 70)
    with torch.inference_mode():
        assert torch.equal(older(input_ids), recent(input_ids))


def test_original_length_beside_the_scaling_has_priority(tmp_path: Path) -> None:
    """Phi-like configurations keep it at the top level; transformers gives it priority."""
    save_oracle(build_oracle("llama", rope_parameters=ROPES["longrope"]), tmp_path)
    edit_config(tmp_path, original_max_position_embeddings=48)
    config = load_model(tmp_path).config
    assert config.rope.parameters["original_max_position_embeddings"] == 48


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_greedy_continuation_beyond_the_trained_length_equals_transformers(
    rope: str, tmp_path: Path
) -> None:
    oracle = build_oracle("llama", rope_parameters=ROPES[rope])
    model = load_model(save_oracle(oracle, tmp_path))
    prompt = random_ids(1, 28)
    expected = oracle.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=64,
        do_sample=False,
        eos_token_id=None,
    )[0, 28:].tolist()
    [found] = generate_batch(
        model, prompt.tolist(), max_new_tokens=64, stop_token_ids=frozenset(), max_concurrency=1
    )
    assert found == expected


def test_padding_on_the_right_leaves_earlier_logits_alone(tmp_path: Path) -> None:
    model = load_model(save_oracle(build_oracle("qwen3", head_dim=16), tmp_path))
    short, padded = random_ids(1, 12), torch.zeros(1, 20, dtype=torch.long)
    padded[:, :12] = short
    with torch.inference_mode():
        torch.testing.assert_close(model(padded)[:, :12], model(short), atol=1e-5, rtol=0)


def test_a_later_token_never_changes_earlier_logits(tmp_path: Path) -> None:
    model = load_model(save_oracle(build_oracle("llama"), tmp_path))
    first, second = random_ids(1, 16), random_ids(1, 16)
    second[0, 10:] = random_ids(6, seed=7)
    with torch.inference_mode():
        before, after = model(first), model(second)
    torch.testing.assert_close(after[:, :10], before[:, :10], atol=1e-5, rtol=0)
    assert not torch.allclose(after[:, 10:], before[:, 10:], atol=1e-2)


def test_bfloat16_and_float32_logits_agree_to_bfloat16_precision(tmp_path: Path) -> None:
    save_oracle(build_oracle("llama"), tmp_path)
    input_ids = random_ids(1, 16)
    with torch.inference_mode():
        exact = load_model(tmp_path)(input_ids)
        rounded = load_model(tmp_path, dtype=torch.bfloat16)(input_ids)
    assert rounded.dtype == torch.bfloat16
    # bfloat16 keeps 8 bits: relative 2^-8 per operation over two layers.
    error = (rounded.float() - exact).norm() / exact.norm()
    assert error < 0.03
