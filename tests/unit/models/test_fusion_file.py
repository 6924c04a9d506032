"""The fusion in a model directory: written, read, and refused where it does not belong."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from r1ray.errors import ArtifactError
from r1ray.models import load_model, save_model
from r1ray.models.base import import_base
from r1ray.models.fusion_file import FUSION_NAME, attach_fusion, read_fusion
from r1ray.models.quantization import quantize_modules
from tests.fakes import tiny_model, write_tiny_model
from tests.unit.models.test_fusion import (
    TYPES,
    FusionType,
    build_config,
    build_model,
    build_row,
    logits,
    look,
    random_pixels,
)


@pytest.mark.parametrize("is_int8", [False, True])
@pytest.mark.parametrize("kind", TYPES)
def test_a_stored_model_has_the_same_logits(
    tmp_path: Path, kind: FusionType, is_int8: bool
) -> None:
    model = build_model(kind)
    if is_int8:
        quantize_modules(model)
    ids_T, places = build_row(model, 2, 5)
    save_model(model, tmp_path)

    loaded = load_model(tmp_path)

    pixels = random_pixels(1)
    expected = logits(model, ids_T, look(model, pixels, places))
    found = logits(loaded, ids_T, look(loaded, pixels, places))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert read_fusion(tmp_path) == build_config(kind)
    if is_int8:
        weights = load_file(tmp_path / FUSION_NAME)
        assert weights["encoder.patch_proj.weight"].dtype == torch.int8


def test_the_decoder_beside_it_is_one_that_others_read(tmp_path: Path) -> None:
    save_model(build_model("mid"), tmp_path / "sees")
    save_model(tiny_model(), tmp_path / "reads")

    stored = [load_file(tmp_path / name / "model.safetensors") for name in ("sees", "reads")]

    assert stored[0].keys() == stored[1].keys()
    assert all(torch.equal(stored[0][name], stored[1][name]) for name in stored[0])


def test_a_text_model_has_none(tmp_path: Path) -> None:
    save_model(tiny_model(), tmp_path)

    assert read_fusion(tmp_path) is None
    assert load_model(tmp_path).fusion is None


def test_weights_of_another_fusion_are_refused(tmp_path: Path) -> None:
    save_model(build_model("late"), tmp_path)
    weights = load_file(tmp_path / FUSION_NAME)
    weights["o_proj.weight"] = weights["o_proj.weight"][:, :-1].contiguous()
    save_file(weights, tmp_path / FUSION_NAME)

    with pytest.raises(ArtifactError, match=r"o_proj.weight is float of shape \(32, 31\)"):
        load_model(tmp_path)


def test_missing_weights_are_refused(tmp_path: Path) -> None:
    save_model(build_model("late"), tmp_path)
    (tmp_path / FUSION_NAME).unlink()

    with pytest.raises(ArtifactError, match="cannot be read as safetensors"):
        load_model(tmp_path)


def test_a_description_that_is_none_is_refused(tmp_path: Path) -> None:
    save_model(build_model("late"), tmp_path)
    record = json.loads((tmp_path / "r1ray.json").read_text())
    record["fusion"]["patch_size"] = 7
    (tmp_path / "r1ray.json").write_text(json.dumps(record))

    with pytest.raises(ArtifactError, match=r"image_size \(16\) is not a multiple"):
        load_model(tmp_path)


def test_a_base_gets_a_fusion_once(tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "source")
    for name in ("base", "again"):
        (tmp_path / name).mkdir()
    import_base(source, tmp_path / "base", fusion=build_config("mid"), seed=3)

    assert read_fusion(tmp_path / "base") == build_config("mid")
    with pytest.raises(ArtifactError, match=r"leave base.fusion out"):
        import_base(tmp_path / "base", tmp_path / "again", fusion=build_config("mid"))


def test_the_same_seed_gives_the_same_weights() -> None:
    models = [tiny_model() for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        torch.rand(seed)  # whoever drew before
        attach_fusion(model, build_config("early"), seed=seed)
    first, same, other = (model.fusion.proj.weight for model in models)  # type: ignore[union-attr]

    assert torch.equal(first, same)  # type: ignore[arg-type]
    assert not torch.equal(first, other)  # type: ignore[arg-type]
