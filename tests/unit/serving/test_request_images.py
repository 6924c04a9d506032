"""Images of a chat request: from data URLs into the prompt, and what is refused."""

import asyncio
import base64
import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from r1ray.config.images import ImageLimits
from r1ray.errors import ServingError
from r1ray.models.image_tokens import IMAGE_MARK, image_id
from r1ray.models.images import read_image
from r1ray.models.tokenizer import Tokenizer
from r1ray.serving.request_images import Vision
from tests.unit.serving.scripted import ScriptedModel, body, chat_body, service_over, whole

VISION = Vision(image_size=16, num_image_tokens=4, limits=ImageLimits(max_images=2))


def png(color: tuple[int, int, int], size: int = 20) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (size, size), color).save(stream, "PNG")
    return stream.getvalue()


def url(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def image_part(text: str, **more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": text, **more}}


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


RED, BLUE = png((250, 0, 0)), png((0, 0, 250))


def ask(
    tokenizer: Tokenizer, *parts: dict[str, Any], vision: Vision | None = VISION, role: str = "user"
) -> tuple[ScriptedModel, dict[str, Any]]:
    async def main() -> tuple[ScriptedModel, dict[str, Any]]:
        model = ScriptedModel(tokenizer, "a shape")
        service = service_over(tokenizer, model, vision=vision)
        messages = [{"role": role, "content": list(parts)}]
        return model, await whole(await service.chat(body(messages=messages)))

    return asyncio.run(main())


def test_images_come_before_the_text_at_places_of_their_own(tokenizer: Tokenizer) -> None:
    parts = [text_part("what is"), image_part(url(RED)), text_part(" it?"), image_part(url(BLUE))]

    model, answer = ask(tokenizer, *parts)

    [request] = model.requests
    before, after = tokenizer.encode("<|im_start|>user\n"), "what is it?<|im_end|>\n"
    ids = [image_id(read_image(data, 16, ImageLimits())) for data in (RED, BLUE)]
    assert list(request.prompt_ids) == [
        *before,
        *[ids[0]] * 4,
        *[ids[1]] * 4,
        *tokenizer.encode(after + "<|im_start|>assistant\n"),
    ]
    assert [image.place for image in request.images] == [len(before), len(before) + 4]
    assert [image.pixels_3SS[:, 0, 0].tolist() for image in request.images] == [
        [250, 0, 0],
        [0, 0, 250],
    ]
    assert answer["usage"]["prompt_tokens"] == len(request.prompt_ids)


def test_images_have_no_tokens_to_show(tokenizer: Tokenizer) -> None:
    service = service_over(tokenizer, ScriptedModel(tokenizer, ""), vision=VISION)
    messages = [{"role": "user", "content": [image_part(url(RED))]}]
    with pytest.raises(ServingError, match="images have no token ids to show"):
        asyncio.run(service.tokenize(body(messages=messages)))


def test_the_same_image_has_the_same_ids_and_another_has_others(tokenizer: Tokenizer) -> None:
    prompts = [
        ask(tokenizer, image_part(url(data)), text_part("?"))[0].requests[0].prompt_ids
        for data in (RED, RED, BLUE)
    ]

    assert prompts[0] == prompts[1]
    assert prompts[0] != prompts[2]
    assert len(prompts[0]) == len(prompts[2])
    assert min(prompts[0]) < 0


@pytest.mark.parametrize(
    ("part", "param", "message"),
    [
        (image_part("https://example.org/a.png"), "image_url", "this server fetches nothing"),
        (image_part("http://127.0.0.1:8000/"), "image_url", "this server fetches nothing"),
        (image_part("file:///etc/passwd"), "image_url", "this server fetches nothing"),
        (image_part("data:text/html;base64,AAAA"), "image_url", "this server fetches nothing"),
        (image_part("data:image/png,AAAA"), "image_url", "a data URL begins like"),
        (image_part("data:image/png;base64,A*AA"), "image_url", "not base64"),
        (image_part(url(b"no image")), "image_url", "cannot be read as one of PNG"),
        (image_part(url(RED[:40])), "image_url", "cannot be read as one of PNG"),
        (image_part(url(bytes(4 << 20) + b"more")), "image_url", "bytes, the most is 4194304"),
        (image_part(url(png((0, 0, 0), 4001))), "image_url", "the most is 16000000"),
        (image_part(url(RED), detail="high"), "content", "a detail of auto or low"),
        ({"type": "image_url", "image_url": url(RED)}, "content", "image_url must be"),
        ({"type": "input_audio", "input_audio": {}}, "content", "only text and image parts"),
    ],
)
def test_what_is_no_image_of_the_request_is_refused_by_name(
    tokenizer: Tokenizer, part: dict[str, Any], param: str, message: str
) -> None:
    with pytest.raises(ServingError, match=message) as refused:
        ask(tokenizer, text_part("?"), part)

    assert refused.value.status == 400
    expected = "messages[0].content" + ("[1].image_url" if param == "image_url" else "")
    assert refused.value.param == expected


def test_more_images_than_allowed_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ServingError, match="the most is 2 images") as refused:
        ask(tokenizer, *[image_part(url(RED))] * 3)

    assert refused.value.param == "messages[0].content[2].image_url"


def test_a_text_model_refuses_images(tokenizer: Tokenizer) -> None:
    with pytest.raises(ServingError, match="reads text alone; leave images out") as refused:
        ask(tokenizer, image_part(url(RED)), vision=None)

    assert (refused.value.status, refused.value.code) == (400, "unsupported_value")


def test_images_are_for_users(tokenizer: Tokenizer) -> None:
    with pytest.raises(ServingError, match="images are for user messages, not for system"):
        ask(tokenizer, image_part(url(RED)), role="system")


def test_a_text_cannot_pass_for_an_image(tokenizer: Tokenizer) -> None:
    with pytest.raises(ServingError, match=r"U\+FFFC, which stands for an image"):
        ask(tokenizer, text_part(f"{IMAGE_MARK} what?"), image_part(url(RED)))

    model, _ = ask(tokenizer, text_part(f"{IMAGE_MARK} what?"))  # a character like any other
    assert min(model.requests[0].prompt_ids) >= 0


def test_ids_of_images_cannot_be_sent(tokenizer: Tokenizer) -> None:
    async def main() -> None:
        service = service_over(tokenizer, ScriptedModel(tokenizer, "x"), vision=VISION)
        forged = image_id(np.zeros((3, 16, 16), dtype=np.uint8))
        with pytest.raises(ServingError, match=f"token id {forged} is not between"):
            await service.complete(body(prompt=[5, forged]))

    asyncio.run(main())


def test_a_chat_without_images_has_the_tokens_that_it_has_on_a_text_model(
    tokenizer: Tokenizer,
) -> None:
    async def main() -> None:
        prompts = []
        for vision in (None, VISION):
            model = ScriptedModel(tokenizer, "x")
            await service_over(tokenizer, model, vision=vision).chat(chat_body())
            prompts.append(model.requests[0].prompt_ids)
        assert prompts[0] == prompts[1]

    asyncio.run(main())
