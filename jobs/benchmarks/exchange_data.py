"""The task that exchanges are compared on: the demo's traces, for a model of 2 million parameters.

- Traces of the families of jobs/configs/demo.yaml, tokenized by SmolLM2's tokenizer and laid out in
  micro-batches by r1ray's own planner. The small model's vocabulary is the ids that occur in them.
- The small model is of SmolLM2's family (Llama, three queries a key, tied embeddings), seeded.
- Validation loss and verifier accuracy are those of held-out problems, whose questions are not in
  the training traces.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from r1ray.config import PipelineConfig, load_config
from r1ray.config.prepare import BucketsConfig, PrepareConfig
from r1ray.data.batch_set import SUMMARY_NAME, BatchSet, MicroBatch
from r1ray.data.batch_writer import BatchWriter
from r1ray.data.bucketing import fit_bucket_ceilings
from r1ray.data.planners import FixedBuckets
from r1ray.data.reasoning import Problem, build_messages, draw_heldout, draw_training
from r1ray.data.schemas import Conversation
from r1ray.data.tokenize import Sample, TokenizedRow, tokenize_rows
from r1ray.data.tokenize_table import SAMPLE_SCHEMA
from r1ray.errors import ShapeError
from r1ray.evaluation.accuracy import answer_problems
from r1ray.models import Decoder, ModelConfig, load_model
from r1ray.models.config import RopeConfig
from r1ray.models.tokenizer import Tokenizer
from r1ray.training.loss import summed_loss

__all__ = [
    "CompactTokenizer",
    "Evaluator",
    "ModelName",
    "build_model",
    "build_small_model",
    "build_task",
    "list_batches",
    "tokenize_problems",
    "validation_loss",
    "write_batches",
]

ModelName = Literal["small", "smollm2"]
NUM_TRAINING, NUM_HELDOUT = 4000, 96
BATCH_TOKENS = 256  # of a micro-batch, padding included
_CONFIG = "jobs/configs/demo.yaml"
_VOCABULARY = "vocabulary.json"


class CompactTokenizer(Tokenizer):
    """A tokenizer whose ids are places in `vocabulary`, the ascending ids that occur in a task."""

    def __init__(self, path: str | Path, vocabulary: Sequence[int]) -> None:
        super().__init__(path)
        self._vocabulary = np.asarray(vocabulary)

    @property
    def eos_token_id(self) -> int:
        return int(_compact(np.array([super().eos_token_id]), self._vocabulary)[0])

    def encode(self, text: str) -> list[int]:
        """Raises ShapeError where `text` has a token that is not in the vocabulary."""
        return [int(place) for place in _compact(np.array(super().encode(text)), self._vocabulary)]

    def decode(self, ids: Sequence[int]) -> str:
        return super().decode(self._vocabulary[list(ids)].tolist())


def build_task(base_dir: Path, out_dir: Path) -> None:
    """Write the BatchSets of both models, and the small one's vocabulary, below `out_dir`.

    Args:
        base_dir: SmolLM2 as r1ray imports it.
    """
    config = load_config(_CONFIG)
    heldout = draw_heldout(config.tasks, NUM_HELDOUT)
    training = draw_training(config.tasks, NUM_TRAINING, heldout)
    tokenizer = Tokenizer(base_dir)
    splits = {
        "training": tokenize_problems(tokenizer, training, config),
        "validation": tokenize_problems(tokenizer, heldout, config),
    }
    vocabulary = np.unique(
        np.concatenate([sample.input_ids for samples in splits.values() for sample in samples])
    )
    prepare = dataclasses.replace(config.prepare, batch_tokens=BATCH_TOKENS)
    for split, samples in splits.items():
        write_batches(samples, prepare, out_dir / "smollm2" / split)
        compact = [
            Sample(_compact(sample.input_ids, vocabulary), sample.is_target) for sample in samples
        ]
        write_batches(compact, prepare, out_dir / "small" / split)
    (out_dir / _VOCABULARY).write_text(json.dumps(vocabulary.tolist()), encoding="utf-8")


def write_batches(samples: Sequence[Sample], prepare: PrepareConfig, directory: Path) -> None:
    """Write `samples` as a BatchSet of bucketed micro-batches."""
    assert isinstance(prepare.batching, BucketsConfig)
    directory.mkdir(parents=True, exist_ok=True)
    lengths = [len(sample.input_ids) for sample in samples]
    ceilings = fit_bucket_ceilings(lengths, prepare.batching.num_buckets)
    columns = [
        pa.array([getattr(sample, field.name) for sample in samples], field.type)
        for field in SAMPLE_SCHEMA
    ]
    with BatchWriter(directory, FixedBuckets(prepare, ceilings), prepare) as writer:
        writer.add(pa.Table.from_arrays(columns, schema=SAMPLE_SCHEMA))
    (directory / SUMMARY_NAME).write_text(json.dumps(writer.summarize()), encoding="utf-8")


def list_batches(task_dir: Path, model: ModelName, split: str) -> list[MicroBatch]:
    """Every micro-batch of one split, in memory."""
    batches = BatchSet(task_dir / model / split)
    return [batches[index] for index in range(len(batches))]


def build_model(model: ModelName, task_dir: Path, base_dir: Path, seed: int) -> Decoder:
    """The model at the start of training: seeded weights, or SmolLM2's."""
    if model == "smollm2":
        return load_model(base_dir, dtype=torch.float32)
    return build_small_model(len(_read_vocabulary(task_dir)), seed)


