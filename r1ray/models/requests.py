"""What is asked of a `BatchGenerator`, and what it says."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from r1ray.models.sampling import SampledToken, SamplingParams

__all__ = ["FinishReason", "GenerationRequest", "GeneratorStats", "RequestImage", "TokenEvent"]

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class RequestImage:
    """An image of a prompt, as `r1ray.models.images` reads it, and where it begins.

    Attributes:
        place: of its first token; all of its tokens have negative ids, made of the image.
    """

    pixels_3SS: NDArray[np.uint8]
    place: int


@dataclass(frozen=True)
class GenerationRequest:
    """One sequence to continue.

    Attributes:
        request_id: chosen by the caller, unique among the requests in flight.
        prompt_ids: at least one token.
        stop_token_ids: any of these ends the sequence; it is not part of the output.
        form: what the output has to be like (`r1ray.models.grammar`); None for anything.
        images: of the prompt, in their order.
        inputs_digest: of the files by which text and images became this request
            (`r1ray.serving.following.digest_inputs`); None where they need not be compared.
    """

    request_id: str
    prompt_ids: Sequence[int]
    max_new_tokens: int
    stop_token_ids: frozenset[int]
    sampling: SamplingParams = SamplingParams()
    form: str | None = None
    images: Sequence[RequestImage] = ()
    inputs_digest: bytes | None = None


@dataclass(frozen=True)
class TokenEvent:
    """One step of one sequence.

    Attributes:
        failure: why the sequence cannot go on, as its last event; it has no token and no reason.
        num_cached: tokens of the prompt that were known when the sequence was admitted.
        token_id: None where the sequence ended on a stop token.
        sampled: the same token with its log-probabilities, where the request asked for them.
    """

    request_id: str
    token_id: int | None
    finish_reason: FinishReason | None
    sampled: SampledToken | None = None
    failure: str | None = None
    num_cached: int = 0


@dataclass(frozen=True)
class GeneratorStats:
    """Attributes:
    num_running: sequences that hold pages.
    num_waiting: sequences that do not, those that had to give them up included.
    num_tokens_due: tokens to be read, and to be written as far as that can be predicted.
    kv_used_share: of the pages, those that sequences hold.
    sparse_kv_share: of the cached blocks, those that the latest written tokens attended to, where
        groups choose by gates; 1 in dense attention.
    num_preempted: times that a sequence had to give its pages up.
    num_prompt_tokens, num_cached_tokens: of the sequences begun, and known among them.
    num_new_tokens: written, stop tokens not counted.
    """

    num_running: int
    num_waiting: int
    num_tokens_due: int
    kv_used_share: float
    sparse_kv_share: float
    num_preempted: int
    num_prompt_tokens: int
    num_cached_tokens: int
    num_new_tokens: int
