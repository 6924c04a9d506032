"""What sparse attention changes in the model as it is published, whose gates 2 cores have trained.

Perplexity of documents, passkeys at depths, and how much of dense attention is in the blocks that
gates choose. Gates are trained by the job that r1ray ships: `jobs/configs/gates.yaml`. Tokens up to
which attention is dense do not count, nor do depths whose blocks are always kept.
"""

import functools
import math
import os
import statistics
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from jobs.benchmarks.local_training import pick_device
from jobs.benchmarks.long_context_arms import (
    ATTENTIONS,
    LENGTHS,
    PRECISIONS,
    Arm,
    Precision,
    list_measured,
)
from jobs.benchmarks.long_context_models import CONTEXT, count_prompt_tokens, render_prompt
from jobs.benchmarks.parts import StoredParts
from jobs.cli import connected_to_ray
from r1ray.config import load_config
from r1ray.data.long_context import build_long_task, build_passkey, score_reply
from r1ray.data.texts import read_english
from r1ray.evaluation.block_recall import BlockRecall, measure_block_recall
from r1ray.models import Decoder
from r1ray.models.kv_cache import KVCache
from r1ray.models.tokenizer import Tokenizer
from r1ray.ops.block_selection import BLOCK, DENSE_BLOCKS
from r1ray.pipeline import Pipeline
from r1ray.training.checkpoint import load_history

__all__ = ["DEPTHS", "PASSKEYS", "FidelityBenchmark"]

DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
PASSKEYS = 5  # at each depth and length
_PASSKEY_TOKENS = 16  # of an answer
_NEEDLES = ("niah_single_1", "niah_multikey_2", "niah_multikey_3")
_SEQUENCES = 12  # whose attention is looked at, of each kind of needles and of documents
_COMPARED = 256  # tokens at the end of a window whose greedy choices are compared
_GATES = "fidelity_gates"
_CELLS = [(kind, length) for kind in ("text", "passkeys") for length in LENGTHS]


