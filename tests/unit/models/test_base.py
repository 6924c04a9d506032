import json
from pathlib import Path
from typing import Literal

import pytest
import torch
import transformers

from r1ray.config.schema import ContextConfig
from r1ray.errors import ArtifactError
from r1ray.models import ModelConfig, load_model, save_model
from r1ray.models.base import count_parameters, import_base, resolve_source
from r1ray.models.quantization import quantize_modules
from r1ray.models.tokenizer import Tokenizer
from tests.fakes import tiny_model, write_tiny_model
from tests.unit.oracle import random_ids


def test_a_directory_is_imported_with_its_tokenizer_in_float32(tmp_path: Path) -> None:
    source, target = write_tiny_model(tmp_path / "source"), tmp_path / "target"
    save_model(tiny_model().bfloat16(), source)
    target.mkdir()
    metrics = import_base(resolve_source(str(source)), target)
    original, imported = load_model(source, dtype=torch.float32), load_model(target)
    input_ids = random_ids(1, 12)
    with torch.inference_mode():
        assert torch.equal(imported(input_ids), original(input_ids))
    assert {parameter.dtype for parameter in imported.parameters()} == {torch.float32}
    assert metrics == {"parameters": count_parameters(imported), "source": "source"}
    assert Tokenizer(target).encode("the") == Tokenizer(source).encode("the")


@pytest.mark.parametrize(("kind", "positions"), [("yarn", 512), ("dynamic", 128)])
def test_positions_are_scaled_for_longer_contexts(
    kind: Literal["yarn", "dynamic"], positions: int, tmp_path: Path
) -> None:
    source, target = write_tiny_model(tmp_path / "source"), tmp_path / "target"
    save_model(tiny_model(max_positions=128), source)
    target.mkdir()
    import_base(source, target, context=ContextConfig(type=kind, factor=4.0))
    config = ModelConfig.load(target)
    assert (config.rope.type, config.max_positions, config.max_context) == (kind, positions, 512)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(target)
    input_ids = random_ids(1, 300)
    with torch.inference_mode():
        found, expected = load_model(target)(input_ids), oracle(input_ids).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        assert not torch.allclose(found, load_model(source)(input_ids), atol=1e-2)
    again = tmp_path / "again"
    again.mkdir()
    with pytest.raises(ArtifactError, match=rf"scales its positions already \({kind}\)"):
        import_base(target, again, context=ContextConfig(type="yarn", factor=2.0))


def test_tied_parameters_count_once() -> None:
    tied, untied = tiny_model(tie_embeddings=True), tiny_model()
    assert count_parameters(untied) - count_parameters(tied) == 300 * 32


def test_a_quantized_source_is_refused(tmp_path: Path) -> None:
    model = tiny_model()
    quantize_modules(model)
    save_model(model, tmp_path)
    with pytest.raises(ArtifactError, match="training starts from a float model"):
        import_base(tmp_path, tmp_path / "target")


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("/no/such/place", "no such file or directory"),
        ("/dev/zero", "no such file or directory"),
        ("package:no_such_package_at_all", "no Python package 'no_such_package_at_all'"),
        ("package:", "no Python package ''"),
        ("package:../x", "no Python package"),
        ("package:json", r"0 \.gguf files"),
    ],
)
def test_a_source_that_is_not_there_is_named(source: str, complaint: str) -> None:
    with pytest.raises(ArtifactError, match=complaint) as caught:
        resolve_source(source)
    assert repr(source) in str(caught.value)


def _edit_json(path: Path, **changes: object) -> None:
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: item for name, item in values.items() if item is not None}))


def test_a_source_without_a_tokenizer_is_refused_by_its_own_name(tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "source")
    for file in (*source.glob("tokenizer*"), *source.glob("*.jinja")):
        file.unlink()
    (tmp_path / "target").mkdir()
    with pytest.raises(ArtifactError, match=rf"base\.source {source}: .*no usable tokenizer"):
        import_base(source, tmp_path / "target")


def test_a_tokenizer_without_an_end_of_turn_token_is_refused(tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "source")
    _edit_json(source / "tokenizer_config.json", eos_token=None)
    (tmp_path / "target").mkdir()
    with pytest.raises(ArtifactError, match="has no eos_token"):
        import_base(source, tmp_path / "target")


def test_a_tokenizer_that_exceeds_the_models_vocabulary_is_refused(tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "source")
    tokens = json.loads((source / "tokenizer.json").read_text())["added_tokens"]
    extra = {**tokens[0], "id": 300, "content": "<think>"}
    _edit_json(source / "tokenizer.json", added_tokens=[*tokens, extra])
    (tmp_path / "target").mkdir()
    with pytest.raises(
        ArtifactError, match="tokenizer has id 300, the model's vocabulary ends at 299"
    ):
        import_base(source, tmp_path / "target")
