"""A streaming run over three real processes: gloo for collectives, TCP for the merges."""

import logging
from multiprocessing.synchronize import Event
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

from r1ray.config.exchange import StreamExchangeConfig
from r1ray.exchange import Transport
from r1ray.exchange.base import StepTotals
from r1ray.exchange.stream import StreamExchange
from r1ray.exchange.update_rule import UpdateRule
from tests.unit.exchange.gloo import TIMEOUT_S, run_ranks

NUM_STEPS = 60
STALLED_RANK, STALLED_STEP, GOES_ON_AT_STEP = 2, 10, 22


class _Messages(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def _run(transport: Transport, others_went_on: Event) -> dict[str, Any]:
    messages = _Messages()
    logging.getLogger("r1ray.exchange").addHandler(messages)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))
    teacher = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))
    exchange = StreamExchange(
        StreamExchangeConfig(
            type="stream",
            local_steps=12,
            num_fragments=3,
            overlap_steps=2,
            tail_share=0.1,
            grace_s=0.2,
            timeout_s=TIMEOUT_S,
        )
    )
    exchange.setup(
        list(model.parameters()),
        transport,
        UpdateRule(lambda number: 0.01, num_steps=NUM_STEPS),
    )
    losses = []
    for step in range(NUM_STEPS):
        x = torch.randn(
            32, 16, generator=torch.Generator().manual_seed(100 * step + transport.rank)
        )
        if (transport.rank, step) == (STALLED_RANK, STALLED_STEP):
            assert others_went_on.wait(TIMEOUT_S)
        if (transport.rank, step) == (0, GOES_ON_AT_STEP):
            others_went_on.set()
        model.zero_grad()
        loss = ((model(x) - teacher(x)) ** 2).sum()
        loss.backward()
        exchange.step(StepTotals(loss.item(), 32, 32))
        losses.append(loss.item() / 32)
    exchange.flush()
    exchange.close()
    weights = torch.cat([item.detach().flatten() for item in model.parameters()])
    return {
        "losses": losses,
        "weights": weights,
        "late": [text for text in messages.texts if "merged without ranks" in text],
    }


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(_run, 3, mp.get_context("spawn").Event())


def test_loss_falls_on_every_worker(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert sum(rank["losses"][-5:]) < 0.5 * sum(rank["losses"][:5])


def test_weights_end_bit_identical(ranks: list[dict[str, Any]]) -> None:
    assert all(torch.equal(ranks[0]["weights"], rank["weights"]) for rank in ranks[1:])


def test_the_others_go_on_without_the_stalled_worker_and_leave_out_no_one_else(
    ranks: list[dict[str, Any]],
) -> None:
    """It stalls, after its tenth step, until rank 0 has made 22: two merges without it."""
    late = [text for rank in ranks for text in rank["late"]]
    assert late
    assert all(f"without ranks [{STALLED_RANK}]" in text for text in late)
