"""The scheduler against a model that is a hash: every page holds what its reader believes."""

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1ray.errors import ShapeError
from r1ray.models.answer_lengths import AnswerLengths
from r1ray.models.pages import PagePool, chain_digests
from r1ray.models.scheduler import Scheduler, Step
from r1ray.ops.block_selection import BLOCK

VOCABULARY = 50


class HashModel:
    """The next token is a hash of all before it, read from the pages themselves."""

    def __init__(self, pool: PagePool) -> None:
        self.slots: list[list[Any]] = [[None] * BLOCK for _ in range(pool.num_pages)]

    def run(self, step: Step) -> dict[str, int]:
        chosen = {}
        for piece in step:
            sequence = piece.sequence
            stop = piece.start + piece.count
            for position in range(piece.start, stop):
                # How a token was computed is part of what is stored.
                kind = "prompt" if piece.is_prompt else "answer"
                [token] = sequence.tokens(position, position + 1)
                page = sequence.pages[position // BLOCK]
                self.slots[page][position % BLOCK] = (position, token, kind)
            stored = [
                self.slots[sequence.pages[position // BLOCK]][position % BLOCK]
                for position in range(stop)
            ]
            num_prompt = len(sequence.prompt_ids)
            assert stored == [
                (position, token, "prompt" if position < num_prompt else "answer")
                for position, token in enumerate(sequence.tokens(0, stop))
            ]
            if piece.is_last:
                chosen[sequence.request_id] = next_token([token for _, token, _ in stored])
        return chosen


class NextToken(AnswerLengths):
    """Predicts too little: pages run out."""

    def predict(self, num_written: int, max_new_tokens: int) -> int:
        return min(num_written + 1, max_new_tokens)


class Guess(AnswerLengths):
    """Predicts anything that is possible."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._chance = random.Random(seed)

    def predict(self, num_written: int, max_new_tokens: int) -> int:
        return self._chance.randint(min(num_written + 1, max_new_tokens), max_new_tokens)


def next_token(tokens: list[int]) -> int:
    return random.Random(str(tokens)).randrange(VOCABULARY)


def alone(prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


def drive(
    scheduler: Scheduler, pool: PagePool, wanted: dict[str, int], arrivals: dict[int, Any]
) -> tuple[dict[str, list[int]], list[Step]]:
    """All answers, and the steps that they took."""
    model, steps, answers = HashModel(pool), [], dict[str, list[int]]()
    at = 0
    while arrivals or scheduler.waiting or scheduler.running:
        for request in arrivals.pop(at, []):
            scheduler.add(*request)
        step = scheduler.plan()
        assert list(step) or not scheduler.waiting, "something always goes on"
        assert all(len(piece.sequence.pages) * BLOCK >= piece.start + piece.count for piece in step)
        scheduler.report(step, model.run(step))
        steps.append(step)
        for sequence in list(scheduler.running):
            if len(sequence.output_ids) >= wanted[sequence.request_id]:
                answers[sequence.request_id] = sequence.output_ids
                scheduler.remove(sequence.request_id)
        at += 1
        assert at < 5000
    return answers, steps


REQUESTS = st.lists(
    st.tuples(
        st.integers(1, 5 * BLOCK) | st.sampled_from([1, 63, 64, 65, 128]),  # prompt tokens
        st.integers(0, 3),  # which beginning it has
        st.integers(1, 2 * BLOCK),  # the most new tokens
        st.integers(0, 30),  # arrival
    ),
    min_size=1,
    max_size=10,
)


@settings(max_examples=150, deadline=None)
@given(
    requests=REQUESTS,
    num_pages=st.integers(7, 30),
    max_sequences=st.integers(1, 6),
    budget=st.sampled_from([64, 100, 256, 1024]),
    seed=st.integers(0, 100),
)
def test_answers_are_those_of_each_alone_and_no_page_is_lost(
    requests: list[tuple[int, int, int, int]],
    num_pages: int,
    max_sequences: int,
    budget: int,
    seed: int,
) -> None:
    pool = PagePool(num_pages)
    scheduler = Scheduler(
        pool, max_sequences=max_sequences, max_step_tokens=budget, lengths=Guess(seed)
    )
    wanted, prompts = dict[str, int](), dict[str, list[int]]()
    arrivals = dict[int, list[Any]]()
    chance = random.Random(seed)
    for number, (length, beginning, most, arrival) in enumerate(requests):
        name = f"r{number}"
        prompts[name] = [beginning] * (length // 2) + [number] * (length - length // 2)
        wanted[name] = chance.randint(1, most)
        arrivals.setdefault(arrival, []).append((name, prompts[name], most))
    answers, steps = drive(scheduler, pool, wanted, arrivals)
    for name, answer in answers.items():
        assert answer == alone(prompts[name], wanted[name])
    assert len(answers) == len(requests)
    assert pool.num_available == num_pages
    for step in steps:
        assert all(piece.count == 1 for piece in step.single)
        pieces = [piece for piece in step.longer if piece.is_prompt]
        assert all(piece.start % BLOCK == 0 for piece in pieces)
        tokens = sum(piece.count for piece in step)
        assert tokens <= max(budget, BLOCK + len(step.single))


def test_a_known_beginning_is_not_computed_again() -> None:
    pool = PagePool(20)
    scheduler = Scheduler(pool, max_sequences=4, max_step_tokens=1024)
    prompt = list(range(3 * BLOCK + 5))
    first = scheduler.add("a", prompt, 4)
    answers, _ = drive(scheduler, pool, {"a": 4}, {})
    assert first.num_cached == 0
    second = scheduler.add("b", [*prompt[: 3 * BLOCK], 7], 2)
    step = scheduler.plan()
    assert second.num_cached == 3 * BLOCK
    [piece] = step
    assert (piece.start, piece.count) == (3 * BLOCK, 1)
    scheduler.remove("b")
    whole = scheduler.add("c", prompt[: 3 * BLOCK], 2)  # its last block is computed again
    scheduler.plan()
    assert whole.num_cached == 2 * BLOCK
    assert answers["a"] == alone(prompt, 4)


def test_running_answers_go_on_while_a_long_prompt_is_read() -> None:
    pool = PagePool(100)
    scheduler = Scheduler(pool, max_sequences=4, max_step_tokens=256)
    model = HashModel(pool)
    for name in ("a", "b"):
        scheduler.add(name, [1, 2, 3], 100)
    scheduler.report(step := scheduler.plan(), model.run(step))
    scheduler.add("long", list(range(2000)), 5)
    for _ in range(7):
        step = scheduler.plan()
        assert {piece.sequence.request_id for piece in step.single} == {"a", "b"}
        assert [piece.count for piece in step.longer] == [192]  # whole blocks within the budget
        scheduler.report(step, model.run(step))


def test_the_newest_gives_up_its_pages_and_is_answered_all_the_same() -> None:
    pool = PagePool(5)
    scheduler = Scheduler(pool, max_sequences=4, max_step_tokens=256, lengths=NextToken())
    prompts = {"old": [1] * 60, "new": [2] * 60}
    arrivals = {0: [(name, prompt, 200) for name, prompt in prompts.items()]}
    answers, steps = drive(scheduler, pool, {"old": 190, "new": 190}, arrivals)
    assert [item.request_id for step in steps for item in step.preempted] == ["new"]
    assert answers == {name: alone(prompt, 190) for name, prompt in prompts.items()}


def test_what_gives_its_pages_to_a_later_piece_of_a_step_is_not_in_it() -> None:
    pool = PagePool(4)
    scheduler = Scheduler(pool, max_sequences=4, max_step_tokens=64, lengths=NextToken())
    model = HashModel(pool)
    wanted = {"old": 140, "a": 200, "c": 9, "d": 9, "e": 9}
    scheduler.add("old", [1] * 10, 140)
    scheduler.add("a", [2] * 10, 200)
    num_preempted = 0
    for number in range(1000):
        if number == 130:
            for name in "cde":
                scheduler.add(name, [3] * 5, 20)
        step = scheduler.plan()
        num_preempted += len(step.preempted)
        assert all(piece.sequence.pages for piece in step)
        scheduler.report(step, model.run(step))
        for sequence in list(scheduler.running):
            if len(sequence.output_ids) >= wanted[sequence.request_id]:
                scheduler.remove(sequence.request_id)
        if not (scheduler.running or scheduler.waiting):
            break
    assert num_preempted
    assert pool.num_available == 4


def test_what_can_never_fit_is_refused() -> None:
    scheduler = Scheduler(PagePool(2), max_sequences=1, max_step_tokens=64)
    with pytest.raises(ShapeError, match="take 3 pages of 64 tokens, and the pool has 2"):
        scheduler.add("a", [1] * 100, 29)
    scheduler.add("b", [1] * 100, 28)
    with pytest.raises(ShapeError, match="at least one prompt token"):
        scheduler.add("c", [], 5)


def test_kept_pages_give_way_the_longest_kept_first_and_ends_before_beginnings() -> None:
    pool = PagePool(4)
    digests = chain_digests(list(range(4 * BLOCK)))
    pages = pool.allocate(3)
    for page, digest in zip(pages, digests, strict=False):
        pool.publish(page, digest)
    pool.release(pages)
    assert (pool.num_available, pool.num_kept) == (4, 3)
    taken = pool.allocate(2)  # the free one, and the last of the kept
    assert pool.match(digests) == pages[:2]
    with pytest.raises(ShapeError, match="1 pages are asked for, 0 are available"):
        pool.allocate(1)
    pool.release(taken)
    pool.release(pages[:2])
    assert pool.num_available == 4
