"""What sparse attention loses on tasks that the model was taught: dense against sparse answers."""

import functools
import itertools
import statistics
import time
from collections.abc import Callable
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
    TaskSize,
    count_prompt_tokens,
    learn_tasks,
    render_prompt,
    train_gates,
)
from jobs.benchmarks.parts import StoredParts
from r1ray.data.long_context import TASKS, LongTask, build_long_task, score_reply
from r1ray.models import Decoder
from r1ray.models.tokenizer import Tokenizer

__all__ = ["TaskBenchmark"]

_ANSWER_TOKENS = {"cwe": 64, "vt": 48, "fwe": 40, "niah_multikey_3": 32}
_SHORT_ANSWER = 16
_GATES = "tasks_gates"


class TaskBenchmark:
    """Part `tasks` of `jobs.bench_long_context`; results and models are found by the next start.

    Args:
        work: where the models are kept.
        source: of the base model, as in `base.source`.
        gates: where the published model with its gates is.
    """

    def __init__(
        self,
        parts: StoredParts,
        work: Path,
        source: str,
        size: TaskSize,
        gates: Callable[[], Path],
    ) -> None:
        self._parts = parts
        self._work, self._gated = work, work / "gated"
        self._size = size
        self._files = BaseFiles(work, source)
        self._gates = gates

    def run(self) -> None:
        """Measure what is not stored yet."""
        learned, examples = self._files.base(), 0
        for number, lesson in enumerate(self._size.lessons):
            target = self._work / f"learned_{number}"
            self._parts.once(
                _name_lesson(number), _timed(learn_tasks), learned, target, lesson, examples
            )
            learned, examples = target, examples + lesson.examples
        if not self._parts.has(_GATES):
            trained = _timed(train_gates)(learned, self._gates(), self._gated, self._size)
            self._parts.store(_GATES, trained)
        for precision in PRECISIONS:
            self._compare(precision)

    def results(self) -> dict[str, Any]:
        """By precision: (dense, sparse) scores of all questions by task and length, and agreement.

        Those of which everything is stored; agreement is the share of equal answers.
        """
        measured = list_measured(self._parts, self._parts_of)
        return {precision: self._compare(precision) for precision in measured}

    def _parts_of(self, precision: Precision) -> list[str]:
        cells = [
            _name(Arm(precision, attention), task, length)
            for attention in ATTENTIONS
            for task in TASKS
            for length in LENGTHS
        ]
        lessons = [_name_lesson(number) for number in range(len(self._size.lessons))]
        return [*lessons, _GATES, *cells]

    def gate_training(self) -> dict[str, Any]:
        """How gates were trained: `result` of all steps, seconds, device."""
        return dict(self._parts.read(_GATES))

    def _compare(self, precision: Precision) -> dict[str, Any]:
        load = functools.cache(lambda arm: arm.load(self._gated))
        arms = [Arm(precision, attention) for attention in ATTENTIONS]
        scores: dict[tuple[str, int], list[list[float]]] = {}
        equal: list[bool] = []
        for length in LENGTHS:
            by_arm = [
                {
                    task: self._parts.once(
                        _name(arm, task, length), self._answer, arm, load, task, length
                    )
                    for task in TASKS
                }
                for arm in arms
            ]
            for task in TASKS:
                both = [answers[task] for answers in by_arm]
                scores[task, length] = [each["scores"] for each in both]
                pairs = zip(*(each["outputs"] for each in both), strict=True)
                equal += [one == other for one, other in pairs]
        return {"scores": scores, "agreement": statistics.mean(equal)}

    def _answer(
        self, arm: Arm, load: Callable[[Arm], Decoder], name: str, length: int
    ) -> dict[str, Any]:
        tokenizer, texts = self._tokenizer, self.write_texts(name, length)
        complete = functools.partial(
            arm.complete, load(arm), tokenizer, max_new_tokens=_answer_tokens(name)
        )
        prompts = [[render_prompt(tokenizer, task.prompt) for task in text] for text in texts]
        if torch.cuda.is_available() or max(map(len, texts)) == 1:
            outputs = complete([prompt for of_text in prompts for prompt in of_text])
        else:
            outputs = [out for of_text in prompts for out in complete(of_text, one_by_one=True)]
        scores = [
            score_reply(tokenizer.decode(output), task.answers)
            for output, task in zip(outputs, itertools.chain(*texts), strict=True)
        ]
        print(f"  {arm.attention} {name} {length}: {statistics.mean(scores):.3f}", flush=True)
        return {"texts": len(texts), "scores": scores, "outputs": outputs}

    def write_texts(self, name: str, length: int) -> list[list[LongTask]]:
        """Questions, by the text that they are about."""
        count = functools.partial(count_prompt_tokens, self._tokenizer)
        most = length - _answer_tokens(name)
        texts: list[list[LongTask]] = []
        left = self._size.questions
        while left and len(texts) < self._size.texts:
            task = build_long_task(name, count, most, seed=len(texts))
            texts.append(task.split()[:left])
            left -= len(texts[-1])
        return texts

    @functools.cached_property
    def _tokenizer(self) -> Tokenizer:
        return Tokenizer(self._gated)


def _name(arm: Arm, task: str, length: int) -> str:
    return f"tasks_{arm.precision}_{arm.attention}_{task}_{length}"


def _name_lesson(number: int) -> str:
    return f"tasks_lesson_{number}"


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
