"""A data set of a sequence on two workers, whatever the exchange: only what is trained is sent."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from r1ray.config.continual import AveragingConfig, ContinualConfig, EwcConfig, LoraConfig
from r1ray.config.exchange import (
    Delta4AsyncExchangeConfig,
    Delta4ExchangeConfig,
    DenseExchangeConfig,
    ExchangeConfig,
    StreamExchangeConfig,
)
from r1ray.config.training import TrainConfig
from r1ray.exchange import LocalTransport, build_exchange
from r1ray.models.checkpoint import save_model
from r1ray.models.lora import is_adapter
from r1ray.models.memory import FISHER_NAME, memory_path
from r1ray.training.checkpoint import load_checkpoint, save_checkpoint
from r1ray.training.consolidation import Consolidation
from r1ray.training.continual import average, begin, finish, hold, remember
from r1ray.training.objective import CrossEntropy
from r1ray.training.step import TrainState
from tests.fakes import tiny_model
from tests.unit.exchange.threads import ThreadTransport, run_workers
from tests.unit.training.batches import random_batch

NUM_STEPS = 12
EXCHANGES: dict[str, ExchangeConfig] = {
    "dense": DenseExchangeConfig(type="dense"),
    "delta4": Delta4ExchangeConfig(type="delta4"),
    "delta4_async": Delta4AsyncExchangeConfig(type="delta4_async"),
    "stream": StreamExchangeConfig(
        type="stream",
        local_steps=4,
        num_fragments=2,
        overlap_steps=1,
        tail_share=0.25,
        timeout_s=10.0,
    ),
}
LORA = ContinualConfig(replay=None, lora=LoraConfig(rank=4, alpha=8.0))
EWC = ContinualConfig(replay=None, ewc=EwcConfig(strength=1e4, fisher_batches=2))


@pytest.fixture(autouse=True)
def _loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory that remembers a batch."""
    path = tmp_path_factory.mktemp("start")
    save_model(tiny_model(), path)
    remember(tiny_model(), [random_batch(4, 16, seed=9)], path, path, seed=0)
    return path


def _train(exchange: ExchangeConfig, config: ContinualConfig, start: Path) -> list[dict[str, Any]]:
    """What each of two workers has in the end, and its first and last loss."""
    models = [tiny_model(), tiny_model()]
    for model in models:
        torch.manual_seed(0)  # as a worker does; here they share the generator
        begin(model, config)
    train = TrainConfig(
        num_steps=NUM_STEPS, warmup_steps=1, learning_rate=1e-2, precision="fp32", exchange=exchange
    )

    def work(transport: ThreadTransport) -> dict[str, Any]:
        model = models[transport.rank]
        objective = hold(CrossEntropy(), model, config, start)
        state = TrainState(model, train, build_exchange(exchange), transport, objective)
        batch = random_batch(4, 16, seed=transport.rank)
        losses = [
            state.run_step([batch], flush=step == NUM_STEPS - 1).loss for step in range(NUM_STEPS)
        ]
        state.exchange.close()
        return {
            "state": model.state_dict(),
            "losses": [item for item in losses if item is not None],
        }

    return run_workers(2, work)


def _distance(state: dict[str, Tensor]) -> float:
    """From where training began."""
    old = tiny_model().state_dict()
    return sum(float((state[name] - old[name]).square().sum()) for name in old) ** 0.5


@pytest.mark.parametrize("name", EXCHANGES)
def test_adapters_alone_move_and_end_equal_on_both_workers(name: str, start: Path) -> None:
    first, second = _train(EXCHANGES[name], LORA, start)
    assert first["losses"][-1] < first["losses"][0]
    for key, tensor in first["state"].items():
        assert torch.equal(tensor, second["state"][key]), key
    assert _distance(first["state"]) == 0.0
    assert any(tensor.any() for key, tensor in first["state"].items() if key.endswith("lora_b"))


@pytest.mark.parametrize("name", EXCHANGES)
def test_the_penalty_holds_weights_through_every_exchange(name: str, start: Path) -> None:
    held = _train(EXCHANGES[name], EWC, start)
    free = _train(EXCHANGES[name], ContinualConfig(replay=None), start)
    for key, tensor in held[0]["state"].items():
        assert torch.equal(tensor, held[1]["state"][key]), key
    importance = torch.cat([item.flatten() for item in _fisher(start)])

    def cost(state: dict[str, Tensor]) -> float:
        """Movement, weighted by what it costs."""
        old = dict(tiny_model().named_parameters())
        moved = torch.cat([(state[name] - item).detach().flatten() for name, item in old.items()])
        return float((importance * moved.square()).sum())

    assert cost(held[0]["state"]) < 0.3 * cost(free[0]["state"])


