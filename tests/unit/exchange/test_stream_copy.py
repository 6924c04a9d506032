"""Between a worker's weights and the global ones is exactly what nobody has merged yet."""

import pytest
import torch
from torch import Tensor, nn

from r1ray.errors import ExchangeError
from r1ray.exchange.codecs import get_codec
from r1ray.exchange.stream_copy import FragmentCopy
from r1ray.exchange.stream_fragments import Fragment, cut_fragments
from r1ray.exchange.stream_merge import Broadcast, Contribution

CODEC = get_codec("int4_zstd")
NUMEL = 600


def _copy(rank: int = 0, num_shards: int = 2) -> tuple[Fragment, FragmentCopy]:
    generator = torch.Generator().manual_seed(0)
    parameter = nn.Parameter(torch.randn(NUMEL, generator=generator))
    fragment = cut_fragments([parameter], 1, num_shards)[0]
    return fragment, FragmentCopy(fragment, CODEC, rank)


def _learn(fragment: Fragment, seed: int) -> Tensor:
    step_E = 0.01 * torch.randn(NUMEL, generator=torch.Generator().manual_seed(seed))
    fragment.add_(step_E)
    return step_E


def _decoded(contributions: list[Contribution]) -> Tensor:
    return torch.cat([CODEC.decode(item.code, NUMEL // 2) for item in contributions])


def _broadcast(copy: FragmentCopy, version: int, merged: tuple[bool, bool]) -> Tensor:
    """Both owners move their shard; returns what the global weights move by."""
    moves = []
    for owner in range(2):
        generator = torch.Generator().manual_seed(10 * version + owner)
        moved_E = 0.1 * torch.randn(NUMEL // 2, generator=generator)
        code, coded_E = CODEC.encode_with_reconstruction(moved_E)
        copy.receive(owner, Broadcast(version, merged, code))
        moves.append(coded_E)
    return torch.cat(moves)


def _close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)  # float32 sums of numbers < 4


def test_taking_a_merge_over_keeps_the_steps_made_meanwhile_and_the_rounding() -> None:
    fragment, copy = _copy()
    before_E = copy.global_E.clone()
    learned_E = _learn(fragment, 1)
    sent_E = -_decoded(copy.contribute(0))
    meanwhile_E = _learn(fragment, 2)
    moved_E = _broadcast(copy, 0, (True, True))
    assert copy.lacking() == []
    copy.take_over()
    _close(copy.global_E, before_E + moved_E)
    _close(fragment.read() - copy.global_E, meanwhile_E + learned_E - sent_E)
    assert copy.residual_norm == pytest.approx(float((learned_E - sent_E).norm()), rel=1e-3)
    assert copy.under_way is None


def test_a_delta_that_missed_its_merge_is_sent_once_and_comes_off_when_it_is_merged() -> None:
    fragment, copy = _copy()
    _learn(fragment, 1)
    first_E = -_decoded(copy.contribute(0))
    _broadcast(copy, 0, (False, True))
    copy.take_over()
    rest_E = fragment.read() - copy.global_E - first_E
    learned_E = _learn(fragment, 2)
    second_E = -_decoded(copy.contribute(1))
    # Sent is what is new, to within rounding: half of amax/7 at each element.
    bound = (rest_E + learned_E).abs().max() / 14 * 1.02
    assert (second_E - rest_E - learned_E).abs().max() <= bound
    _broadcast(copy, 1, (True, True))
    copy.take_over()
    _close(fragment.read() - copy.global_E, rest_E + learned_E - second_E)


def test_a_version_is_over_when_the_last_owner_has_answered() -> None:
    fragment, copy = _copy()
    _learn(fragment, 1)
    copy.contribute(0)
    code = CODEC.encode(torch.ones(NUMEL // 2))
    copy.receive(1, Broadcast(0, (True, True), code))
    assert copy.lacking() == [0]
    before_E = copy.global_E.clone()
    copy.take_over()
    assert copy.under_way == 0
    moved_E = copy.global_E - before_E
    assert not moved_E[: NUMEL // 2].any()
    assert moved_E[NUMEL // 2 :].all()
    copy.receive(0, Broadcast(0, (True, True), code))
    copy.take_over()
    assert copy.under_way is None


def test_a_worker_that_lags_takes_versions_over_in_their_order() -> None:
    fragment, copy = _copy()
    _learn(fragment, 1)
    copy.contribute(0)
    first_E = _broadcast(copy, 0, (True, True))
    second_E = _broadcast(copy, 1, (False, True))  # the others are ahead
    before_E = copy.global_E.clone()
    copy.take_over()
    _close(copy.global_E, before_E + first_E)
    copy.contribute(1)
    assert copy.lacking() == []
    copy.take_over()
    _close(copy.global_E, before_E + first_E + second_E)


def test_a_broadcast_out_of_order_is_refused() -> None:
    _, copy = _copy()
    with pytest.raises(ExchangeError, match="rank 1 broadcast version 1 after -1"):
        copy.receive(1, Broadcast(1, (True, True), torch.zeros(9, dtype=torch.uint8)))


def test_rounding_is_made_up_for_by_later_contributions() -> None:
    fragment, copy = _copy()
    start_E = copy.global_E.clone()
    total_E = torch.zeros(NUMEL)
    for version in range(20):
        if version < 15:
            _learn(fragment, version)
        total_E -= _decoded(copy.contribute(version))
        for owner in range(2):
            code = CODEC.encode(torch.zeros(NUMEL // 2))
            copy.receive(owner, Broadcast(version, (True, True), code))
        copy.take_over()
    learned_E = fragment.read() + total_E - start_E
    # Every round without learning takes the rest down to a seventh of half at most.
    assert (learned_E - total_E).abs().max() < 1e-5
    assert total_E.norm() > 0.5


def test_a_delta_that_missed_its_merge_counts_as_unsent_in_a_checkpoint() -> None:
    fragment, copy = _copy()
    copy.num_targets = 5
    _learn(fragment, 1)
    copy.contribute(0)
    copy.num_targets = 7
    _broadcast(copy, 0, (False, True))
    copy.take_over()
    _, other = _copy(rank=1)
    states = [copy.state_dict(), other.state_dict()]
    states[1]["global"] = copy.global_E[NUMEL // 2 :]  # as rank 1, which took it over too, has it
    resumed_fragment, resumed = _copy()
    resumed.load_state_dict(states, next_version=1)
    assert resumed.num_targets == 12
    assert torch.equal(resumed.global_E, copy.global_E)
    assert torch.equal(resumed_fragment.read(), fragment.read())
    unsent_E = fragment.read() - copy.global_E
    found_E = -_decoded(resumed.contribute(1))
    assert (found_E - unsent_E).abs().max() <= unsent_E.abs().max() / 14 * 1.02


def test_fragments_of_another_size_are_refused() -> None:
    _, copy = _copy()
    state = copy.state_dict()
    with pytest.raises(ExchangeError, match="300 weights, not 600"):
        copy.load_state_dict([state], next_version=0)
