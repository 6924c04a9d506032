"""What sparse attention loses on tasks that the model was taught: dense against sparse answers."""

import functools
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from jobs.benchmarks.base_files import BaseFiles
from jobs.benchmarks.long_context_arms import (
    ATTENTIONS,
    LENGTHS,
    PRECISIONS,
    Arm,
    Precision,
    list_measured,
)
from jobs.benchmarks.long_context_models import (
    TrainingSize,
    count_prompt_tokens,
    render_prompt,
    train_gates,
    tune_on_tasks,
)
from jobs.benchmarks.parts import StoredParts
from r1ray.data.long_context import TASKS, LongTask, build_long_task, score_reply
from r1ray.models import Decoder
from r1ray.models.tokenizer import Tokenizer

__all__ = ["TaskBenchmark"]

_ANSWER_TOKENS = {"cwe": 64, "vt": 48, "fwe": 40, "niah_multikey_3": 32}
_SHORT_ANSWER = 16
_TUNING, _GATES = "tasks_tuning", "tasks_gates"


class TaskBenchmark:
    """Part `tasks` of `jobs.bench_long_context`; results and models are found by the next start.

    Args:
        work: where the models are kept.
        source: of the base model, as in `base.source`.
        examples: of each task and length.
    """

    def __init__(
        self, parts: StoredParts, work: Path, source: str, size: TrainingSize, examples: int
    ) -> None:
        self._parts = parts
        self._tuned, self._gated = work / "tuned", work / "gated"
        self._size = size
        self._files = BaseFiles(work, source)
        self._examples = examples

    def run(self) -> None:
        """Measure what is not stored yet."""
        self._parts.once(
            _TUNING, _timed(tune_on_tasks), self._files.base(), self._tuned, self._size
        )
        self._parts.once(_GATES, _timed(train_gates), self._tuned, self._gated, self._size)
        for precision in PRECISIONS:
            self._compare(precision)

    def results(self) -> dict[str, Any]:
        """By precision: (dense, sparse) scores of tasks and lengths, and how many answers agree.

        Those of which everything is stored.
        """
        measured = list_measured(self._parts, self._parts_of)
        return {precision: self._compare(precision) for precision in measured}

    @staticmethod
    def _parts_of(precision: Precision) -> list[str]:
        cells = [
            _name(Arm(precision, attention), task, length)
            for attention in ATTENTIONS
            for task in TASKS
            for length in LENGTHS
        ]
        return [_TUNING, _GATES, *cells]

    def gate_training(self) -> dict[str, Any]:
        """How gates were trained: `result` of all steps, seconds, device."""
        return dict(self._parts.read(_GATES))

    def _compare(self, precision: Precision) -> dict[str, Any]:
        arms = [Arm(precision, attention) for attention in ATTENTIONS]
        by_arm = [self._measure(arm) for arm in arms]
        dense, sparse = by_arm
        equal = [
            one == other
            for cell in dense
            for one, other in zip(dense[cell]["outputs"], sparse[cell]["outputs"], strict=True)
        ]
        scores = {
            cell: tuple(statistics.mean(answers[cell]["scores"]) for answers in by_arm)
            for cell in dense
        }
        return {"scores": scores, "agreement": statistics.mean(equal)}

    def _measure(self, arm: Arm) -> dict[tuple[str, int], dict[str, Any]]:
        load = functools.cache(lambda: arm.load(self._gated))

        def answer(task: str, length: int) -> dict[str, Any]:
            return self._answer(arm, load(), task, length)

        return {
            (task, length): self._parts.once(_name(arm, task, length), answer, task, length)
            for length in LENGTHS
            for task in TASKS
        }

    def _answer(self, arm: Arm, model: Decoder, name: str, length: int) -> dict[str, Any]:
        tokenizer, tasks = self._tokenizer, self._tasks(name, length)
        prompts = [render_prompt(tokenizer, task.prompt) for task in tasks]
        outputs = arm.complete(model, tokenizer, prompts, _answer_tokens(name))
        scores = [
            score_reply(tokenizer.decode(output), task.answers)
            for output, task in zip(outputs, tasks, strict=True)
        ]
        print(f"  {name} {length}: {statistics.mean(scores):.3f}", flush=True)
        return {"scores": scores, "outputs": outputs}

    def _tasks(self, name: str, length: int) -> list[LongTask]:
        count = functools.partial(count_prompt_tokens, self._tokenizer)
        most = length - _answer_tokens(name)
        return [build_long_task(name, count, most, seed=seed) for seed in range(self._examples)]

    @functools.cached_property
    def _tokenizer(self) -> Tokenizer:
        return Tokenizer(self._gated)


def _name(arm: Arm, task: str, length: int) -> str:
    return f"tasks_{arm.precision}_{arm.attention}_{task}_{length}"


def _timed(train: Any) -> Any:
    """`train`, whose result is kept with the seconds that it took and the device."""

    def run(*arguments: Any) -> dict[str, Any]:
        started = time.perf_counter()
        result = train(*arguments)
        seconds = time.perf_counter() - started
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        return {"result": result, "seconds": seconds, "device": device}

    return run


def _answer_tokens(name: str) -> int:
    return _ANSWER_TOKENS.get(name, _SHORT_ANSWER)
