"""The four ways of reading whose outcomes are compared, and what they share.

Dense and sparse attention read the same prompts with the same weights, in float32 and as served:
INT8 weights, int8 keys and values.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from jobs.benchmarks.local_training import pick_device
from jobs.benchmarks.long_context_models import CONTEXT
from jobs.benchmarks.parts import StoredParts
from r1ray.models import Decoder, load_model
from r1ray.models.batch_generation import generate_batch
from r1ray.models.gates import set_attention
from r1ray.models.quantization import quantize_modules
from r1ray.models.tokenizer import Tokenizer

__all__ = ["ATTENTIONS", "LENGTHS", "PRECISIONS", "Arm", "Attention", "Precision", "list_measured"]

Precision = Literal["fp32", "int8"]
Attention = Literal["dense", "sparse"]
PRECISIONS: tuple[Precision, ...] = ("int8", "fp32")  # what is served is measured first
ATTENTIONS: tuple[Attention, ...] = ("dense", "sparse")
LENGTHS = (4096, CONTEXT)


def list_measured(
    parts: StoredParts, names_of: Callable[[Precision], Iterable[str]]
) -> list[Precision]:
    """The precisions of which every part is stored, by the parts' names."""
    return [each for each in PRECISIONS if all(map(parts.has, names_of(each)))]


@dataclass(frozen=True)
class Arm:
    """One way of reading."""

    precision: Precision
    attention: Attention

    @property
    def kv_dtype(self) -> torch.dtype | None:
        """Of cached keys and values; None is the model's."""
        return torch.int8 if self.precision == "int8" else None

    @property
    def chunk(self) -> int:
        """Tokens that are read together: all on a GPU, where launches take most time."""
        return CONTEXT if torch.cuda.is_available() else 1024

    def load(self, model_dir: Path) -> Decoder:
        """The model with gates in `model_dir`, as this arm reads with it."""
        model = load_model(model_dir, dtype=torch.float32)
        set_attention(model, self.attention)
        if self.precision == "int8":
            quantize_modules(model)
        return model.to(pick_device())

    def complete(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        texts: Sequence[str],
        max_new_tokens: int,
        *,
        max_concurrency: int | None = None,
    ) -> list[list[int]]:
        """How `texts` go on, greedily, in tokens.

        Args:
            max_concurrency: texts at once; all of them on a GPU, four without. One after the
                other they read what they begin with in common once.
        """
        return generate_batch(
            model,
            [tokenizer.encode(text) for text in texts],
            max_new_tokens=max_new_tokens,
            stop_token_ids=frozenset({tokenizer.eos_token_id}),
            max_concurrency=max_concurrency or (len(texts) if torch.cuda.is_available() else 4),
            prefill_chunk=self.chunk,
            kv_dtype=self.kv_dtype,
        )
