"""What an engine is built of, and what is too small for it."""

import asyncio
from pathlib import Path

import pytest

from r1ray.config.serving import EngineConfig
from r1ray.errors import ConfigError
from r1ray.models.requests import GenerationRequest
from r1ray.serving.replica import build_engine
from tests.fakes import write_tiny_model

CONTEXT = 8192


def test_memory_for_less_than_one_request_is_refused(tmp_path: Path) -> None:
    model_dir = str(write_tiny_model(tmp_path, max_positions=CONTEXT))
    config = EngineConfig(model_name="tiny", max_context_tokens=CONTEXT, kv_cache_mib=1)
    with pytest.raises(ConfigError, match=r"kv_cache_mib \(1\) is below the 2.0 MiB of one"):
        build_engine(model_dir, config)


def test_memory_that_is_short_is_shared_in_turns(tmp_path: Path) -> None:
    model_dir = str(write_tiny_model(tmp_path, max_positions=CONTEXT))
    config = EngineConfig(
        model_name="tiny", max_context_tokens=4096, kv_cache_mib=1, max_concurrency=3
    )
    engine = build_engine(model_dir, config)

    async def read(name: str) -> int:
        request = GenerationRequest(name, [5] * 3900, 100, frozenset())
        return sum([len(events) async for events in engine.submit(request)])

    async def main() -> None:
        assert await asyncio.gather(*map(read, "abc")) == [100] * 3

    asyncio.run(main())
    assert engine.stats.kv_used_share == 0
    engine.close()