def _fisher(start: Path) -> list[Tensor]:
    model = tiny_model()
    objective = hold(CrossEntropy(), model, EWC, start)
    assert isinstance(objective, Consolidation)
    return [fisher for _, _, fisher in objective._held]


def test_without_a_memory_nothing_is_held(tmp_path: Path) -> None:
    objective = CrossEntropy()
    assert hold(objective, tiny_model(), EWC, tmp_path) is objective
    assert hold(objective, tiny_model(), ContinualConfig(), tmp_path) is objective


def test_what_is_remembered_is_added_to_what_was(start: Path, tmp_path: Path) -> None:
    batch = random_batch(4, 16, seed=9)
    remember(tiny_model(), [batch], start, tmp_path, seed=0)
    assert memory_path(tmp_path, FISHER_NAME).is_file()
    for once, twice in zip(_fisher(start), _fisher(tmp_path), strict=True):
        torch.testing.assert_close(twice, 2 * once)


def test_averaging_goes_that_share_of_the_way_back() -> None:
    old, model = tiny_model(seed=0), tiny_model(seed=1)
    average(model, old.state_dict(), 0.25)
    new = dict(tiny_model(seed=1).named_parameters())
    for (name, item), was in zip(model.named_parameters(), old.parameters(), strict=True):
        torch.testing.assert_close(item, 0.75 * new[name] + 0.25 * was)


def test_finishing_merges_before_it_averages(start: Path) -> None:
    both = ContinualConfig(replay=None, lora=LORA.lora, averaging=AveragingConfig(start_share=0.5))
    model, old = tiny_model(), tiny_model().state_dict()
    begin(model, both)
    with torch.no_grad():
        for name, item in model.named_parameters():
            if is_adapter(name):
                item.normal_()
    whole = tiny_model()
    begin(whole, LORA)
    whole.load_state_dict(model.state_dict())
    finish(whole, LORA, old)
    finish(model, both, old)
    for name, item in model.state_dict().items():
        torch.testing.assert_close(item, (whole.state_dict()[name] + old[name]) / 2)


def test_an_interrupted_training_goes_on_with_its_adapters(start: Path, tmp_path: Path) -> None:
    def build() -> TrainState:
        torch.manual_seed(0)
        model = tiny_model()
        begin(model, LORA)
        train = TrainConfig(num_steps=8, warmup_steps=1, learning_rate=1e-2, precision="fp32")
        exchange = build_exchange(DenseExchangeConfig(type="dense"))
        return TrainState(model, train, exchange, LocalTransport())

    batch = random_batch(4, 16, seed=0)
    whole, half = build(), build()
    records = [whole.run_step([batch]) for _ in range(8)]
    before = [half.run_step([batch]) for _ in range(4)]
    save_checkpoint(tmp_path, half, before, rank=0, world_size=1)
    resumed = build()
    torch.nn.init.normal_(next(item for item in resumed.model.parameters() if item.requires_grad))
    history = load_checkpoint(tmp_path, resumed)
    history += [resumed.run_step([batch]) for _ in range(4)]
    assert [record.loss for record in history] == [record.loss for record in records]
    for name, item in whole.model.state_dict().items():
        assert torch.equal(item, resumed.model.state_dict()[name])


@pytest.mark.parametrize("policy", ["range", "threshold"])
def test_adapters_train_in_narrow_formats(policy: str, start: Path) -> None:
    model = tiny_model()
    begin(model, LORA)
    train = TrainConfig(
        num_steps=8,
        warmup_steps=1,
        learning_rate=1e-2,
        precision="bf16",
        precision_policy=policy,  # type: ignore[arg-type]
    )
    exchange = build_exchange(DenseExchangeConfig(type="dense"))
    state = TrainState(model, train, exchange, LocalTransport())
    batch = random_batch(4, 16, seed=0)
    losses = [state.run_step([batch]).loss for _ in range(8)]
    assert losses[0] is not None
    assert losses[-1] is not None
    assert losses[-1] < losses[0]