class FidelityBenchmark:
    """Part `fidelity` of `jobs.bench_long_context`; results and gates are found by the next start.

    Args:
        work: where the gates are kept.
        source: of the base model, as in `base.source`.
    """

    def __init__(self, parts: StoredParts, work: Path, source: str) -> None:
        self._parts = parts
        self._overrides = [f"run.root={(work / 'runs').resolve()}", f"base.source={source}"]

    def run(self) -> None:
        """Measure what is not stored yet."""
        self._parts.once(_GATES, self._describe_training)
        for precision in PRECISIONS:
            self._compare(precision)

    def results(self) -> dict[str, Any]:
        """By precision: (dense, sparse) perplexity and passkeys by length, recall and agreement.

        Those of which everything is stored.
        """
        measured = list_measured(self._parts, self._parts_of)
        return {precision: self._compare(precision) for precision in measured}

    @staticmethod
    def _parts_of(precision: Precision) -> list[str]:
        arms = [Arm(precision, attention) for attention in ATTENTIONS]
        cells = [_name(arm, *cell) for arm in arms for cell in _CELLS]
        return [_GATES, f"fidelity_{precision}_recall", *cells]

    def gate_training(self) -> dict[str, Any]:
        """How gates were trained: `result` of all steps, seconds, device."""
        return dict(self._parts.read(_GATES))

    @functools.cached_property
    def model_dir(self) -> Path:
        """The base with gates, trained as shipped; a training that was ended goes on."""
        config = load_config("jobs/configs/gates.yaml", self._overrides)
        with connected_to_ray():
            return Pipeline(config).train().local_dir

    def _describe_training(self) -> dict[str, Any]:
        history = load_history(self.model_dir)
        tokens, steps = 0, []
        for record in history:
            tokens += record.num_tokens
            steps.append({"tokens": tokens, "loss": record.loss, "recall": record.recall})
        seconds = sum(record.seconds for record in history)
        return {"result": steps, "seconds": seconds, "device": f"{os.cpu_count()} cores"}

    def _compare(self, precision: Precision) -> dict[str, Any]:
        dense, sparse = (self._measure(Arm(precision, attention)) for attention in ATTENTIONS)
        found: dict[str, Any] = {"perplexity": {}, "agreement": {}, "passkeys": {}}
        for length in LENGTHS:
            texts = [arm["text", length] for arm in (dense, sparse)]
            found["perplexity"][length] = tuple(text["perplexity"] for text in texts)
            choices = zip(*(text["choices"] for text in texts), strict=True)
            found["agreement"][length] = statistics.mean(one == other for one, other in choices)
            found["passkeys"][length] = tuple(arm["passkeys", length] for arm in (dense, sparse))
        found["recall"] = self._parts.once(f"fidelity_{precision}_recall", self._recall, precision)
        return found

    def _measure(self, arm: Arm) -> dict[tuple[str, int], Any]:
        load = functools.cache(lambda: arm.load(self.model_dir))
        measures = {"text": self._read_text, "passkeys": self._find_passkeys}

        def measure(kind: str, length: int) -> Any:
            return measures[kind](arm, load(), length)

        return {cell: self._parts.once(_name(arm, *cell), measure, *cell) for cell in _CELLS}

    @torch.inference_mode()
    def _read_text(self, arm: Arm, model: Decoder, length: int) -> dict[str, Any]:
        """Of whole windows of `length` tokens of Python's documentation, read in chunks.

        Tokens from DENSE_BLOCKS on count.
        """
        ids_T = torch.tensor(self._tokenizer.encode(read_english()), device=pick_device())
        total, count = 0.0, 0
        choices: list[int] = []
        for ids in ids_T.split(length):
            if len(ids) < length:
                break
            cache = KVCache(
                model.config,
                max_rows=1,
                max_tokens=length,
                dtype=arm.kv_dtype or torch.float32,
                device=pick_device(),
                summary_size=model.summary_size,
            )
            cache.add_rows(1)
            for start in range(0, length, arm.chunk):
                rows, chunk = cache.active(), ids[None, start : start + arm.chunk]
                logits_TV = model(chunk, rows)[0].float()
                rows.advance([chunk.shape[1]])
                first = max(0, DENSE_BLOCKS * BLOCK - start)
                labels = ids[start + 1 + first : start + 1 + arm.chunk]
                scored_TV = logits_TV[first : first + len(labels)]
                total += float(F.cross_entropy(scored_TV, labels, reduction="sum"))
                count += len(labels)
            choices += logits_TV[-_COMPARED:].argmax(-1).tolist()
        print(
            f"  {arm.precision} {arm.attention} {length}: {math.exp(total / count):.4f}", flush=True
        )
        return {"perplexity": math.exp(total / count), "choices": choices}

    def _find_passkeys(self, arm: Arm, model: Decoder, length: int) -> list[float]:
        """Share found at each depth, by a text that goes on, without a chat around it.

        Asked in a chat, SmolLM2 talks of pass keys in general from 4,096 tokens on.
        """
        tokenizer = self._tokenizer

        def count(text: str) -> int:
            return len(tokenizer.encode(text))

        found = []
        for depth in DEPTHS:
            tasks = [
                build_passkey(depth, count, length - _PASSKEY_TOKENS, seed=seed)
                for seed in range(PASSKEYS)
            ]
            outputs = arm.complete(
                model, tokenizer, [task.prompt for task in tasks], _PASSKEY_TOKENS
            )
            scores = [
                score_reply(tokenizer.decode(output), task.answers)
                for output, task in zip(outputs, tasks, strict=True)
            ]
            found.append(statistics.mean(scores))
        print(f"  {arm.precision} {arm.attention} {length}: passkeys {found}", flush=True)
        return found

    def _recall(self, precision: Precision) -> dict[str, Any]:
        """Over the answers to needles, and the ends of documents."""
        model, tokenizer = Arm(precision, "sparse").load(self.model_dir), self._tokenizer
        measure = functools.partial(measure_block_recall, model, has_int8_keys=precision == "int8")
        count = functools.partial(count_prompt_tokens, tokenizer)
        most = CONTEXT - 2 * _PASSKEY_TOKENS  # room for the answer
        recalls: dict[str, list[BlockRecall]] = {}
        for name in _NEEDLES:
            recalls[name] = []
            for seed in range(_SEQUENCES):
                task = build_long_task(name, count, most, seed=seed)
                prompt = render_prompt(tokenizer, task.prompt)
                answer = tokenizer.encode(f"{task.answers[0]}.")
                [(ids, starts)] = tokenizer.encode_batch_with_offsets([prompt])
                place = int((starts <= prompt.index(f"is: {task.answers[0]}") + 4).sum()) - 1
                ids_1T = torch.tensor([[*ids.tolist(), *answer]], device=pick_device())
                recalls[name].append(
                    measure(ids_1T, num_queries=len(answer) + 1, needle_token=place)
                )
        ids_T = torch.tensor(tokenizer.encode(read_english()), device=pick_device())
        recalls["documents"] = [
            measure(ids[None], num_queries=BLOCK, unit=BLOCK)
            for ids in ids_T.split(CONTEXT)[:_SEQUENCES]
            if len(ids) == CONTEXT
        ]
        found = {name: _add_up(items) for name, items in recalls.items()}
        print(f"  {precision}: {found}", flush=True)
        return found

    @functools.cached_property
    def _tokenizer(self) -> Tokenizer:
        return Tokenizer(self.model_dir)


def _name(arm: Arm, kind: str, length: int) -> str:
    return f"fidelity_{arm.precision}_{arm.attention}_{kind}_{length}"


def _add_up(recalls: list[BlockRecall]) -> dict[str, Any]:
    """Looks of all, those found, and the mass of each layer on average."""
    masses = zip(*(item.mass for item in recalls), strict=True)
    return {
        "looks": sum(item.num_looks for item in recalls),
        "found": sum(item.num_found for item in recalls),
        "mass": [statistics.mean(layer) for layer in masses],
    }
