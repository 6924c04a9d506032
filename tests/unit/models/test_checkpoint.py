import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from r1ray.errors import ArtifactError
from r1ray.models import ModelConfig, load_model, save_model
from r1ray.models.checkpoint import copy_tokenizer
from r1ray.models.config import RECORD_NAME, Family
from r1ray.models.quantization import quantize_modules
from tests.fakes import tiny_config, tiny_model, write_tiny_model
from tests.unit.oracle import FAMILIES, build_oracle, edit_config, random_ids, save_oracle


@pytest.mark.parametrize("tie_embeddings", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_loads_in_transformers_with_equal_logits(
    family: Family, tie_embeddings: bool, tmp_path: Path
) -> None:
    model = tiny_model(family, tie_embeddings=tie_embeddings)
    save_model(model, tmp_path)
    load: Any = transformers.AutoModelForCausalLM.from_pretrained
    oracle, report = load(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    input_ids = random_ids(2, 24)
    with torch.inference_mode():
        # float32 on both sides, sums in a different order.
        torch.testing.assert_close(model(input_ids), oracle(input_ids).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 32},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    ],
    ids=lambda rope: rope["rope_type"],
)  # fmt: skip
def test_a_scaled_rope_survives_a_round_trip_into_transformers(
    rope: dict[str, Any], tmp_path: Path
) -> None:
    parameters = {**rope, "rope_theta": 10_000.0}
    oracle = build_oracle("llama", rope_parameters=parameters, attention_bias=True)
    model = load_model(save_oracle(oracle, tmp_path / "first"))
    save_model(model, tmp_path / "second")
    assert load_model(tmp_path / "second").config == model.config
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "second").eval()
    input_ids = random_ids(1, 40)
    with torch.inference_mode():
        assert torch.equal(again(input_ids).logits, oracle(input_ids).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_round_trip_keeps_every_bit_and_the_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_model("qwen2").to(dtype)
    save_model(model, tmp_path)
    again = load_model(tmp_path)
    assert again.config == model.config
    stored, found = model.state_dict(), again.state_dict()
    assert stored.keys() == found.keys()
    for name, tensor in stored.items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name], tensor), name


def test_dtype_is_applied_on_loading(tmp_path: Path) -> None:
    save_model(tiny_model(), tmp_path)
    model = load_model(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_tied_embeddings_are_stored_once_and_shared_after_loading(tmp_path: Path) -> None:
    save_model(tiny_model(tie_embeddings=True), tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    model = load_model(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_redundant_tied_head_and_rotary_buffers_of_old_checkpoints_are_ignored(
    tmp_path: Path,
) -> None:
    model = tiny_model(tie_embeddings=True)
    save_model(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = torch.zeros_like(tensors["model.embed_tokens.weight"])
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, tmp_path / "model.safetensors")
    input_ids = random_ids(1, 8)
    with torch.inference_mode():
        assert torch.equal(load_model(tmp_path)(input_ids), model(input_ids))


def _shard(path: Path) -> dict[str, str]:
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for number, part in enumerate((names[:7], names[7:]), start=1):
        shard = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, path / shard)
        weight_map |= dict.fromkeys(part, shard)
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return weight_map


def test_sharded_safetensors_load_like_one_file(tmp_path: Path) -> None:
    model = tiny_model()
    save_model(model, tmp_path)
    _shard(tmp_path)
    input_ids = random_ids(1, 8)
    with torch.inference_mode():
        assert torch.equal(load_model(tmp_path)(input_ids), model(input_ids))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    save_model(tiny_model(), tmp_path)
    _shard(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ArtifactError, match="model-00002-of-00002"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "index",
    ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": "../b"}}',
     '{"weight_map": {"a": 1, "b": "x"}}'],
)  # fmt: skip
def test_a_damaged_index_is_named(index: str, tmp_path: Path) -> None:
    save_model(tiny_model(), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ArtifactError, match=r"index\.json"):
        load_model(tmp_path)


def _rewrite(path: Path, **changes: torch.Tensor | None) -> None:
    file = path / "model.safetensors"
    tensors = {**load_file(file), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file)


@pytest.mark.parametrize(
    ("name", "tensor", "complaint"),
    [
        ("model.norm.weight", None, "missing model.norm.weight"),
        ("model.extra.weight", torch.ones(2), "unexpected model.extra.weight"),
        ("model.norm.weight", torch.ones(31), r"model.norm.weight has shape \(31,\).*\(32,\)"),
        ("model.norm.weight", torch.ones(32, dtype=torch.int8), "model.norm.weight is torch.int8"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    name: str, tensor: torch.Tensor | None, complaint: str, tmp_path: Path
) -> None:
    save_model(tiny_model(), tmp_path)
    _rewrite(tmp_path, **{name: tensor})
    with pytest.raises(ArtifactError, match=complaint):
        load_model(tmp_path)


def test_many_problems_are_counted_and_not_all_listed(tmp_path: Path) -> None:
    save_model(tiny_model(), tmp_path)
    edit_config(tmp_path, num_hidden_layers=4)
    with pytest.raises(ArtifactError, match=r"missing model\.layers\.2.*and 13 more"):
        load_model(tmp_path)


@pytest.mark.parametrize("keep_bytes", [0, 4, 100, -1])
def test_truncated_weights_are_named(keep_bytes: int, tmp_path: Path) -> None:
    save_model(tiny_model(), tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep_bytes])
    with pytest.raises(ArtifactError, match=r"model\.safetensors"):
        load_model(tmp_path)


def test_a_directory_without_weights_or_configuration_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"config\.json"):
        load_model(tmp_path)
    save_model(tiny_model(), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"neither model\.safetensors nor"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"model_type": "gpt2"}, "'gpt2' is not one of llama, qwen2, qwen3"),
        ({"model_type": ["llama"]}, "is not one of"),
        ({"model_type": None}, "model_type"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": "32"}, "hidden_size is '32'"),
        ({"num_hidden_layers": 0}, "num_layers is 0"),
        ({"num_hidden_layers": 10**9}, "and no model has more than 4096"),
        ({"vocab_size": 10**4000}, "and no model has more than"),
        ({"vocab_size": -3}, "vocab_size is -3"),
        ({"num_attention_heads": 3}, r"num_attention_heads \(3\) is not a multiple"),
        ({"head_dim": 7}, r"head_dim \(7\) is odd"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not silu"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"rope_parameters": {"rope_type": "mrope"}}, "rope type 'mrope' is not one of default"),
        ({"rope_parameters": {"rope_type": "linear"}}, "needs a positive factor, got None"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0}}, "positive factor, got 0"),
        (
            {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0]}},
            "short_factor is .* not a list of 4 numbers",
        ),
        ({"rope_parameters": [1]}, "wrong type"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_configurations_that_cannot_run_say_what_is_wrong(
    changes: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    save_model(tiny_model(), tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(ArtifactError, match=complaint) as caught:
        load_model(tmp_path)
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '"x"', "\x00", "[" * 100_000])
def test_a_configuration_that_is_no_json_object_is_an_artifact_error(
    text: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"config\.json"):
        ModelConfig.load(tmp_path)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2)
    ),
    max_leaves=4,
)
_KEYS = [
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "eos_token_id",
    "partial_rotary_factor",
    "original_max_position_embeddings",
    "rms_norm_eps",
]


