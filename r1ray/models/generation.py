"""Batched decoding with a KV cache, shared by evaluation, serving and on-policy training.

1. Waiting requests are admitted while rows are free: their prompts, padded on the right, go through
   one forward that fills their rows of the cache.
2. Every step runs one token of every active row; a row leaves as soon as it stops, and the next
   waiting request takes its place (continuous batching).

Price: the cache holds max_concurrency rows of max_context_tokens; a prompt stalls the running rows
for the time of its prefill.

Shape legend: B rows, T tokens, D hidden size, V vocabulary.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch

from r1ray.errors import ShapeError
from r1ray.models.decoder import Decoder
from r1ray.models.kv_cache import KVCache
from r1ray.models.sampling import RowSampler, SampledToken, SamplingParams, sample_tokens
from r1ray.ops.block_selection import BLOCK

if TYPE_CHECKING:
    from r1ray.models.grammar import FormCompiler  # its library is there where answers are served

__all__ = ["BatchGenerator", "GenerationRequest", "TokenEvent", "generate_batch"]

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class GenerationRequest:
    """One sequence to continue.

    Attributes:
        request_id: chosen by the caller, unique among the requests in flight.
        prompt_ids: at least one token.
        stop_token_ids: any of these ends the sequence; it is not part of the output.
        form: what the output has to be like (`r1ray.models.grammar`); None for anything.
    """

    request_id: str
    prompt_ids: Sequence[int]
    max_new_tokens: int
    stop_token_ids: frozenset[int]
    sampling: SamplingParams = SamplingParams()
    form: str | None = None


@dataclass(frozen=True)
class TokenEvent:
    """One step of one sequence.

    Attributes:
        failure: why the sequence cannot go on, as its last event; it has no token and no reason.
        token_id: None where the sequence ended on a stop token.
        sampled: the same token with its log-probabilities, where the request asked for them.
    """

    request_id: str
    token_id: int | None
    finish_reason: FinishReason | None
    sampled: SampledToken | None = None
    failure: str | None = None


@dataclass
class _Row:
    request: GenerationRequest
    sampler: RowSampler
    last_token: int = -1
    num_generated: int = 0


class BatchGenerator:
    """Continuous batching over one model. Not thread-safe: one thread adds, steps and cancels.

    Args:
        max_concurrency: sequences decoded together.
        max_context_tokens: prompt and output of one sequence together.
        max_prefill_tokens: padded prompt tokens in one prefill forward (a single longer prompt
            still runs, alone).
        prefill_chunk: tokens of a longer prompt that go through one forward; it bounds the memory
            of activations, and where attention is sparse has to be a multiple of 64.
        kv_dtype: of cached keys and values, a floating point one or int8; None for the weights'.
        forms: for requests that have a form; None where there are none.
    Raises:
        ShapeError: attention is sparse and prefill_chunk cuts a block.
    """

    def __init__(
        self,
        model: Decoder,
        *,
        max_concurrency: int,
        max_context_tokens: int,
        max_prefill_tokens: int = 4096,
        prefill_chunk: int = 1024,
        kv_dtype: torch.dtype | None = None,
        forms: "FormCompiler | None" = None,
    ) -> None:
        weight = model.model.norm.weight
        self._model = model
        self._device = weight.device
        self._max_prefill_tokens = max_prefill_tokens
        self._prefill_chunk = prefill_chunk
        if model.is_sparse and prefill_chunk % BLOCK:
            raise ShapeError(
                f"prefill_chunk ({prefill_chunk}) is not a multiple of {BLOCK}, the tokens "
                "of a block of sparse attention; round it"
            )
        self._rotates_by_length = model.config.rope.depends_on_length
        self._cache = KVCache(
            model.config,
            max_rows=max_concurrency,
            max_tokens=max_context_tokens,
            dtype=kv_dtype or weight.dtype,
            device=weight.device,
            summary_size=model.summary_size,
        )
        self._forms = forms
        self._waiting: deque[_Row] = deque()
        self._rows: list[_Row] = []

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._rows)

    def add(self, request: GenerationRequest) -> None:
        """Queue `request`; its events come from later steps.

        Raises:
            ShapeError: the prompt is empty, prompt and output exceed max_context_tokens, or the
                form is none.
        """
        needed = len(request.prompt_ids) + request.max_new_tokens
        if not request.prompt_ids or request.max_new_tokens < 1:
            raise ShapeError("a request needs at least one prompt token and one new token")
        if needed > self._cache.max_tokens:
            raise ShapeError(
                f"{len(request.prompt_ids)} prompt tokens + {request.max_new_tokens} new tokens "
                f"exceed the context of {self._cache.max_tokens}; shorten one of them"
            )
        form = None
        if request.form is not None:
            assert self._forms is not None, "a request has a form"
            form = self._forms.start(request.form)
        sampler = RowSampler(request.sampling, request.prompt_ids, form)
        self._waiting.append(_Row(request, sampler))

    def cancel(self, request_id: str) -> None:
        """Forget a request, waiting or running; its row is free at once. Unknown ids are fine."""
        self._waiting = deque(row for row in self._waiting if row.request.request_id != request_id)
        for index, row in enumerate(self._rows):
            if row.request.request_id == request_id:
                self._release(index)
                return

    @torch.inference_mode()
    def step(self) -> list[TokenEvent]:
        """Admit what fits, or else run one token of every active row. Empty when idle."""
        admitted = self._admit()
        if admitted:
            return self._prefill(admitted)
        return self._decode() if self._rows else []

    def _admit(self) -> list[_Row]:
        admitted: list[_Row] = []
        longest = 0
        while self._waiting and len(self._rows) + len(admitted) < self._cache.max_rows:
            length = len(self._waiting[0].request.prompt_ids)
            if admitted and self._rotates_by_length and length != longest:
                break  # padding would pass for length
            longest = max(longest, length)
            is_too_much = longest * (len(admitted) + 1) > self._max_prefill_tokens
            if admitted and (is_too_much or longest > self._prefill_chunk):
                break
            admitted.append(self._waiting.popleft())
        return admitted

    def _prefill(self, admitted: list[_Row]) -> list[TokenEvent]:
        lengths = [len(row.request.prompt_ids) for row in admitted]
        input_ids_BT = torch.zeros(len(admitted), max(lengths), dtype=torch.long)
        for index, row in enumerate(admitted):
            input_ids_BT[index, : lengths[index]] = torch.tensor(row.request.prompt_ids)
        input_ids_BT = input_ids_BT.to(self._device)
        cache = self._cache.add_rows(len(admitted))
        if len(admitted) == 1 and not self._rotates_by_length:
            for ids_1T in input_ids_BT.split(self._prefill_chunk, dim=1):
                cache = self._cache.rows(len(self._rows), 1)
                hidden_BD = self._model.hidden(ids_1T, cache)[:, -1]
                cache.advance([ids_1T.shape[1]])
        else:
            hidden_BTD = self._model.hidden(input_ids_BT, cache)
            cache.advance(lengths)
            last_B = torch.tensor(lengths, device=self._device) - 1
            hidden_BD = hidden_BTD[torch.arange(len(admitted), device=self._device), last_B]
        first_row = len(self._rows)
        self._rows.extend(admitted)
        return self._emit(hidden_BD, first_row)

    def _decode(self) -> list[TokenEvent]:
        input_ids_B1 = torch.tensor([[row.last_token] for row in self._rows], device=self._device)
        cache = self._cache.active()
        hidden_BTD = self._model.hidden(input_ids_B1, cache)
        cache.advance([1] * len(self._rows))
        return self._emit(hidden_BTD[:, 0], 0)

    def _emit(self, hidden_BD: torch.Tensor, first_row: int) -> list[TokenEvent]:
        rows = self._rows[first_row:]
        tokens = sample_tokens(self._model.lm_head(hidden_BD), [row.sampler for row in rows])
        events = []
        for index in reversed(range(len(rows))):  # releasing a row moves only rows behind it
            row, sampled = rows[index], tokens[index]
            if row.sampler.failure is not None:
                failure = row.sampler.failure
                events.append(TokenEvent(row.request.request_id, None, None, failure=failure))
                self._release(first_row + index)
                continue
            token = row.last_token = sampled.token_id
            row.sampler.note(token)
            row.num_generated += 1
            reason: FinishReason | None = None
            if token in row.request.stop_token_ids:
                reason = "stop"
            elif row.num_generated == row.request.max_new_tokens:
                reason = "length"
            event = TokenEvent(row.request.request_id, None, reason)
            if reason != "stop":
                asked = row.request.sampling.num_logprobs is not None
                event = replace(event, token_id=token, sampled=sampled if asked else None)
            events.append(event)
            if reason is not None:
                self._release(first_row + index)
        return events[::-1]

    def _release(self, index: int) -> None:
        moved = self._cache.remove_row(index)
        self._rows[index] = self._rows[moved]
        self._rows.pop()


def generate_batch(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_token_ids: frozenset[int],
    max_concurrency: int,
    sampling: SamplingParams | Sequence[SamplingParams] = SamplingParams(),
    prefill_chunk: int = 1024,
    kv_dtype: torch.dtype | None = None,
    on_finish: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """Continuations of `prompts`, in their order.

    Args:
        sampling: of all prompts, or one for each.
        prefill_chunk, kv_dtype: as in `BatchGenerator`.
        on_finish: called with the number of finished prompts each time one finishes.
    """
    generator = BatchGenerator(
        model,
        max_concurrency=min(max_concurrency, max(1, len(prompts))),
        max_context_tokens=max(map(len, prompts), default=0) + max_new_tokens,
        prefill_chunk=prefill_chunk,
        kv_dtype=kv_dtype,
    )
    samplings = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else sampling
    outputs: dict[str, list[int]] = {}
    # Longest first: rows that run together then end together, and the tail batch stays full.
    for index in sorted(range(len(prompts)), key=lambda i: -len(prompts[i])):
        outputs[str(index)] = []
        generator.add(
            GenerationRequest(
                str(index), prompts[index], max_new_tokens, stop_token_ids, samplings[index]
            )
        )
    num_finished = 0
    while generator.num_waiting or generator.num_running:
        for event in generator.step():
            if event.token_id is not None:
                outputs[event.request_id].append(event.token_id)
            if event.finish_reason is not None:
                num_finished += 1
                if on_finish is not None:
                    on_finish(num_finished)
    return [outputs[str(index)] for index in range(len(prompts))]
