"""Which group answers: by what was measured, what is due, and what is known."""

from collections.abc import Callable
from contextlib import ExitStack

import pytest

from r1ray.config.serving import ReplicaConfig
from r1ray.models.answer_lengths import AnswerLengths
from r1ray.models.requests import GenerationRequest, TokenEvent
from r1ray.models.speed import Speed
from r1ray.serving.group_choice import GroupBoard, Work, estimate_s

FAST = Speed(((1, 0.01), (8, 0.02)), ((64, 0.0001),))
SLOW = Speed(((1, 0.1), (8, 0.2)), ((64, 0.002),))
READER = Speed(((1, 0.1),), ((64, 0.0001),))
WRITER = Speed(((1, 0.01),), ((64, 0.002),))
LIMITS = ReplicaConfig(max_concurrency=2, max_queued_requests=3)


def ask(num_prompt: int = 10, num_new: int = 10, first: int = 0) -> GenerationRequest:
    return GenerationRequest("r", [first] * num_prompt, num_new, frozenset())


def board(lengths: dict[int, int] | None = None, **speeds: Speed) -> GroupBoard:
    found = GroupBoard(dict.fromkeys(speeds, LIMITS), AnswerLengths(lengths))
    for name, speed in speeds.items():
        found.report(name, [speed])
    return found


def choose(found: GroupBoard, request: GenerationRequest) -> str | None:
    return found.rank(request)[0]


def test_alone_a_request_takes_its_reading_and_its_steps() -> None:
    seconds = estimate_s(Work(0, 100, 10), [], FAST, num_replicas=1, max_concurrency=2)
    assert seconds == pytest.approx(100 * 0.0001 + 10 * 0.01)


def test_what_is_ahead_is_read_first_and_written_beside() -> None:
    ahead = [Work(0, 50, 7)] * 7
    seconds = estimate_s(Work(0, 100, 10), ahead, FAST, num_replicas=1, max_concurrency=8)
    assert seconds == pytest.approx(450 * 0.0001 + 10 * 0.02)
    halved = estimate_s(Work(0, 100, 10), ahead[:6], FAST, num_replicas=2, max_concurrency=8)
    assert halved == pytest.approx(250 * 0.0001 + 10 * FAST.writing_s(4))


def test_where_no_place_is_free_one_is_waited_for() -> None:
    ahead = [Work(5, 0, 40), Work(5, 0, 20), Work(0, 0, 30)]
    seconds = estimate_s(Work(5, 0, 10), ahead, FAST, num_replicas=1, max_concurrency=2)
    step = FAST.writing_s(2)
    assert seconds == pytest.approx(2 / 2 * 30 * step + 10 * step)


def test_more_ahead_never_takes_less_time() -> None:
    times = [
        estimate_s(
            Work(0, 10, 10), [Work(0, 10, 10)] * count, SLOW, num_replicas=2, max_concurrency=4
        )
        for count in range(30)
    ]
    assert times == sorted(times)


def test_long_prompts_go_to_who_reads_fast_and_long_answers_to_who_writes_fast() -> None:
    found = board(reader=READER, writer=WRITER)
    assert choose(found, ask(num_prompt=1000, num_new=1)) == "reader"
    assert choose(found, ask(num_prompt=10, num_new=100)) == "writer"


def test_answers_count_as_long_as_they_are_predicted() -> None:
    found = board({2: 10}, reader=READER, writer=WRITER)
    assert choose(found, ask(num_prompt=1000, num_new=500)) == "reader"


def test_the_slow_group_gets_what_would_wait_longer_at_the_fast_one() -> None:
    found = board(fast=FAST, slow=SLOW)
    names = []
    with ExitStack() as open_requests:  # none is done before the others
        for number in range(10):
            request = ask(num_new=20, first=number)
            names.append(choose(found, request))
            open_requests.enter_context(found.give(names[-1], request))
    assert names[:4] == ["fast"] * 4
    assert names.count("slow") >= 3
    assert names.count("fast") <= LIMITS.max_concurrency + LIMITS.max_queued_requests


def test_who_is_done_makes_room() -> None:
    found = board(fast=FAST, slow=SLOW)
    with found.give("fast", ask(num_prompt=100_000)):
        assert choose(found, ask()) == "slow"
    assert choose(found, ask()) == "fast"


def test_progress_counts_what_is_left() -> None:
    found = board(fast=FAST, slow=SLOW)
    with found.give("fast", ask(num_prompt=100_000)) as progress:
        assert choose(found, ask()) == "slow"
        progress.note([TokenEvent("r", 1, None)])  # all of the prompt was read
        assert choose(found, ask()) == "fast"


def test_what_was_read_before_need_not_be_read_again() -> None:
    found = board(fast=FAST, slow=SLOW)
    prompt = ask(num_prompt=100_000, num_new=1)
    with found.give("slow", prompt) as progress:
        progress.note([TokenEvent("r", 1, "length")])
    assert choose(found, prompt) == "slow"
    assert choose(found, ask(num_prompt=100_000, num_new=1, first=7)) == "fast"
    found.report("slow", [])
    found.report("slow", [SLOW])  # by replicas that have read nothing
    assert choose(found, prompt) == "fast"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda found: found.report("fast", []), "slow"),
        (lambda found: [found.report(name, []) for name in ("fast", "slow")], "fast"),
        (lambda found: found.report("slow", [FAST, FAST]), "fast"),  # as fast: the first
    ],
)
def test_a_group_that_is_gone_gets_nothing(
    change: Callable[[GroupBoard], None], expected: str
) -> None:
    found = board(fast=FAST, slow=SLOW)
    change(found)
    assert choose(found, ask()) == expected


def test_the_full_come_behind_others_and_the_silent_last() -> None:
    found = board(slow=SLOW, fast=FAST, gone=FAST)
    found.report("gone", [])
    assert found.rank(ask()) == ["fast", "slow", "gone"]
    with ExitStack() as open_requests:
        for number in range(LIMITS.max_concurrency + LIMITS.max_queued_requests):
            short = ask(num_prompt=1, num_new=1, first=number)
            open_requests.enter_context(found.give("fast", short))
        assert found.rank(ask()) == ["slow", "fast", "gone"]


def test_answers_that_end_teach_how_long_answers_are() -> None:
    lengths = AnswerLengths()
    found = GroupBoard({"a": LIMITS}, lengths)
    with found.give("a", ask(num_new=100)) as progress:
        progress.note([TokenEvent("r", 1, None)] * 4)
        progress.note([TokenEvent("r", None, "stop")])
    assert lengths.predict(0, 100) == 5