def test_no_attention_heads_are_named(tmp_path: Path) -> None:
    raw = {**tiny_config().to_hf(), "num_attention_heads": 0, "head_dim": None}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ArtifactError, match="num_heads is 0, not a whole number of at least 1"):
        ModelConfig.load(tmp_path)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(changes=st.dictionaries(st.sampled_from(_KEYS), _JSON, max_size=3))
def test_any_configuration_loads_or_is_an_artifact_error(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    raw = {**tiny_config().to_hf(), **changes}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    try:
        config = ModelConfig.load(tmp_path)
    except ArtifactError:
        return
    assert config.head_dim % 2 == 0


@pytest.mark.parametrize("tie_embeddings", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_int8_model_round_trips_with_identical_logits(
    family: Family, tie_embeddings: bool, tmp_path: Path
) -> None:
    model = tiny_model(family, tie_embeddings=tie_embeddings)
    quantize_modules(model)
    save_model(model, tmp_path, provenance={"base": "tiny"})
    record = json.loads((tmp_path / RECORD_NAME).read_text())
    assert record == {"quantization": {"scheme": "w8a8"}, "provenance": {"base": "tiny"}}
    stored = load_file(tmp_path / "model.safetensors")
    assert stored["model.layers.0.mlp.up_proj.weight"].dtype == torch.int8
    assert ("lm_head.weight" in stored) == (not tie_embeddings)
    again = load_model(tmp_path)
    input_ids = random_ids(2, 16)
    with torch.inference_mode():
        assert torch.equal(again(input_ids), model(input_ids))


def test_int8_logits_stay_close_to_the_float_model() -> None:
    exact, quantized = tiny_model(), tiny_model()
    quantize_modules(quantized)
    input_ids = random_ids(2, 24)
    with torch.inference_mode():
        expected, found = exact(input_ids), quantized(input_ids)
    # Weights and activations are each rounded to 1/127 of a row's largest value.
    assert (found - expected).norm() / expected.norm() < 0.05


def test_a_quantized_model_is_a_quarter_of_the_bytes(tmp_path: Path) -> None:
    model = tiny_model()
    save_model(model, tmp_path / "float")
    quantize_modules(model)
    save_model(model, tmp_path / "int8")
    sizes = {
        kind: sum(
            tensor.numel() * tensor.element_size()
            for tensor in load_file(tmp_path / kind / "model.safetensors").values()
        )
        for kind in ("float", "int8")
    }
    # The scales add one float a row of 32: a share of 4/32 at this width.
    assert sizes["int8"] < 0.3 * sizes["float"]


def test_quantizing_twice_is_refused() -> None:
    model = tiny_model()
    quantize_modules(model)
    with pytest.raises(ArtifactError, match="already quantized"):
        quantize_modules(model)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "no quantization scheme"),
        ("[]", "no quantization scheme"),
        ("{}", "no quantization scheme"),
        ('{"quantization": {"scheme": "w2a2"}}', "scheme 'w2a2' is none of w8a8, w4a8"),
    ],
)
def test_an_unknown_quantization_is_named(text: str, complaint: str, tmp_path: Path) -> None:
    save_model(tiny_model(), tmp_path)
    (tmp_path / RECORD_NAME).write_text(text)
    with pytest.raises(ArtifactError, match=complaint) as caught:
        load_model(tmp_path)
    assert RECORD_NAME in str(caught.value)


def test_copy_tokenizer_takes_the_tokenizer_and_leaves_the_weights(tmp_path: Path) -> None:
    source, target = write_tiny_model(tmp_path / "source"), tmp_path / "target"
    target.mkdir()
    copy_tokenizer(source, target)
    names = {file.name for file in target.iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json"} <= names
    assert not names & {"config.json", "model.safetensors"}
