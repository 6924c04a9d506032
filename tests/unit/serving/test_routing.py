"""Where prompts go, and how many replicas there are, without Serve."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from r1ray.models.pages import chain_digests
from r1ray.serving.prefixes import PrefixMemory
from r1ray.serving.scaling import TOKENS_DUE, TokenScaling

SYSTEM = list(range(128))
FREE = {"a": 0, "b": 0}


def digests(*more: int) -> list[bytes]:
    return chain_digests([*SYSTEM, *([more[0]] * 64 if more else [])])


def test_a_prompt_goes_where_its_longest_known_beginning_went() -> None:
    memory = PrefixMemory[str](100)
    assert memory.choose(digests(), FREE, 4) is None
    memory.remember(digests(1), "a")
    memory.remember(digests(2), "b")  # the common beginning went there last
    assert memory.choose(digests(1), FREE, 4) == "a"
    assert memory.choose(digests(2), FREE, 4) == "b"
    assert memory.choose(digests(3), FREE, 4) == "b"
    assert memory.choose(chain_digests([7] * 64), FREE, 4) is None
    assert memory.choose([], FREE, 4) is None


def test_a_busy_place_gives_way_unless_all_are_as_busy() -> None:
    memory = PrefixMemory[str](100)
    memory.remember(digests(), "a")
    assert memory.choose(digests(), {"a": 3, "b": 0}, 4) == "a"
    assert memory.choose(digests(), {"a": 4, "b": 3}, 4) is None
    assert memory.choose(digests(), {"a": 4, "b": 4}, 4) == "a"


def test_a_place_that_is_gone_is_not_chosen() -> None:
    memory = PrefixMemory[str](100)
    memory.remember(digests(), "a")
    memory.remember(digests(1), "gone")
    memory.remember(digests(), "a")
    assert memory.choose(digests(1), FREE, 4) == "a"


def test_what_was_not_seen_for_the_longest_time_is_forgotten() -> None:
    memory = PrefixMemory[str](2)
    first, second = chain_digests([1] * 64), chain_digests([2] * 64)
    memory.remember(first, "a")
    memory.remember(second, "a")
    memory.remember(first, "a")
    memory.remember(chain_digests([3] * 64), "b")
    assert memory.choose(first, FREE, 4) == "a"
    assert memory.choose(second, FREE, 4) is None


@pytest.mark.parametrize(("due", "wanted"), [(0, 1), (900, 1), (1001, 2), (2500, 3), (99_000, 4)])
def test_there_are_as_many_replicas_as_there_is_work_for(due: float, wanted: int) -> None:
    context = SimpleNamespace(
        aggregated_metrics={TOKENS_DUE: {"r1": due / 2, "r2": due / 2}},
        capacity_adjusted_min_replicas=1,
        capacity_adjusted_max_replicas=4,
    )
    assert TokenScaling(1000)(cast(Any, context)) == (wanted, {})


def test_without_figures_there_are_the_fewest() -> None:
    context = SimpleNamespace(
        aggregated_metrics={}, capacity_adjusted_min_replicas=2, capacity_adjusted_max_replicas=4
    )
    assert TokenScaling(1000)(cast(Any, context)) == (2, {})
