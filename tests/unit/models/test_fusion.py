"""Early, mid and late fusion: what tokens see of images, in one forward, in pieces and in INT8."""

import dataclasses

import pytest
import torch
from torch import Tensor

from r1ray.config.fusion import FusionConfig, FusionType
from r1ray.errors import ConfigError, ShapeError
from r1ray.models import Decoder
from r1ray.models.fusion import PlacedImages, gather_images
from r1ray.models.fusion_file import attach_fusion
from r1ray.models.kv_cache import KVCache
from r1ray.models.quantization import fake_quantize_modules, quantize_modules
from tests.fakes import VOCAB_SIZE, tiny_config, tiny_model

TYPES: tuple[FusionType, ...] = ("early", "mid", "late")
# Float32 sums in another order: some ulp of logits around 10.
TOLERANCE = 2e-5


def build_config(kind: FusionType, **changes: object) -> FusionConfig:
    config = FusionConfig(
        type=kind,
        image_size=16,
        patch_size=8,
        encoder_width=16,
        encoder_heads=2,
        encoder_mlp=24,
        encoder_layers=1,
    )
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]


def build_model(kind: FusionType, **changes: object) -> Decoder:
    """With gates half open, so that a picture changes something."""
    model = tiny_model()
    attach_fusion(model, build_config(kind, **changes))
    assert model.fusion is not None
    with torch.no_grad():
        for name, parameter in model.fusion.named_parameters():
            if name.endswith("gate"):
                parameter.fill_(0.5)
            if kind == "late" and name == "o_proj.weight":
                parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(1))
            if name in ("proj.weight", "marker_D"):
                parameter.mul_(20)
    return model


def random_pixels(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 16, 16), generator=generator).to(torch.uint8)


def look(model: Decoder, pixels_I3SS: Tensor, places: list[int]) -> PlacedImages:
    assert model.fusion is not None
    with torch.no_grad():
        return PlacedImages(model.fusion.remember(pixels_I3SS), places)


def build_row(model: Decoder, *parts: int) -> tuple[Tensor, list[int]]:
    """Words between images: (ids [T], places); `parts` are the numbers of words."""
    assert model.fusion is not None
    ids: list[int] = []
    places = []
    for index, count in enumerate(parts):
        if index:
            places.append(len(ids))
            ids += [-1] * model.fusion.config.num_image_tokens
        ids += [(7 * (index + 3) + 11 * at) % (VOCAB_SIZE - 3) + 3 for at in range(count)]
    return torch.tensor(ids), places


def logits(model: Decoder, ids_T: Tensor, placed: PlacedImages) -> Tensor:
    with torch.no_grad():
        return model(ids_T[None], images=gather_images([placed]))[0]


@pytest.mark.parametrize("kind", TYPES)
def test_an_image_changes_what_follows_it_and_nothing_before(kind: FusionType) -> None:
    model = build_model(kind)
    ids_T, places = build_row(model, 5, 6)

    one, other = (
        logits(model, ids_T, look(model, random_pixels(1, seed), places)) for seed in (0, 1)
    )

    torch.testing.assert_close(one[:5], other[:5], rtol=0, atol=0)
    later = places[0] + model.fusion.config.num_image_tokens  # type: ignore[union-attr]
    assert ((one[later:] - other[later:]).abs().amax(-1) > 1e-3).all()


