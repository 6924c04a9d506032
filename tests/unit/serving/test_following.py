"""Following a link from one model to the next, with streams open."""

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from r1ray.config.fusion import FusionConfig
from r1ray.config.serving import EngineConfig
from r1ray.errors import ServingError
from r1ray.models.checkpoint import load_model, save_model
from r1ray.models.fusion_file import attach_fusion
from r1ray.models.requests import GenerationRequest
from r1ray.serving.engine import Engine
from r1ray.serving.following import EngineFollower, digest_inputs
from r1ray.serving.replica import build_engine
from tests.fakes import write_tiny_model

CONFIG = EngineConfig(model_name="tiny", max_concurrency=2, max_context_tokens=256)


@pytest.fixture
def link(tmp_path: Path) -> Path:
    """Leads to the first of three models."""
    for seed, name in enumerate(("one", "two", "three")):
        write_tiny_model(tmp_path / name, seed=seed)
    path = tmp_path / "model"
    path.symlink_to("one")
    return path


@pytest.fixture
def follower(link: Path) -> Iterator[EngineFollower]:
    follower = EngineFollower(str(link), lambda path: build_engine(path, CONFIG), look_every_s=None)
    yield follower
    follower.close()


def _lead(link: Path, name: str) -> None:
    temporary = link.with_name("tmp")
    temporary.symlink_to(name)
    temporary.replace(link)


def _request(number: int, count: int = 12) -> GenerationRequest:
    return GenerationRequest(str(number), [5, 6, 7], count, frozenset())


async def _read(engine: Engine, request: GenerationRequest) -> list[int]:
    events = [event async for batch in engine.submit(request) for event in batch]
    return [event.token_id for event in events if event.token_id is not None]


async def _ask(follower: EngineFollower, number: int) -> list[int]:
    with follower.lease() as engine:
        return await _read(engine, _request(number))


def test_an_answer_ends_on_the_version_that_it_began_with(
    follower: EngineFollower, link: Path
) -> None:
    async def run() -> None:
        before = await _ask(follower, 0)
        with follower.lease() as engine:
            stream = engine.submit(_request(1, count=200))
            first = await anext(stream)
            _lead(link, "two")
            follower.look()
            assert (follower.version, len(follower.engines)) == ("two", 2)
            after = await _ask(follower, 2)
            assert after != before
            follower.look()
            assert engine.is_alive  # it has an answer to end
            rest = [event async for batch in stream for event in batch]
        tokens = [event.token_id for event in [*first, *rest] if event.token_id is not None]
        assert len(tokens) == 200
        assert tokens[: len(before)] == before
        follower.look()
        assert not engine.is_alive
        assert len(follower.engines) == 1

    asyncio.run(run())


def test_a_third_version_waits_until_the_first_is_gone(
    follower: EngineFollower, link: Path
) -> None:
    with follower.lease():
        _lead(link, "two")
        follower.look()
        _lead(link, "three")
        follower.look()
        assert (follower.version, len(follower.engines)) == ("two", 2)
    follower.look()
    assert (follower.version, len(follower.engines)) == ("three", 2)  # the second goes next time
    follower.look()
    assert len(follower.engines) == 1


def test_what_cannot_be_served_leaves_the_old_version(
    follower: EngineFollower, link: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (link.parent / "two" / "model.safetensors").write_bytes(b"half a file")
    _lead(link, "two")
    follower.look()
    assert "two cannot be served" in caplog.text
    assert follower.version == "one"
    caplog.clear()
    follower.look()
    assert not caplog.text  # told once
    assert asyncio.run(_ask(follower, 0))
    (link.parent / "three" / "tokenizer_config.json").write_text("{}")
    _lead(link, "three")
    follower.look()
    assert "tokenizer_config.json is not that of the served model" in caplog.text
    caplog.clear()
    shutil.rmtree(link.parent / "two")
    _lead(link, "two")
    follower.look()
    assert "two cannot be served" in caplog.text
    assert follower.version == "one"
    _lead(link, "one")
    follower.look()
    assert (follower.version, len(follower.engines)) == ("one", 1)


def test_another_fusion_is_another_kind_of_request(
    follower: EngineFollower, link: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = load_model(link.parent / "two")
    attach_fusion(model, FusionConfig(type="mid", image_size=16, patch_size=8))
    save_model(model, link.parent / "two")
    _lead(link, "two")

    follower.look()

    assert "sees images in another way than the served model" in caplog.text
    assert follower.version == "one"


def test_requests_of_another_tokenizer_are_refused(follower: EngineFollower, link: Path) -> None:
    two = link.parent / "two"
    follower.check_inputs(None)
    follower.check_inputs(digest_inputs(str(two)))  # weights make no difference
    (two / "tokenizer_config.json").write_text("{}")

    with pytest.raises(ServingError, match="published with another tokenizer") as caught:
        follower.check_inputs(digest_inputs(str(two)))

    assert caught.value.status == 503


def test_without_room_for_two_the_old_version_stays(
    link: Path, caplog: pytest.LogCaptureFixture
) -> None:
    follower = EngineFollower(
        str(link), lambda path: build_engine(path, CONFIG), look_every_s=None, has_room=False
    )
    _lead(link, "two")
    follower.look()

    assert "room for one version at a time; restart the server" in caplog.text
    assert (follower.version, len(follower.engines)) == ("one", 1)
    follower.close()


def test_a_thread_looks_by_itself(link: Path) -> None:
    follower = EngineFollower(str(link), lambda path: build_engine(path, CONFIG), look_every_s=0.02)
    _lead(link, "two")

    async def wait() -> None:
        for _ in range(500):
            if follower.version == "two":
                return
            await asyncio.sleep(0.02)

    asyncio.run(wait())
    assert follower.version == "two"
    follower.close()
    follower.close()
    assert not follower.engine.is_alive
