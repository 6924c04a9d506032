"""What runs a model on the device that a replica is for."""

import asyncio
import importlib.util
import re
from typing import Any

import pytest
import torch

from r1ray.config.serving import EngineConfig
from r1ray.errors import ConfigError
from r1ray.models.backend import DecoderBackend
from r1ray.models.grammar import regex_form
from r1ray.models.openvino import OpenVinoBackend
from r1ray.models.requests import GenerationRequest
from r1ray.models.tokenizer import Tokenizer
from r1ray.serving.devices import load_backend
from r1ray.serving.replica import build_engine
from tests.fakes import EOS_ID, write_tiny_model
from tests.requirements import skip_loudly

CONTEXT = 200


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_model(tmp_path_factory.mktemp("tiny")))


def config(**fields: Any) -> EngineConfig:
    return EngineConfig(model_name="tiny", max_context_tokens=CONTEXT, **fields)


def needs_openvino() -> None:
    if importlib.util.find_spec("openvino") is None:
        skip_loudly("openvino is not installed: pip install 'r1ray[openvino]'")


def answer(model_dir: str, settings: EngineConfig, form: str | None = None) -> list[int | None]:
    engine = build_engine(model_dir, settings)

    async def read() -> list[int | None]:
        stops = frozenset({EOS_ID})
        request = GenerationRequest("r", list(range(40, 120)), 24, stops, form=form)
        return [event.token_id async for events in engine.submit(request) for event in events]

    try:
        return asyncio.run(read())
    finally:
        engine.close()


def test_cpus_and_a_cache_of_int8(model_dir: str) -> None:
    backend = load_backend(model_dir, config(device="cpu", kv_cache="int8"))
    plain = load_backend(model_dir, config())
    assert isinstance(backend, DecoderBackend)
    assert backend.page_bytes < plain.page_bytes


def test_a_gpu_that_is_not_there_is_named(model_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"device cuda: torch sees no GPU in this replica"):
        load_backend(model_dir, config(device="cuda", num_gpus_per_replica=1))


def test_an_npu_that_is_not_there_is_named(model_dir: str) -> None:
    needs_openvino()
    with pytest.raises(ConfigError, match="OpenVINO sees no NPU here, but CPU"):
        load_backend(model_dir, config(backend="openvino", device="intel_npu"))


def test_openvino_answers_as_our_engine_does(model_dir: str) -> None:
    needs_openvino()
    chosen = config(backend="openvino")
    assert isinstance(load_backend(model_dir, chosen), OpenVinoBackend)
    assert answer(model_dir, chosen) == answer(model_dir, config())


def test_openvino_keeps_to_forms(model_dir: str) -> None:
    needs_openvino()
    form = regex_form("[0-9]{3}")
    found = answer(model_dir, config(backend="openvino"), form=form)
    assert found == answer(model_dir, config(), form=form)
    text = Tokenizer(model_dir).decode([token for token in found if token is not None])
    assert re.fullmatch("[0-9]{3}", text)


def test_an_engine_is_measured_before_it_answers(model_dir: str) -> None:
    engine = build_engine(model_dir, config(max_concurrency=2), is_measured=True)
    try:
        assert engine.speed is not None
        assert [number for number, _ in engine.speed.step_s] == [1, 2]
        assert engine.stats.num_prompt_tokens == 0  # what was made up does not count
    finally:
        engine.close()
