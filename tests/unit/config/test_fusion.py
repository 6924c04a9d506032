"""What a fusion may be, and what it goes with."""

import pytest

from r1ray.config import load_config
from r1ray.config.fusion import FusionConfig
from r1ray.errors import ConfigError

FUSION = "base.fusion={type: mid}"


@pytest.mark.parametrize(("kind", "num_tokens"), [("early", 16), ("mid", 1), ("late", 1)])
def test_an_image_takes_as_many_tokens_as_patches_or_one(kind: str, num_tokens: int) -> None:
    config = FusionConfig(type=kind, image_size=64, patch_size=16)  # type: ignore[arg-type]

    assert (config.num_patches, config.num_image_tokens) == (16, num_tokens)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("base.fusion={type: mid, patch_size: 7}", r"image_size \(64\) is not a multiple"),
        ("base.fusion={type: mid, encoder_heads: 5}", r"encoder_width \(128\) is not a multiple"),
        ("base.fusion={type: late, layers: [0]}", "layers go with type mid, not with late"),
        ("base.fusion={type: middle}", "early"),
        ("base.fusion={type: mid, patch: 8}", "patch"),
    ],
)
def test_a_fusion_that_there_cannot_be_is_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config("jobs/configs/tiny.yaml", [override])


@pytest.mark.parametrize(
    ("override", "name"),
    [
        ("student={layers: [0]}", "student"),
        ("distill={teacher: x}", "distill"),
        ("compress.scheme=codebook4", "compress.scheme: codebook4"),
        ("compress.exports=[gguf]", "compress.exports"),
        ("serve.budget_mib=64", "budget_mib in serve"),
        ("serve.groups=[{name: a, budget_mib: 64}]", "budget_mib in serve"),
        ("serve.backend=openvino", "backend openvino in serve"),
        ("serve.groups=[{name: a}, {name: b, backend: openvino}]", "backend openvino in serve"),
    ],
)
def test_what_a_fusion_does_not_go_with_is_named(override: str, name: str) -> None:
    with pytest.raises(ConfigError, match=f"base.fusion does not go with {name}"):
        load_config("jobs/configs/tiny.yaml", [FUSION, "train.fake_quant=null", override])


def test_a_frozen_decoder_wants_images_to_learn_from() -> None:
    with pytest.raises(ConfigError, match=r"prepare\.sources has none"):
        load_config("jobs/configs/tiny.yaml", [FUSION, "train.freeze_decoder=true"])


def test_sources_say_whether_they_have_images() -> None:
    text = load_config("jobs/configs/tiny.yaml")
    images = load_config(
        "jobs/configs/tiny.yaml", ["prepare.sources=[{type: images, paths: [a.parquet]}]"]
    )

    assert (text.prepare.has_images, images.prepare.has_images) == (False, True)
