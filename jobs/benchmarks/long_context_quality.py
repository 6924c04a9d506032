"""What sparse attention loses on long contexts: tasks, perplexity, and the blocks that it misses.

Dense and sparse attention read the same prompts with the same weights, in float32 and as served:
INT8 weights, int8 keys and values.
"""

import functools
import math
import statistics
import time
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F

from jobs.benchmarks.base_files import BaseFiles
from jobs.benchmarks.local_training import pick_device
from jobs.benchmarks.long_context_models import (
    CONTEXT,
    TrainingSize,
    count_prompt_tokens,
    render_prompt,
    train_gates,
    tune_on_tasks,
)
from jobs.benchmarks.parts import StoredParts
from r1ray.data.long_context import TASKS, LongTask, build_long_task, score_reply
from r1ray.data.texts import read_english
from r1ray.evaluation.block_recall import measure_block_recall
from r1ray.models import Decoder, load_model
from r1ray.models.batch_generation import generate_batch
from r1ray.models.gates import set_attention
from r1ray.models.kv_cache import KVCache
from r1ray.models.quantization import quantize_modules
from r1ray.models.tokenizer import Tokenizer
from r1ray.ops.block_selection import BLOCK

__all__ = ["ATTENTIONS", "LENGTHS", "PRECISIONS", "QualityBenchmark"]

Precision = Literal["fp32", "int8"]
Attention = Literal["dense", "sparse"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "int8")
ATTENTIONS: tuple[Attention, ...] = ("dense", "sparse")
LENGTHS = (4096, CONTEXT)
_ANSWER_TOKENS = {"cwe": 64, "vt": 48, "fwe": 40, "niah_multikey_3": 32}
_SHORT_ANSWER = 16