def build_small_model(vocab_size: int, seed: int) -> Decoder:
    """SmolLM2's shape at a third of its width and 4 layers: 1.6 million parameters + embeddings."""
    width = 192
    config = ModelConfig(
        family="llama",
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=512,
        num_layers=4,
        num_heads=6,
        num_kv_heads=2,
        head_dim=32,
        max_positions=2048,
        rms_norm_eps=1e-5,
        rope=RopeConfig(theta=10_000.0),
        tie_embeddings=True,
    )
    model = Decoder(config)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() >= 2:  # as SmolLM2: one over the root of the width
            torch.nn.init.normal_(parameter, std=width**-0.5, generator=generator)
    return model


@torch.inference_mode()
def validation_loss(model: Decoder, batches: Sequence[MicroBatch]) -> float:
    """Mean cross-entropy per target token, in nats."""
    total = sum(summed_loss(model, batch).item() for batch in batches)
    return total / sum(batch.num_targets for batch in batches)


class Evaluator:
    """Judges weights on the held-out problems; holds one model that they are copied into.

    Weights are lists of tensors in the order of `model.parameters()`.
    """

    def __init__(self, model: ModelName, task_dir: Path, base_dir: Path) -> None:
        self._config = load_config(_CONFIG)
        self._model = build_model(model, task_dir, base_dir, seed=0).eval()
        self._batches = list_batches(task_dir, model, "validation")
        self._problems = draw_heldout(self._config.tasks, NUM_HELDOUT)
        self._tokenizer = (
            CompactTokenizer(base_dir, _read_vocabulary(task_dir))
            if model == "small"
            else Tokenizer(base_dir)
        )

    def loss(self, weights: Sequence[Tensor]) -> float:
        """Validation loss in nats per target token."""
        self._load(weights)
        return validation_loss(self._model, self._batches)

    def accuracy(self, weights: Sequence[Tensor]) -> float:
        """Share of the held-out problems whose greedy answer gets full marks."""
        self._load(weights)
        answers = answer_problems(
            self._model,
            self._tokenizer,
            self._problems,
            self._config.tasks.system_prompt,
            max_new_tokens=self._config.evaluate.max_new_tokens,
            max_concurrency=self._config.evaluate.max_concurrency,
            on_finish=lambda _: None,
        )
        return sum(answer.is_correct for answer in answers) / len(answers)

    @torch.no_grad()
    def _load(self, weights: Sequence[Tensor]) -> None:
        for parameter, value in zip(self._model.parameters(), weights, strict=True):
            parameter.copy_(value)


def tokenize_problems(
    tokenizer: Tokenizer, problems: Sequence[Problem], config: PipelineConfig
) -> list[Sample]:
    """The problems with their own traces as samples; those that are too long are left out."""
    conversations = [
        Conversation(
            [
                *build_messages(problem, config.tasks.system_prompt),
                {"role": "assistant", "content": problem.trace()},
            ]
        )
        for problem in problems
    ]
    rows = tokenize_rows(
        tokenizer, conversations, max_tokens=config.prepare.max_tokens, overflow="reject"
    )
    return [row.samples[0] for row in rows if isinstance(row, TokenizedRow)]


def _compact(ids: NDArray[np.int32], vocabulary: NDArray[np.int32]) -> NDArray[np.int32]:
    places = np.searchsorted(vocabulary, ids).clip(max=len(vocabulary) - 1)
    if (vocabulary[places] != ids).any():
        missing = sorted(set(ids.tolist()) - set(vocabulary.tolist()))
        raise ShapeError(f"token ids {missing[:5]} are not among the {len(vocabulary)} of the task")
    return places.astype(np.int32)


def _read_vocabulary(task_dir: Path) -> list[int]:
    return list(json.loads((task_dir / _VOCABULARY).read_text(encoding="utf-8")))
