"""All answers to some prompts, for whoever has them all at once."""

from collections.abc import Callable, Sequence

import torch

from r1ray.models.decoder import Decoder
from r1ray.models.generation import BatchGenerator
from r1ray.models.requests import GenerationRequest, RequestImage
from r1ray.models.sampling import SamplingParams

__all__ = ["generate_batch"]


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
    images: Sequence[Sequence[RequestImage]] | None = None,
) -> list[list[int]]:
    """Continuations of `prompts`, in their order.

    Args:
        sampling: of all prompts, or one for each.
        prefill_chunk, kv_dtype: as in `BatchGenerator`.
        on_finish: called with the number of finished prompts each time one finishes.
        images: of each prompt; None where all are text.
    """
    generator = BatchGenerator(
        model,
        max_concurrency=min(max_concurrency, max(1, len(prompts))),
        max_context_tokens=max(map(len, prompts), default=0) + max_new_tokens,
        max_step_tokens=max(4096, prefill_chunk),
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
                str(index),
                prompts[index],
                max_new_tokens,
                stop_token_ids,
                samplings[index],
                images=() if images is None else images[index],
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
