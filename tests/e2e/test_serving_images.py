"""A served model that sees images, asked over HTTP through the openai client."""

import base64
import io
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from PIL import Image

from r1ray.config.images import ImageLimits
from r1ray.config.serving import ServeConfig
from r1ray.models import load_model, save_model
from r1ray.models.fusion_file import attach_fusion
from r1ray.models.quantization import quantize_modules
from r1ray.serving.app import start_server, stop_server
from tests.e2e.processes import free_port
from tests.fakes import write_tiny_model
from tests.unit.models.test_fusion import build_config

MODEL = "seeing"


@pytest.fixture(scope="module")
def client(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    model_dir = write_tiny_model(tmp_path_factory.mktemp("served"), max_positions=1024)
    model = load_model(model_dir)
    attach_fusion(model, build_config("early"))
    quantize_modules(model)
    save_model(model, model_dir)
    config = ServeConfig(
        model_name=MODEL,
        port=free_port(),
        max_context_tokens=1024,
        images=ImageLimits(max_images=2, max_bytes=2 << 20, max_pixels=4_000_000),
    )
    url = start_server(str(model_dir), config)
    with openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=60) as found:
        yield found
    stop_server()


def _url(image: Image.Image) -> str:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"


def _ask(client: openai.OpenAI, *urls: str, stream: bool = False) -> Any:
    parts: list[Any] = [{"type": "text", "text": "what color is it? " * 12}]
    parts += [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": parts}],
        temperature=0,
        max_tokens=4,
        logprobs=not stream,
        stream=stream,
    )


def _logprobs(answer: Any) -> list[float]:
    return [token.logprob for token in answer.choices[0].logprobs.content]


def test_answers_depend_on_the_image_and_on_it_alone(client: openai.OpenAI) -> None:
    red, blue = (_url(Image.new("RGB", (64, 48), color)) for color in ("red", "blue"))

    first, other, again = (_ask(client, url) for url in (red, blue, red))
    text = _ask(client)

    assert _logprobs(first) == _logprobs(again)
    assert _logprobs(first) != _logprobs(other)
    assert first.usage.prompt_tokens == text.usage.prompt_tokens + 4
    assert again.usage.prompt_tokens_details.cached_tokens >= 64
    assert other.usage.prompt_tokens_details.cached_tokens == 0


def test_answers_about_images_are_streamed(client: openai.OpenAI) -> None:
    red = _url(Image.new("RGB", (64, 48), "red"))

    chunks = list(_ask(client, red, stream=True))

    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == _ask(client, red).choices[0].message.content


def test_a_large_image_passes_and_a_larger_one_is_refused_by_name(client: openai.OpenAI) -> None:
    large, larger = (Image.effect_noise((size, size), 80) for size in (1300, 1600))

    assert _ask(client, _url(large)).usage.completion_tokens > 0  # the body has 2 MB
    with pytest.raises(openai.BadRequestError, match="the most is 2097152") as refused:
        _ask(client, _url(larger))
    assert refused.value.param == "messages[0].content[1].image_url"


@pytest.mark.parametrize(
    ("urls", "message"),
    [
        (["http://127.0.0.1:9/a.png"], "this server fetches nothing"),
        ([_url(Image.new("L", (3000, 3000)))], "3000 x 3000 pixels, the most is 4000000"),
        ([_url(Image.new("L", (9, 9)))] * 3, "the most is 2 images"),
    ],
)
def test_other_images_are_refused(client: openai.OpenAI, urls: list[str], message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        _ask(client, *urls)
