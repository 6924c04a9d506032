"""A new version of a model over HTTP, under load: no stream is cut, no request fails."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from r1ray.config.serving import ServeConfig
from r1ray.serving.app import start_server, stop_server
from tests.e2e.answers import read_text
from tests.e2e.processes import free_port, until
from tests.fakes import write_tiny_model

CONTEXT = 8192
LONG: Any = {"temperature": 0, "max_tokens": 4000, "stream": True}


@pytest.fixture(scope="module")
def link(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `compress` leaves it: a link that leads to a model."""
    root = tmp_path_factory.mktemp("versions")
    for seed, name in enumerate(("first", "second")):
        write_tiny_model(root / name, seed=seed, max_positions=CONTEXT)
    path = root / "model"
    path.symlink_to("first")
    return path


@pytest.fixture(scope="module")
def base_url(local_ray: None, link: Path) -> Iterator[str]:
    config = ServeConfig(
        model_name="tiny", port=free_port(), max_concurrency=4, max_context_tokens=CONTEXT
    )
    yield start_server(str(link), config)
    stop_server()


@pytest.fixture
def client(base_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{base_url}/v1", api_key="unused", max_retries=0, timeout=100
    ) as client:
        yield client


def _ask(client: openai.OpenAI, **fields: Any) -> Any:
    options = {"temperature": 0, "max_tokens": 8} | fields
    messages: Any = [{"role": "user", "content": "the quick brown fox"}]
    return client.chat.completions.create(model="tiny", messages=messages, **options)


def _text(client: openai.OpenAI) -> str:
    return str(_ask(client).choices[0].message.content)


def _version(base_url: str) -> str:
    answer = httpx.get(f"{base_url}/health", timeout=30).raise_for_status()
    return str(answer.json()["versions"]["tiny"])


def test_a_stream_ends_whole_while_the_next_version_takes_over(
    base_url: str, client: openai.OpenAI, link: Path
) -> None:
    assert _version(base_url) == "first"
    old, alone = _text(client), read_text(_ask(client, **LONG))
    answers: list[str] = []
    is_over = threading.Event()

    def ask_on() -> None:
        while not is_over.is_set():
            answers.append(_text(client))  # raises where a request fails

    with ThreadPoolExecutor(3) as pool:
        load = pool.submit(ask_on)
        stream = _ask(client, **LONG)
        next(iter(stream))
        text = pool.submit(read_text, stream)
        temporary = link.with_name("tmp")
        temporary.symlink_to("second")
        temporary.replace(link)
        until(lambda: _version(base_url) == "second")
        assert not text.done()  # it is still being written, by the old version
        new = _text(client)
        assert new != old
        whole = text.result(timeout=100)
        is_over.set()
        load.result(timeout=100)
    assert whole == alone[-len(whole) :]
    assert len(alone) - len(whole) < 100  # what the first chunk had
    assert set(answers) == {old, new}
    switched = answers.index(new)
    assert set(answers[switched:]) == {new}  # one replica: there is no way back
    assert _text(client) == new