class QualityBenchmark:
    """Part `quality` of `jobs.bench_long_context`; results and models are found by the next start.

    Args:
        work: where the models are kept.
        source: of the base model, as in `base.source`.
        examples: of each task and length.
    """

    def __init__(
        self, parts: StoredParts, work: Path, source: str, size: TrainingSize, examples: int
    ) -> None:
        self.parts = parts
        self._work, self._size = work, size
        self._files = BaseFiles(work, source)
        self._examples = examples

    def base(self) -> Path:
        """The model that is taught, as a model directory."""
        return self._files.base()

    def prepare(self) -> None:
        """The models: base, taught the tasks, with gates."""
        base, tuned = self.base(), self._work / "tuned"
        self.parts.once("quality_tuning", _timed(tune_on_tasks), base, tuned, self._size)
        self.parts.once("quality_gates", _timed(train_gates), tuned, self.gated, self._size)

    @property
    def gated(self) -> Path:
        return self._work / "gated"

    @property
    def is_measured(self) -> bool:
        """Whether `collect` finds everything."""
        return self.parts.has(f"quality_{PRECISIONS[-1]}_recall")  # the last to be measured

    def gate_training(self) -> dict[str, Any]:
        """How gates were trained: `result` of all steps, seconds, device."""
        return dict(self.parts.read("quality_gates"))

    def measure(self, precision: Precision, attention: Attention) -> None:
        """Answers to all tasks, and perplexity, in one of the four ways."""
        model, name = self._load(precision, attention), f"quality_{precision}_{attention}"
        for length in LENGTHS:
            for task in TASKS:
                part = f"{name}_{task}_{length}"
                self.parts.once(part, self._answer, model, precision, task, length)
            self.parts.once(
                f"{name}_perplexity_{length}", self._perplexity, model, precision, length
            )

    def recall(self, precision: Precision) -> None:
        """How much of dense attention is in the blocks that gates choose."""
        self.parts.once(f"quality_{precision}_recall", self._recall, precision)

    def collect(self) -> dict[str, Any]:
        """By precision: scores and perplexity, dense and sparse, recall, and equal answers."""
        found: dict[str, Any] = {}
        for precision in PRECISIONS:

            def read(name: str, of: str = precision) -> Any:
                return self.parts.read(f"quality_{of}_{name}")

            answers = {
                (task, length): [read(f"{kind}_{task}_{length}") for kind in ATTENTIONS]
                for task in TASKS
                for length in LENGTHS
            }
            equal = [
                one == other
                for dense, sparse in answers.values()
                for one, other in zip(dense["outputs"], sparse["outputs"], strict=True)
            ]
            found[precision] = {
                "scores": {
                    key: tuple(statistics.mean(answer["scores"]) for answer in pair)
                    for key, pair in answers.items()
                },
                "perplexity": {
                    length: tuple(read(f"{kind}_perplexity_{length}") for kind in ATTENTIONS)
                    for length in LENGTHS
                },
                "recall": read("recall"),
                "agreement": statistics.mean(equal),
            }
        return found

    def _load(self, precision: Precision, attention: Attention) -> Decoder:
        model = load_model(self.gated, dtype=torch.float32)
        set_attention(model, attention)
        if precision == "int8":
            quantize_modules(model)
        return model.to(pick_device())

    def _tasks(self, name: str, length: int) -> list[LongTask]:
        count = functools.partial(count_prompt_tokens, self._tokenizer)
        most = length - _answer_tokens(name)
        return [build_long_task(name, count, most, seed=seed) for seed in range(self._examples)]

    @functools.cached_property
    def _tokenizer(self) -> Tokenizer:
        return Tokenizer(self.gated)

    def _answer(
        self, model: Decoder, precision: Precision, name: str, length: int
    ) -> dict[str, Any]:
        tokenizer, tasks = self._tokenizer, self._tasks(name, length)
        prompts = [tokenizer.encode(render_prompt(tokenizer, task.prompt)) for task in tasks]
        outputs = generate_batch(
            model,
            prompts,
            max_new_tokens=_answer_tokens(name),
            stop_token_ids=frozenset({tokenizer.eos_token_id}),
            max_concurrency=self._examples if torch.cuda.is_available() else 4,
            prefill_chunk=_chunk(),
            kv_dtype=_kv_dtype(precision),
        )
        scores = [
            score_reply(tokenizer.decode(output), task.answers)
            for output, task in zip(outputs, tasks, strict=True)
        ]
        print(f"  {name} {length}: {statistics.mean(scores):.3f}", flush=True)
        return {
            "scores": scores,
            "outputs": outputs,
            "prompt_tokens": statistics.mean(map(len, prompts)),
        }

    @torch.inference_mode()
    def _perplexity(self, model: Decoder, precision: Precision, length: int) -> float:
        """On whole windows of `length` tokens of Python's documentation, read in chunks."""
        ids_T = torch.tensor(self._tokenizer.encode(read_english()), device=pick_device())
        total, count = 0.0, 0
        for ids in ids_T.split(length):
            if len(ids) < length:
                break
            cache = KVCache(
                model.config,
                max_rows=1,
                max_tokens=length,
                dtype=_kv_dtype(precision) or torch.float32,
                device=pick_device(),
                summary_size=model.summary_size,
            )
            cache.add_rows(1)
            for start in range(0, length, _chunk()):
                rows, chunk = cache.active(), ids[None, start : start + _chunk()]
                logits_TV = model(chunk, rows)[0].float()
                rows.advance([chunk.shape[1]])
                labels = ids[start + 1 : start + 1 + _chunk()]
                total += float(F.cross_entropy(logits_TV[: len(labels)], labels, reduction="sum"))
                count += len(labels)
        print(f"  perplexity {length}: {math.exp(total / count):.4f}", flush=True)
        return math.exp(total / count)

    def _recall(self, precision: Precision) -> dict[str, Any]:
        """Over the answers to needles, and the ends of documents."""
        model, tokenizer = self._load(precision, "sparse"), self._tokenizer
        found: dict[str, Any] = {"mass": {}, "looks": 0, "found": 0}
        for name in ("niah_single_1", "niah_multikey_2", "niah_multikey_3"):
            masses = []
            for task in self._tasks(name, CONTEXT)[:20]:
                prompt = render_prompt(tokenizer, task.prompt)
                answer = tokenizer.encode(f"{task.answers[0]}.")
                [(ids, starts)] = tokenizer.encode_batch_with_offsets([prompt])
                place = int((starts <= prompt.index(f"is: {task.answers[0]}") + 4).sum()) - 1
                ids_1T = torch.tensor([[*ids.tolist(), *answer]], device=pick_device())
                recall = measure_block_recall(
                    model,
                    ids_1T,
                    num_queries=len(answer) + 1,
                    needle_token=place,
                    has_int8_keys=precision == "int8",
                )
                masses.append(recall.mass)
                found["looks"] += recall.num_looks
                found["found"] += recall.num_found
            found["mass"][name] = _mean_columns(masses)
        ids_T = torch.tensor(tokenizer.encode(read_english()), device=pick_device())
        masses = [
            measure_block_recall(
                model,
                ids[None],
                num_queries=BLOCK,
                unit=BLOCK,
                has_int8_keys=precision == "int8",
            ).mass
            for ids in ids_T.split(CONTEXT)
            if len(ids) == CONTEXT
        ]
        found["mass"]["documents"] = _mean_columns(masses)
        print(f"  needle recall {found['found']}/{found['looks']}", flush=True)
        return found


def _timed(train: Any) -> Any:
    """`train`, whose result is kept with the seconds that it took and the device."""

    def run(*arguments: Any) -> dict[str, Any]:
        started = time.perf_counter()
        result = train(*arguments)
        seconds = time.perf_counter() - started
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        return {"result": result, "seconds": seconds, "device": device}

    return run


def _mean_columns(rows: list[list[float]]) -> list[float]:
    return [statistics.mean(column) for column in zip(*rows, strict=True)]


def _answer_tokens(name: str) -> int:
    return _ANSWER_TOKENS.get(name, _SHORT_ANSWER)


def _kv_dtype(precision: Precision) -> torch.dtype | None:
    return torch.int8 if precision == "int8" else None


def _chunk() -> int:
    """Tokens of a prompt that are read together: all on a GPU, where launches take most time."""
    return CONTEXT if torch.cuda.is_available() else 1024
