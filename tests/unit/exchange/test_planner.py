import pytest

from r1ray.config.exchange import Delta4AsyncExchangeConfig
from r1ray.exchange.planner import (
    Measurements,
    candidates,
    choose,
    describe_plan,
    estimate,
)

MBIT = 1e6 / 8
NUM_STEPS = 5000


def _measured(
    rate_mbit: float,
    *,
    compute_s: float = 0.1,
    world_size: int = 4,
    num_parameters: int = 2_000_000,
) -> Measurements:
    return Measurements(
        num_parameters=num_parameters,
        world_size=world_size,
        compute_s=compute_s,
        link_rate=rate_mbit * MBIT,
        codec_rate=1e8,
    )


def _choice(measured: Measurements) -> str:
    config = choose([estimate(config, measured) for config in candidates(NUM_STEPS)]).config
    return f"{config.type} {getattr(config, 'dtype', '')}".strip()


def test_dense_costs_twice_the_shares_of_all_others_in_bytes() -> None:
    dense = estimate(candidates(NUM_STEPS)[0], _measured(200))
    assert dense.sent_bytes == pytest.approx(2 * 3 / 4 * 4 * 2_000_000)
    assert dense.step_s == pytest.approx(0.1 + 12e6 / 25e6)


def test_bf16_sends_half_and_delta4_a_ninth() -> None:
    dense, bf16, delta4, stale, stream = (
        estimate(item, _measured(200)) for item in candidates(NUM_STEPS)
    )
    assert bf16.sent_bytes == pytest.approx(dense.sent_bytes / 2)
    assert delta4.sent_bytes == pytest.approx(dense.sent_bytes / 9)
    assert stale.sent_bytes == delta4.sent_bytes
    assert stream.sent_bytes == pytest.approx(dense.sent_bytes / 900)


def test_the_asynchronous_form_waits_for_the_longer_of_computing_and_sending() -> None:
    stale = Delta4AsyncExchangeConfig(type="delta4_async", sync_share=0)
    coding_s = 2 * 2e6 / 1e8
    assert estimate(stale, _measured(200)).step_s == pytest.approx(0.1 + coding_s)
    slow = _measured(20)
    assert estimate(stale, slow).step_s == pytest.approx(coding_s + 12e6 / 9 / 2.5e6)


def test_its_synchronous_steps_wait_for_both() -> None:
    delta4, mixed = (estimate(item, _measured(200)) for item in candidates(NUM_STEPS)[2:4])
    stale = Delta4AsyncExchangeConfig(type="delta4_async", sync_share=0)
    overlapped = estimate(stale, _measured(200))
    mean = 0.3 * delta4.step_s + 0.7 * overlapped.step_s
    assert mixed.step_s == pytest.approx(mean)


@pytest.mark.parametrize(
    ("rate_mbit", "choice"),
    [(100_000, "dense fp32"), (2000, "dense bf16"), (200, "delta4_async"), (5, "stream")],
)
def test_slower_links_ask_for_more_compression(rate_mbit: float, choice: str) -> None:
    assert _choice(_measured(rate_mbit)) == choice


def test_where_computing_takes_longest_nothing_is_approximated() -> None:
    assert _choice(_measured(200, compute_s=60)) == "dense fp32"


@pytest.mark.parametrize(
    ("num_steps", "local_steps"), [(119, None), (120, 4), (600, 20), (3000, 100), (90_000, 100)]
)
def test_a_run_streams_only_where_every_fragment_is_merged_often(
    num_steps: int, local_steps: int | None
) -> None:
    streams = [item for item in candidates(num_steps) if item.type == "stream"]
    assert [item.local_steps for item in streams] == ([] if local_steps is None else [local_steps])


def test_one_worker_needs_no_exchange() -> None:
    assert _choice(_measured(1, world_size=1)) == "dense fp32"


def test_the_plan_says_what_each_alternative_costs_and_which_was_picked() -> None:
    measured = _measured(200)
    plan = describe_plan(measured, [estimate(config, measured) for config in candidates(NUM_STEPS)])
    assert "200 Mbit/s" in plan
    assert plan.count("s a step,") == len(candidates(NUM_STEPS))
    assert "-> delta4_async" in plan
    assert "dense bf16" in plan
