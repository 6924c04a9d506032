"""Answers about images: batched, and over beginnings that differ in the image alone."""

from collections.abc import Sequence

import pytest
import torch

from r1ray.config.fusion import FusionType
from r1ray.errors import ShapeError
from r1ray.models import Decoder
from r1ray.models.batch_generation import generate_batch
from r1ray.models.fusion import MidFusion, RowImages
from r1ray.models.generation import BatchGenerator
from r1ray.models.image_tokens import image_id
from r1ray.models.quantization import quantize_modules
from r1ray.models.requests import GenerationRequest, RequestImage
from r1ray.models.sampling import SamplingParams
from r1ray.ops.block_selection import BLOCK
from tests.fakes import tiny_model
from tests.unit.models.test_fusion import TYPES, build_model, random_pixels

NO_STOP: frozenset[int] = frozenset()
Prompt = tuple[list[int], tuple[RequestImage, ...]]


def build_prompt(model: Decoder, words_before: int, words_after: int, seed: int) -> Prompt:
    """Words, an image made from `seed`, and words that are the same for all seeds."""
    assert model.fusion is not None
    pixels = random_pixels(1, seed)[0].numpy()
    before = [5 + at % 50 for at in range(words_before)]
    image = [image_id(pixels)] * model.fusion.config.num_image_tokens
    after = [60 + at % 50 for at in range(words_after)]
    return [*before, *image, *after], (RequestImage(pixels, words_before),)


def reference(model: Decoder, prompt: Prompt, count: int) -> list[int]:
    """Greedy decoding without a cache."""
    ids, images = list(prompt[0]), prompt[1]
    assert model.fusion is not None
    pixels = torch.stack([torch.from_numpy(image.pixels_3SS) for image in images])
    places = tuple(image.place for image in images)
    with torch.inference_mode():
        context = model.fusion.look(RowImages(pixels, (0,) * len(images), places), 1)
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids]), images=context)[0, -1].argmax()))
    return ids[len(prompt[0]) :]


def answer(model: Decoder, prompts: Sequence[Prompt], most: int = 3) -> list[list[int]]:
    return generate_batch(
        model,
        [ids for ids, _ in prompts],
        max_new_tokens=8,
        stop_token_ids=NO_STOP,
        max_concurrency=most,
        images=[images for _, images in prompts],
    )


@pytest.mark.parametrize("kind", TYPES)
def test_answers_of_a_batch_are_those_without_a_cache(kind: FusionType) -> None:
    model = build_model(kind)
    prompts = [build_prompt(model, 2 + seed, 9 - seed, seed) for seed in range(5)]
    prompts.append(([7, 8, 9], ()))  # a text between them
    expected = [reference(model, prompt, 8) for prompt in prompts[:-1]]

    found = answer(model, prompts)

    assert found[:-1] == expected
    assert found[-1] == answer(tiny_model(), prompts[-1:])[0]


@pytest.mark.parametrize("kind", TYPES)
def test_int8_answers_are_the_same_in_any_company(kind: FusionType) -> None:
    model = build_model(kind)
    quantize_modules(model)
    prompts = [build_prompt(model, 3, 6, seed) for seed in range(4)]

    assert answer(model, prompts) == [answer(model, [prompt], 1)[0] for prompt in prompts]


@pytest.mark.parametrize("kind", TYPES)
def test_what_is_known_of_one_image_is_not_taken_for_another(kind: FusionType) -> None:
    """Prompts of the same words, long enough to be kept in pages, one after the other."""
    model = build_model(kind)
    generator = BatchGenerator(model, max_concurrency=1, max_context_tokens=256)
    prompts = [build_prompt(model, 3, 2 * BLOCK, seed) for seed in (0, 1, 0)]

    found: list[list[int]] = []
    cached = []
    for number, (ids, images) in enumerate(prompts):
        generator.add(GenerationRequest(str(number), ids, 6, NO_STOP, images=images))
        tokens = []
        while generator.num_running or generator.num_waiting:
            for event in generator.step():
                cached.append(event.num_cached)
                assert event.token_id is not None
                tokens.append(event.token_id)
        found.append(tokens)

    assert cached[0] == cached[6] == 0
    assert cached[12] >= BLOCK, "the first image again: its pages are known"
    assert found[0] == found[2]
    for prompt, tokens in zip(prompts, found, strict=True):
        assert tokens == reference(model, prompt, 6)


def test_an_image_is_read_once_however_many_tokens_follow() -> None:
    model = build_model("mid")
    fusion = model.fusion
    assert isinstance(fusion, MidFusion)
    read = []
    keys = [crossing.get_submodule("k_proj") for crossing in fusion.crossings.values()]
    for module in (fusion.encoder, *keys):
        module.register_forward_hook(lambda module, *_: read.append(module))

    answer(model, [build_prompt(model, 3, 6, 0)])

    assert read == [fusion.encoder, *keys]


def test_repetition_counts_words_alone() -> None:
    model = build_model("early")
    prompt = build_prompt(model, 3, 3, 0)
    sampling = SamplingParams(temperature=0.0, repetition_penalty=1.5)

    [found] = generate_batch(
        model,
        [prompt[0]],
        max_new_tokens=4,
        stop_token_ids=NO_STOP,
        max_concurrency=1,
        sampling=sampling,
        images=[prompt[1]],
    )

    assert len(found) == 4


def test_a_text_model_refuses_a_prompt_with_images() -> None:
    prompt = build_prompt(build_model("early"), 1, 1, 0)

    with pytest.raises(ShapeError, match="reads text alone"):
        answer(tiny_model(), [prompt])
