"""Batched decoding, shared by evaluation, serving and on-policy training.

1. The scheduler says what a step computes (`r1ray.models.scheduler`): one token of every sequence
   that is being answered, and pieces of prompts. Sequences come and go at any step.
2. Single tokens go through the model together; so do short prompts, of float models padded on the
   right; a piece of a longer one goes alone.
3. Where a sequence's last token went through, the next one is chosen.

Price: `num_pages` pages of keys and values; two or more forwards for a step that reads prompts too.

Shape legend: B rows, T tokens, D hidden size, V vocabulary.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from r1ray.errors import ShapeError
from r1ray.models.answer_lengths import AnswerLengths
from r1ray.models.backend import Backend, DecoderBackend
from r1ray.models.decoder import Decoder
from r1ray.models.fusion import ImageContext, PlacedImages, gather_images
from r1ray.models.pace import StepPace
from r1ray.models.pages import PagePool, count_pages
from r1ray.models.requests import GenerationRequest, GeneratorStats, TokenEvent
from r1ray.models.sampling import RowSampler, SampledToken, sample_tokens
from r1ray.models.scheduler import Piece, Scheduler, Step
from r1ray.models.speed import SpeedMeter
from r1ray.ops.block_selection import BLOCK, DENSE_BLOCKS, count_chosen

if TYPE_CHECKING:
    from r1ray.models.grammar import FormCompiler  # its library is there where answers are served

__all__ = ["BatchGenerator"]


@dataclass
class _Row:
    request: GenerationRequest
    sampler: RowSampler
    num_generated: int = 0
    images: PlacedImages | None = None  # once they have been looked at


class BatchGenerator:
    """Continuous batching over one model, which must not be changed meanwhile.

    Not thread-safe: one thread adds, steps and cancels.

    Args:
        max_concurrency: sequences decoded together.
        max_context_tokens: prompt and output of one sequence together.
        max_step_tokens: of one step, as `Scheduler` has it, and of one forward, padding included.
        max_step_s: what a step should take at most while answers are being written: a long prompt
            delays the others' tokens by as much. At least a block of a prompt is read in each.
        prefill_chunk: tokens of a longer prompt that go through one forward; it bounds the memory
            of activations, and where attention is sparse has to be a multiple of 64.
        num_pages: of 64 tokens, for all sequences; None for as many as they can need.
        kv_dtype: of a decoder's cached keys and values, a floating point one or int8; None for the
            weights'. A backend has its own.
        lengths: how long answers are, and will learn; None reserves as much as each may have.
        forms: for requests that have a form; None where there are none.
        meter: notes how long every step takes, if there is one.
    Raises:
        ShapeError: attention is sparse and prefill_chunk cuts a block.
    """

    def __init__(
        self,
        model: Decoder | Backend,
        *,
        max_concurrency: int,
        max_context_tokens: int,
        max_step_tokens: int = 4096,
        max_step_s: float | None = None,
        prefill_chunk: int = 1024,
        num_pages: int | None = None,
        kv_dtype: torch.dtype | None = None,
        lengths: AnswerLengths | None = None,
        forms: "FormCompiler | None" = None,
        meter: SpeedMeter | None = None,
    ) -> None:
        backend = DecoderBackend(model, kv_dtype) if isinstance(model, Decoder) else model
        self._backend = backend
        self._max_context_tokens = max_context_tokens
        self._prefill_chunk = prefill_chunk
        self._is_sparse = backend.is_sparse
        if self._is_sparse and prefill_chunk % BLOCK:
            raise ShapeError(
                f"prefill_chunk ({prefill_chunk}) is not a multiple of {BLOCK}, the tokens "
                "of a block of sparse attention; round it"
            )
        # Rotary positions that turn with a sequence's length: prompts are read whole, and what is
        # known of another is of no use.
        self._is_whole = backend.config.rope.depends_on_length
        if self._is_whole:
            max_step_tokens = max_concurrency * (max_context_tokens + 1)
        self._max_step_tokens = max_step_tokens
        is_paced = max_step_s is not None and not self._is_whole
        self._pace = StepPace(max_step_s or 0.0) if is_paced else None
        # Padding would pass for length there.
        self._may_pad = not self._is_whole and backend.may_pad
        count = num_pages or max_concurrency * count_pages(max_context_tokens)
        self._pool = backend.build_pool(count)
        self._pages = PagePool(count)
        self._scheduler = Scheduler(
            self._pages,
            max_sequences=max_concurrency,
            max_step_tokens=max(max_step_tokens, BLOCK),
            lengths=lengths,
            shares_beginnings=not self._is_whole,
        )
        self._lengths, self._forms, self._meter = lengths, forms, meter
        self._num_new_tokens = 0
        self._sparse_share = 1.0
        self._rows: dict[str, _Row] = {}

    @property
    def num_waiting(self) -> int:
        return len(self._scheduler.waiting)

    @property
    def num_running(self) -> int:
        return len(self._scheduler.running)

    @property
    def begun(self) -> set[str]:
        """Requests that hold pages or have tokens."""
        sequences = [*self._scheduler.running, *self._scheduler.waiting]
        return {item.request_id for item in sequences if item.pages or item.output_ids}

    def stats(self) -> GeneratorStats:
        """What has been done, and what there is to do."""
        scheduler, pages = self._scheduler, self._pages
        sequences = [*scheduler.running, *scheduler.waiting]
        return GeneratorStats(
            num_running=self.num_running,
            num_waiting=self.num_waiting,
            num_tokens_due=sum(
                item.num_left + item.predicted_new - len(item.output_ids) for item in sequences
            ),
            kv_used_share=1 - pages.num_available / pages.num_pages,
            sparse_kv_share=self._sparse_share,
            num_preempted=scheduler.num_preempted,
            num_prompt_tokens=scheduler.num_prompt_tokens,
            num_cached_tokens=scheduler.num_cached_tokens,
            num_new_tokens=self._num_new_tokens,
        )

    def add(self, request: GenerationRequest) -> None:
        """Queue `request`; its events come from later steps.

        Raises:
            ShapeError: the prompt is empty, prompt and output exceed max_context_tokens, the form
                is none, or there are images and the model reads text.
        """
        if request.images and self._backend.fusion is None:
            raise ShapeError("the prompt has images, and the model reads text alone")
        needed = len(request.prompt_ids) + request.max_new_tokens
        if needed > self._max_context_tokens:
            raise ShapeError(
                f"{len(request.prompt_ids)} prompt tokens + {request.max_new_tokens} new tokens "
                f"exceed the context of {self._max_context_tokens}; shorten one of them"
            )
        form = None
        if request.form is not None:
            assert self._forms is not None, "a request has a form"
            form = self._forms.start(request.form)
        self._scheduler.add(request.request_id, request.prompt_ids, request.max_new_tokens)
        words = [token_id for token_id in request.prompt_ids if token_id >= 0]
        sampler = RowSampler(request.sampling, words, form)
        self._rows[request.request_id] = _Row(request, sampler)

    @torch.inference_mode()
    def probe(self) -> None:
        """Run a forward of one token that belongs to nobody.

        Raises:
            RuntimeError: the logits are not numbers.
        """
        spare = self._pool.slice([[self._pool.num_pages]], [0])
        ids_11 = torch.zeros(1, 1, dtype=torch.long)
        if self._meter is not None:
            self._backend.next_logits(ids_11, spare, [0])  # wakes what has slept
        started = time.perf_counter()
        is_sound = bool(self._backend.next_logits(ids_11, spare, [0]).isfinite().all())
        if self._meter is not None:  # a GPU is done now
            self._meter.note_idle(time.perf_counter() - started)
        if not is_sound:
            raise RuntimeError("the model's logits are not numbers")

    def cancel(self, request_id: str) -> None:
        """Forget a request, waiting or running; its pages are free at once. Others are fine."""
        self._scheduler.remove(request_id)
        self._rows.pop(request_id, None)

    @torch.inference_mode()
    def step(self) -> list[TokenEvent]:
        """Compute what the scheduler plans: a token of every answer, and of prompts what is due."""
        started = time.perf_counter()
        is_writing = self._scheduler.is_writing
        step = self._scheduler.plan(self._pace.max_tokens if self._pace and is_writing else None)
        groups = [step.single] if step.single else []
        groups += self._group(step.longer)
        found = [logits for group in groups if (logits := self._run(group)) is not None]
        sequences = [piece.sequence for group in groups for piece in group if piece.is_last]
        events: list[TokenEvent] = []
        chosen: dict[str, int] = {}
        if found:
            rows = [self._rows[sequence.request_id] for sequence in sequences]
            logits_LV = torch.cat(found) if len(found) > 1 else found[0]
            tokens = sample_tokens(logits_LV, [row.sampler for row in rows])
            for sequence, row, sampled in zip(sequences, rows, tokens, strict=True):
                event = replace(_note(row, sampled), num_cached=sequence.num_cached or 0)
                events.append(event)
                if event.finish_reason is None and event.failure is None:
                    chosen[row.request.request_id] = sampled.token_id
        self._scheduler.report(step, chosen)
        self._note_time(time.perf_counter() - started, step)
        self._num_new_tokens += sum(event.token_id is not None for event in events)
        if self._is_sparse and step.single:
            self._sparse_share = _attended_share([piece.start // BLOCK for piece in step.single])
        for event in events:
            if event.request_id not in chosen:
                if self._lengths is not None and event.finish_reason is not None:
                    num_written = self._rows[event.request_id].num_generated
                    self._lengths.observe(num_written, was_cut=event.finish_reason == "length")
                self.cancel(event.request_id)
        return events

    def _note_time(self, seconds: float, step: Step) -> None:
        if self._pace is not None:
            num_read = sum(piece.count for piece in step.longer)
            self._pace.note(seconds, num_read, is_writing=bool(step.single))
        if self._meter is not None:
            pieces = [(piece.start, piece.count) for piece in step.longer]
            self._meter.note(seconds, pieces, len(step.single))

    def _group(self, pieces: Sequence[Piece]) -> list[list[Piece]]:
        """Pieces that go through one forward, padded to the longest: short ones of prompts."""
        groups: list[list[Piece]] = []
        for piece in pieces:
            if groups and self._may_join(groups[-1], piece):
                groups[-1].append(piece)
            else:
                groups.append([piece])
        return groups

    def _may_join(self, group: Sequence[Piece], piece: Piece) -> bool:
        both = [*group, piece]
        longest = max(item.count for item in both)
        end = max(item.start for item in both) + longest
        most = min(
            self._prefill_chunk,
            DENSE_BLOCKS * BLOCK,
            BLOCK * max(len(item.sequence.pages) for item in both),
        )
        if end > most or longest * len(both) > self._max_step_tokens:
            return False
        is_equal = len({(item.start, item.count) for item in both}) == 1
        return all(item.is_prompt for item in both) and (is_equal or self._may_pad)

    def _run(self, group: Sequence[Piece]) -> Tensor | None:
        """Logits [L, V] behind those pieces that are their sequences' last, if any is."""
        longest = max(piece.count for piece in group)
        is_written = not group[0].is_prompt and longest > 1
        size = longest if len(group) > 1 or self._is_whole else self._prefill_chunk
        if is_written and self._is_whole:
            size = 1  # each has the positions of its own time
        ids_BT = torch.tensor(
            [
                piece.sequence.tokens(piece.start, piece.start + piece.count)
                + [0] * (longest - piece.count)
                for piece in group
            ]
        )
        tables = [piece.sequence.pages for piece in group]
        images = self._look(group)
        done = 0
        for ids in ids_BT.split(size, dim=1):
            starts = [piece.start + done for piece in group]
            rows = self._pool.slice(tables, starts, one_by_one=is_written)
            width = ids.shape[1]
            ends = [piece.count - 1 - done if piece.is_last else width for piece in group]
            last = [row * width + end for row, end in enumerate(ends) if end < width]
            if last:
                return self._backend.next_logits(ids, rows, last, images)
            self._backend.read(ids, rows, images)
            done += width
        return None

    def _look(self, group: Sequence[Piece]) -> ImageContext | None:
        """The images that tokens of these pieces see; each is encoded once a request."""
        fusion = self._backend.fusion
        if fusion is None or (fusion.is_read_once and not any(piece.is_prompt for piece in group)):
            return None
        placed: list[PlacedImages | None] = []
        for piece in group:
            row = self._rows[piece.sequence.request_id]
            if row.images is None and row.request.images:
                pixels = np.stack([image.pixels_3SS for image in row.request.images])
                device = fusion.encoder.positions_PE.device
                memory_IPF = fusion.remember(torch.from_numpy(pixels).to(device))
                places = [image.place for image in row.request.images]
                row.images = PlacedImages(memory_IPF, places)
            placed.append(row.images)
        return gather_images(placed)


def _attended_share(own: Sequence[int]) -> float:
    """Of the blocks up to those numbered `own`, the share that tokens attend to by their gates."""
    attended = sum(min(block + 1, 2 + count_chosen(block)) for block in own)
    return attended / sum(block + 1 for block in own)


def _note(row: _Row, sampled: SampledToken) -> TokenEvent:
    """What a token is for its request."""
    event = TokenEvent(row.request.request_id, None, None)
    if row.sampler.failure is not None:
        return replace(event, failure=row.sampler.failure)
    row.sampler.note(sampled.token_id)
    row.num_generated += 1
    if sampled.token_id in row.request.stop_token_ids:
        return replace(event, finish_reason="stop")
    if row.num_generated == row.request.max_new_tokens:
        event = replace(event, finish_reason="length")
    asked = row.request.sampling.num_logprobs is not None
    return replace(event, token_id=sampled.token_id, sampled=sampled if asked else None)
