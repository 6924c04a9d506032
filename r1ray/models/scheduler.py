"""What the next forward of the engine computes, and which pages that takes: no tensors.

1. Requests are admitted in the order they came, while there are pages for what each will probably
   take: its prompt, less what is known of it already, and the answer that is predicted.
2. A step has one token of every sequence that is being answered, and pieces of prompts with what is
   left of the step's tokens, the oldest first: a long prompt delays the others' next tokens by its
   piece, not by all of it. Pieces of prompts begin and end at blocks of 64 tokens.
3. Where an answer needs a page and there is none, the sequence that came last gives up its pages
   and waits again, with the tokens it has. These are then read one by one, as they were written.

So the oldest sequence always goes on, and whatever is admitted ends: pages that it alone could need
are checked when it comes.

Price: O(sequences) a step, and one digest a page of every prompt.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from r1ray.errors import ShapeError
from r1ray.models.answer_lengths import AnswerLengths
from r1ray.models.pages import PagePool, chain_digests, count_pages
from r1ray.ops.block_selection import BLOCK

__all__ = ["Piece", "Scheduled", "Scheduler", "Step"]


@dataclass(eq=False)
class Scheduled:
    """One sequence.

    Attributes:
        predicted_new: tokens that the answer will probably have; pages are reserved for as many.
        output_ids: the answer's tokens so far; the last one has no keys and values yet.
        pages: of the first 64 tokens, the next 64, ...
        num_stored: tokens whose keys and values are there.
        num_cached: of the prompt's tokens, those that were known when it was admitted first.
        num_preempted: how often it had to give its pages up.
    """

    request_id: str
    prompt_ids: Sequence[int]
    max_new_tokens: int
    predicted_new: int
    arrival: int
    digests: list[bytes]
    output_ids: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    num_stored: int = 0
    num_cached: int | None = None
    num_preempted: int = 0

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def num_left(self) -> int:
        """Tokens without keys and values."""
        return self.num_tokens - self.num_stored

    @property
    def num_expected_pages(self) -> int:
        """That it will take in all, as far as is known."""
        expected = len(self.prompt_ids) + self.predicted_new
        return count_pages(max(self.num_tokens, expected))

    def tokens(self, start: int, stop: int) -> list[int]:
        """Those at positions `start` to `stop` - 1."""
        num_prompt = len(self.prompt_ids)
        return [
            *self.prompt_ids[start:stop],
            *self.output_ids[max(0, start - num_prompt) : max(0, stop - num_prompt)],
        ]


@dataclass(frozen=True)
class Piece:
    """Tokens that a step gives keys and values to.

    Attributes:
        is_prompt: whole blocks among them are attended to as such; else all one by one.
        is_last: the model is to choose the token behind them.
    """

    sequence: Scheduled
    start: int
    count: int
    is_prompt: bool
    is_last: bool


@dataclass(frozen=True)
class Step:
    """One forward, or two: single tokens go together.

    Attributes:
        single: pieces of one token each.
        longer: others.
        preempted: sequences that gave their pages up for it.
    """

    single: list[Piece]
    longer: list[Piece]
    preempted: list[Scheduled]

    def __iter__(self) -> Iterator[Piece]:
        yield from self.single
        yield from self.longer


class Scheduler:
    """Not thread-safe: one thread adds, plans and reports.

    Args:
        max_sequences: that have pages at once.
        max_step_tokens: of one step; at least one block of a prompt is read in each.
        lengths: how long answers are; None reserves as much as each may have.
        shares_beginnings: whether what is known of one prompt may serve another.

    Attributes:
        num_preempted: times that a sequence had to give its pages up.
        num_prompt_tokens, num_cached_tokens: of the sequences admitted, and known among them.
    """

    def __init__(
        self,
        pool: PagePool,
        *,
        max_sequences: int,
        max_step_tokens: int,
        lengths: AnswerLengths | None = None,
        shares_beginnings: bool = True,
    ) -> None:
        if max_sequences < 1 or max_step_tokens < BLOCK:
            raise ShapeError(
                f"{max_sequences} sequences and {max_step_tokens} tokens a step are too few; at "
                f"least one sequence and {BLOCK} tokens are needed"
            )
        self._pool = pool
        self._max_sequences, self._max_step_tokens = max_sequences, max_step_tokens
        self._lengths = lengths
        self._shares_beginnings = shares_beginnings
        self._waiting: list[Scheduled] = []  # by arrival
        self._running: list[Scheduled] = []  # by arrival
        self._num_arrived = 0
        self.num_preempted = self.num_prompt_tokens = self.num_cached_tokens = 0

    @property
    def waiting(self) -> Sequence[Scheduled]:
        return self._waiting

    @property
    def running(self) -> Sequence[Scheduled]:
        return self._running

    def add(self, request_id: str, prompt_ids: Sequence[int], max_new_tokens: int) -> Scheduled:
        """Queue a request.

        Raises:
            ShapeError: it is empty, or would not fit into the pool alone.
        """
        if not prompt_ids or max_new_tokens < 1:
            raise ShapeError("a request needs at least one prompt token and one new token")
        needed = count_pages(len(prompt_ids) + max_new_tokens)
        if needed > self._pool.num_pages:
            raise ShapeError(
                f"{len(prompt_ids)} prompt tokens + {max_new_tokens} new tokens take {needed} "
                f"pages of {BLOCK} tokens, and the pool has {self._pool.num_pages}; shorten one of "
                "them"
            )
        sequence = Scheduled(
            request_id,
            prompt_ids,
            max_new_tokens,
            self._predict(0, max_new_tokens),
            self._num_arrived,
            chain_digests(prompt_ids) if self._shares_beginnings else [],
        )
        self._num_arrived += 1
        self._waiting.append(sequence)
        return sequence

    @property
    def is_writing(self) -> bool:
        """Whether a sequence waits for its next token alone."""
        return any(sequence.num_left == 1 for sequence in self._running)

    def plan(self, max_tokens: int | None = None) -> Step:
        """The next step; nothing in it where nothing is left to do.

        Args:
            max_tokens: of it, if fewer than `max_step_tokens`.
        """
        self._admit()
        preempted: list[Scheduled] = []
        budget = min(self._max_step_tokens, max_tokens or self._max_step_tokens)
        single: list[Piece] = []
        for sequence in list(self._running):
            is_due = sequence.num_left == 1 and sequence not in preempted
            if is_due and self._make_room(sequence, 1, preempted):
                single.append(_piece(sequence, 1))
                budget -= 1
        longer: list[Piece] = []
        for sequence in list(self._running):
            count = _fit(sequence, max(budget, 0 if longer else BLOCK))
            if sequence.num_left > 1 and count and sequence not in preempted:
                # Pages of prompts are there since admission, but for tokens that were predicted.
                if not self._make_room(sequence, count, preempted):
                    break
                longer.append(_piece(sequence, count))
                budget -= count
        # A later piece may have taken the pages of one that was planned already.
        single, longer = (
            [piece for piece in pieces if piece.sequence not in preempted]
            for pieces in (single, longer)
        )
        return Step(single, longer, preempted)

    def report(self, step: Step, chosen: Mapping[str, int]) -> None:
        """Note that `step` was computed.

        Args:
            chosen: the token behind every last piece, by request id; one that ends its answer
                is left out, and the sequence is to be removed.
        """
        for piece in step:
            sequence = piece.sequence
            first = sequence.num_stored // BLOCK
            sequence.num_stored = piece.start + piece.count
            for index in range(first, min(len(sequence.digests), sequence.num_stored // BLOCK)):
                self._pool.publish(sequence.pages[index], sequence.digests[index])
            if piece.is_last and sequence.request_id in chosen:
                sequence.output_ids.append(chosen[sequence.request_id])
                num_written = len(sequence.output_ids)
                if num_written % BLOCK == 0 or num_written >= sequence.predicted_new:
                    sequence.predicted_new = self._predict(num_written, sequence.max_new_tokens)

    def remove(self, request_id: str) -> Scheduled | None:
        """Forget a request that has ended or is not wanted any more; its pages are released."""
        for sequences in (self._running, self._waiting):
            for index, sequence in enumerate(sequences):
                if sequence.request_id == request_id:
                    self._pool.release(sequence.pages)
                    sequence.pages = []
                    return sequences.pop(index)
        return None

    def _predict(self, num_written: int, max_new_tokens: int) -> int:
        if self._lengths is None:
            return max_new_tokens
        return self._lengths.predict(num_written, max_new_tokens)

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self._max_sequences:
            sequence = self._waiting[0]
            # The last token is always computed: what follows it is to be chosen.
            known = sequence.digests[: (len(sequence.prompt_ids) - 1) // BLOCK]
            pages = self._pool.match(known)
            needed = sequence.num_expected_pages - len(pages)
            if needed > self._pool.num_available - self._count_reserved():
                self._pool.release(pages)
                return
            self._waiting.pop(0)
            missing = count_pages(len(sequence.prompt_ids)) - len(pages)
            sequence.pages = pages + self._pool.allocate(missing)
            sequence.num_stored = len(pages) * BLOCK
            if sequence.num_cached is None:
                sequence.num_cached = sequence.num_stored
                self.num_prompt_tokens += len(sequence.prompt_ids)
                self.num_cached_tokens += sequence.num_cached
            self._insert(self._running, sequence)

    def _count_reserved(self) -> int:
        return sum(max(0, item.num_expected_pages - len(item.pages)) for item in self._running)

    def _make_room(self, sequence: Scheduled, count: int, preempted: list[Scheduled]) -> bool:
        """Give `sequence` the pages of its next tokens; False where it had to give up its own."""
        missing = count_pages(sequence.num_stored + count) - len(sequence.pages)
        while missing > self._pool.num_available:
            victim = self._running[-1]
            self._preempt(victim)
            preempted.append(victim)
            if victim is sequence:
                return False
        if missing > 0:
            sequence.pages += self._pool.allocate(missing)
        return True

    def _preempt(self, sequence: Scheduled) -> None:
        self._running.remove(sequence)
        self._pool.release(sequence.pages)
        sequence.pages, sequence.num_stored = [], 0
        sequence.num_preempted += 1
        self.num_preempted += 1
        self._insert(self._waiting, sequence)

    @staticmethod
    def _insert(sequences: list[Scheduled], sequence: Scheduled) -> None:
        at = len(sequences)
        while at and sequences[at - 1].arrival > sequence.arrival:
            at -= 1
        sequences.insert(at, sequence)


def _fit(sequence: Scheduled, budget: int) -> int:
    """Tokens of the next piece: up to the end of the prompt, or blocks of it; or of the answer."""
    num_prompt = len(sequence.prompt_ids)
    if sequence.num_stored >= num_prompt:
        return min(sequence.num_left, budget)
    left = num_prompt - sequence.num_stored
    return left if left <= budget else budget // BLOCK * BLOCK


def _piece(sequence: Scheduled, count: int) -> Piece:
    start = sequence.num_stored
    return Piece(
        sequence,
        start,
        count,
        is_prompt=start < len(sequence.prompt_ids),
        is_last=start + count == sequence.num_tokens,
    )
