"""Another basis: the same logits, also for others, and a smaller loss by rounding."""

from pathlib import Path

import pytest
import torch
import transformers

from r1ray.config import load_config
from r1ray.config.fusion import FusionConfig
from r1ray.errors import ArtifactError, ConfigError
from r1ray.models import Decoder, ModelConfig, load_model, save_model
from r1ray.models.base import count_parameters, import_base
from r1ray.models.config import Family
from r1ray.models.fusion_file import attach_fusion
from r1ray.models.memory import FISHER_NAME, memory_path
from r1ray.models.quantization import quantize_modules
from r1ray.models.rotation import rotate
from tests.fakes import tiny_model, write_tiny_model
from tests.unit.oracle import FAMILIES, build_oracle, random_ids, save_oracle

READERS = {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head"}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("is_tied", [False, True])
def test_a_rotated_model_is_the_same_function(
    family: Family, is_tied: bool, tmp_path: Path
) -> None:
    oracle = build_oracle(family, tie_word_embeddings=is_tied)  # its norms have gains
    model = load_model(save_oracle(oracle, tmp_path / "source"))
    count, ids = count_parameters(model), random_ids(2, 24)

    rotate(model)

    save_model(model, tmp_path / "rotated")
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "rotated")
    with torch.inference_mode():
        expected = oracle(ids).logits
        torch.testing.assert_close(model(ids), expected, rtol=0, atol=1e-4)
        torch.testing.assert_close(other(ids).logits, expected, rtol=0, atol=1e-4)
    assert not model.config.tie_embeddings
    assert count_parameters(model) == count + is_tied * 96 * 32
    norms = [item for name, item in model.named_parameters() if "layernorm" in name]
    assert all((item == 1).all() for item in [*norms, model.model.norm.weight])


def test_a_channel_that_stands_out_is_spread_before_it_is_rounded() -> None:
    ids = random_ids(4, 32)

    def build() -> Decoder:
        """One channel is large in every token, and of little weight to what reads it."""
        model = tiny_model()
        with torch.no_grad():
            model.model.embed_tokens.get_parameter("weight")[:, 3] = 40.0
            for name, weight in model.named_parameters():
                if name.split(".")[-2] in READERS:
                    weight[:, 3] *= 0.01
        return model

    with torch.inference_mode():
        expected = build()(ids)
        plain, rotated = build(), build()
        rotate(rotated)
        lost = []
        for model in (plain, rotated):
            quantize_modules(model)
            lost.append(float((model(ids) - expected).norm() / expected.norm()))

    assert lost[1] < 0.6 * lost[0]


def test_the_base_is_rotated_on_import(tmp_path: Path) -> None:
    source, ids = write_tiny_model(tmp_path / "source"), random_ids(1, 12)
    for name in ("plain", "rotated", "again"):
        (tmp_path / name).mkdir()
        import_base(source, tmp_path / name, is_rotated=name != "plain", seed=3)

    plain, rotated, again = (load_model(tmp_path / name) for name in ("plain", "rotated", "again"))

    with torch.inference_mode():
        torch.testing.assert_close(rotated(ids), plain(ids), rtol=0, atol=1e-4)
    assert not torch.equal(rotated.lm_head.weight, plain.lm_head.weight)
    assert torch.equal(rotated.lm_head.weight, again.lm_head.weight)
    assert not ModelConfig.load(tmp_path / "rotated").tie_embeddings


def test_a_checkpoint_in_bf16_is_rotated_in_float32(tmp_path: Path) -> None:
    source, ids = write_tiny_model(tmp_path / "source"), random_ids(1, 12)
    save_model(load_model(source).bfloat16(), source)
    (tmp_path / "target").mkdir()
    import_base(source, tmp_path / "target", is_rotated=True)

    with torch.inference_mode():
        expected = load_model(source, dtype=torch.float32)(ids)
        torch.testing.assert_close(
            load_model(tmp_path / "target")(ids), expected, rtol=0, atol=1e-4
        )


def test_what_knows_the_old_basis_is_refused(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    seeing = tiny_model()
    attach_fusion(seeing, FusionConfig(type="mid", image_size=16, patch_size=8))
    write_tiny_model(tmp_path / "sees")
    save_model(seeing, tmp_path / "sees")
    fisher = memory_path(write_tiny_model(tmp_path / "remembers"), FISHER_NAME)
    fisher.parent.mkdir()
    fisher.write_bytes(b"")

    with pytest.raises(ArtifactError, match=r"sees images already; leave base\.rotate out"):
        import_base(tmp_path / "sees", tmp_path / "target", is_rotated=True)
    with pytest.raises(ArtifactError, match="how much each weight matters"):
        import_base(tmp_path / "remembers", tmp_path / "target", is_rotated=True)
    overrides = ["base.rotate=true", "student={hidden_size: 16}"]
    with pytest.raises(ConfigError, match=r"student\.hidden_size .* base\.rotate"):
        load_config("jobs/configs/tiny.yaml", overrides)