@pytest.mark.parametrize("kind", TYPES)
def test_a_later_image_is_not_seen_by_the_tokens_between(kind: FusionType) -> None:
    model = build_model(kind)
    ids_T, places = build_row(model, 2, 4, 3)
    first, second, third = (random_pixels(1, seed) for seed in (0, 1, 2))

    one = logits(model, ids_T, look(model, torch.cat([first, second]), places))
    other = logits(model, ids_T, look(model, torch.cat([first, third]), places))

    torch.testing.assert_close(one[: places[1]], other[: places[1]], rtol=0, atol=1e-6)
    assert (one[-1] - other[-1]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", TYPES)
def test_rows_of_a_batch_have_the_logits_that_they_have_alone(kind: FusionType) -> None:
    model = build_model(kind)
    long_T, long_places = build_row(model, 2, 4, 3)
    short_T, short_places = build_row(model, 1, 5)
    text_T = torch.arange(3, 9)
    rows = [
        (long_T, look(model, random_pixels(2, 3), long_places)),
        (short_T, look(model, random_pixels(1, 4), short_places)),
        (text_T, None),
    ]
    width = max(len(ids) for ids, _ in rows)
    ids_BT = torch.stack([torch.nn.functional.pad(ids, (0, width - len(ids))) for ids, _ in rows])

    with torch.no_grad():
        context = gather_images([placed for _, placed in rows])
        together = model(ids_BT, images=context)

        for (ids, placed), found in zip(rows, together, strict=True):
            alone = model(ids[None]) if placed is None else logits(model, ids, placed)[None]
            torch.testing.assert_close(found[: len(ids)], alone[0], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kind", TYPES)
def test_a_packed_row_keeps_images_in_their_documents(kind: FusionType) -> None:
    model = build_model(kind)
    first_T, first_places = build_row(model, 1, 5)
    second_T, second_places = build_row(model, 2, 4)
    text_T = torch.arange(3, 9)
    images = look(model, random_pixels(2, 5), [0, 0])
    lengths = [len(first_T), len(text_T), len(second_T)]
    starts = [0, lengths[0], lengths[0] + lengths[1]]
    placed = PlacedImages(
        images.memory_IPF,
        [first_places[0], starts[2] + second_places[0]],
        [lengths[0], sum(lengths)],
    )

    with torch.no_grad():
        packed = model(
            torch.cat([first_T, text_T, second_T])[None],
            document_lengths=lengths,
            images=gather_images([placed]),
        )[0].split(lengths)
        first = logits(model, first_T, PlacedImages(images.memory_IPF[:1], first_places))
        second = logits(model, second_T, PlacedImages(images.memory_IPF[1:], second_places))

        torch.testing.assert_close(packed[0], first, rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(packed[1], model(text_T[None])[0], rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(packed[2], second, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("is_int8", [False, True])
@pytest.mark.parametrize("kind", TYPES)
def test_a_prompt_read_in_pieces_over_a_cache_gives_the_same_logits(
    kind: FusionType, is_int8: bool
) -> None:
    model = build_model(kind)
    if is_int8:
        quantize_modules(model)
    ids_T, places = build_row(model, 3, 9)
    placed = look(model, random_pixels(1), places)
    context = gather_images([placed])
    whole = logits(model, ids_T, placed)

    with torch.inference_mode():
        cache = KVCache(model.config, max_rows=1, max_tokens=64, dtype=torch.float32)
        cache.add_rows(1)
        for piece in ids_T.split([4, 3, len(ids_T) - 8, 1]):  # cut inside the image, and decoding
            rows = cache.active()
            found = model.next_logits(piece[None], rows, [len(piece) - 1], images=context)[0]
            rows.advance([len(piece)])

    # INT8: activations that differ in the last ulp may round to the next integer.
    torch.testing.assert_close(found, whole[-1], rtol=0, atol=0.05 if is_int8 else TOLERANCE)


@pytest.mark.parametrize("kind", ["mid", "late"])
def test_an_untrained_fusion_leaves_the_text_as_it_was(kind: FusionType) -> None:
    model, text = tiny_model(), tiny_model()
    attach_fusion(model, build_config(kind))
    ids_T, places = build_row(model, 4, 6)
    marker_T = torch.where(ids_T < 0, 0, ids_T)
    with torch.no_grad():
        model.fusion.marker_D.copy_(text.model.embed_tokens.get_parameter("weight")[0])  # type: ignore[union-attr, operator]

        found = logits(model, ids_T, look(model, random_pixels(1), places))

        torch.testing.assert_close(found, text(marker_T[None])[0], rtol=0, atol=0)


@pytest.mark.parametrize("kind", TYPES)
def test_int8_gives_nearly_the_logits_of_fake_quantization(kind: FusionType) -> None:
    trained, served = build_model(kind), build_model(kind)
    fake_quantize_modules(trained, "w8a8")
    quantize_modules(served)
    ids_T, places = build_row(trained, 3, 9)
    pixels = random_pixels(1)

    as_trained = logits(trained, ids_T, look(trained, pixels, places))
    as_served = logits(served, ids_T, look(served, pixels, places))
    as_float = logits(build_model(kind), ids_T, look(build_model(kind), pixels, places))

    # Both round to the same integers but for ties; INT8 itself is some percent off.
    assert (as_trained - as_served).norm() < 2e-3 * as_served.norm()
    assert (as_float - as_served).norm() < 0.1 * as_float.norm()


@pytest.mark.parametrize("kind", TYPES)
def test_every_parameter_of_the_fusion_gets_a_gradient(kind: FusionType) -> None:
    model = build_model(kind).train()
    assert model.fusion is not None
    ids_T, places = build_row(model, 2, 4)
    memory = model.fusion.remember(random_pixels(1))
    context = gather_images([PlacedImages(memory, places)])

    model(ids_T[None], images=context).square().mean().backward()

    for name, parameter in model.fusion.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_rounds_repeat_the_blocks_without_more_parameters() -> None:
    once, twice = (build_model("early", encoder_rounds=rounds) for rounds in (1, 2))
    sizes = [sum(item.numel() for item in model.parameters()) for model in (once, twice)]
    features = [model.fusion.encoder(random_pixels(1)) for model in (once, twice)]  # type: ignore[union-attr]

    assert sizes[0] == sizes[1]
    assert (features[0] - features[1]).abs().max() > 1e-3


def test_a_text_model_refuses_images() -> None:
    model = build_model("early")
    ids_T, places = build_row(model, 2, 2)
    context = gather_images([look(model, random_pixels(1), places)])
    model.fusion = None

    with pytest.raises(ShapeError, match="reads text alone"):
        model(ids_T[None], images=context)


def test_images_of_another_size_are_refused() -> None:
    model = build_model("early")
    assert model.fusion is not None

    with pytest.raises(ShapeError, match=r"\(3, 16, 16\)"):
        model.fusion.encoder(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (build_config("mid", layers=[2]), r"fusion.layers \[2\]"),
        (build_config("mid", layers=[1, 1]), r"fusion.layers \[1, 1\]"),
        (build_config("mid", width=12), r"fusion.width \(12\)"),
        (build_config("early", image_size=256, patch_size=2), "16384 patches"),
    ],
)
def test_a_fusion_that_does_not_fit_the_decoder_is_refused(
    config: FusionConfig, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        attach_fusion(Decoder(tiny_config()), config)
