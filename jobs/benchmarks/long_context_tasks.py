"""What sparse attention loses on tasks that the model was taught: dense against sparse answers.

A task's texts of one length are stored in sheets, so that a benchmark that is stopped loses little.
"""

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from jobs.benchmarks.base_files import BaseFiles
from jobs.benchmarks.local_training import Step
from jobs.benchmarks.long_context_arms import (
    ATTENTIONS,
    LENGTHS,
    PRECISIONS,
    Arm,
    Attention,
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
from r1ray.errors import ArtifactError
from r1ray.models import Decoder
from r1ray.models.tokenizer import Tokenizer

__all__ = ["TaskBenchmark"]

_ANSWER_TOKENS = {"cwe": 64, "vt": 48, "fwe": 40, "niah_multikey_3": 32}
_SHORT_ANSWER = 16
_GATES = "tasks_gates"
_SHEETS = 2  # of a task's texts of one length
_UNTAUGHT_QUESTIONS = 24  # what such tasks lose says nothing: they are listed


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
        self._refuse_leftovers()
        if not self._parts.has(_GATES):
            self._train()
        for precision in PRECISIONS:
            self._compare(precision)

    def _train(self) -> None:
        learned, texts = self._files.base(), 0
        for number, lesson in enumerate(self._size.lessons):
            target = self._work / f"learned_{number}"
            self._parts.once(
                _name_lesson(number), _timed(learn_tasks), learned, target, lesson, texts
            )
            learned, texts = target, texts + lesson.num_texts
        self._parts.once(
            _GATES, _timed(train_gates), learned, self._gates(), self._gated, self._size
        )

    def _refuse_leftovers(self) -> None:
        """Refuse what was measured with models that have to be trained again."""
        trainings = [*map(_name_lesson, range(len(self._size.lessons))), _GATES]
        if self._parts.has(_GATES):
            return
        missing = next(name for name in trainings if not self._parts.has(name))
        later = trainings[trainings.index(missing) :]
        # Gates make no difference to dense answers.
        attentions: Sequence[Attention] = ["sparse"] if missing == _GATES else ATTENTIONS
        for precision in PRECISIONS:
            later += self._cells(precision, attentions)
        stale = [name for name in later if self._parts.has(name)]
        if stale:
            raise ArtifactError(
                f"{', '.join(stale)}: measured with what {missing} was, which is not in "
                f"{self._work}; put it back, or remove these"
            )

    def results(self) -> dict[str, Any]:
        """By precision: (dense, sparse) scores by task and length, and agreement.

        Scores are those of all questions, by the text that they are about; agreement is the share
        of equal answers. Precisions of which everything is stored.
        """
        for lesson in map(_name_lesson, range(len(self._size.lessons))):
            if self._parts.has(lesson):
                self._parts.read(lesson)  # so that the record names its commit
        measured = list_measured(self._parts, self._parts_of)
        return {precision: self._compare(precision) for precision in measured}

    def _parts_of(self, precision: Precision) -> list[str]:
        return [_GATES, *self._cells(precision)]

    def _cells(
        self, precision: Precision, attentions: Sequence[Attention] = ATTENTIONS
    ) -> list[str]:
        return [
            _name(Arm(precision, attention), task, length, sheet)
            for attention in attentions
            for task in TASKS
            for length in LENGTHS
            for sheet in range(_SHEETS)
        ]

    def gate_training(self) -> dict[str, Any]:
        """How gates were trained: `result` of all steps, seconds, device."""
        return dict(self._parts.read(_GATES))

    def _compare(self, precision: Precision) -> dict[str, Any]:
        load = functools.cache(lambda arm: arm.load(self._gated))
        arms = [Arm(precision, attention) for attention in ATTENTIONS]
        scores: dict[tuple[str, int], list[list[list[float]]]] = {}
        equal: list[bool] = []
        for length in LENGTHS:
            by_arm = [
                {task: self._answer(arm, load, task, length) for task in TASKS} for arm in arms
            ]
            for task in TASKS:
                both = [answers[task] for answers in by_arm]
                scores[task, length] = [[text["scores"] for text in texts] for texts in both]
                for of_dense, of_sparse in zip(*both, strict=True):
                    pairs = zip(of_dense["outputs"], of_sparse["outputs"], strict=True)
                    equal += [one == other for one, other in pairs]
        return {"scores": scores, "agreement": statistics.mean(equal)}

    def _answer(
        self, arm: Arm, load: Callable[[Arm], Decoder], name: str, length: int
    ) -> list[dict[str, Any]]:
        """Scores and outputs of a task's questions, by text."""
        texts: list[dict[str, Any]] = []
        for sheet in range(_SHEETS):
            stored = _name(arm, name, length, sheet)
            texts += self._parts.once(stored, self._answer_sheet, arm, load, name, length, sheet)
        return texts

    def _answer_sheet(
        self, arm: Arm, load: Callable[[Arm], Decoder], name: str, length: int, sheet: int
    ) -> list[dict[str, Any]]:
        tokenizer, texts = self._tokenizer, self.write_texts(name, length, sheet)
        complete = functools.partial(
            arm.complete, load(arm), tokenizer, max_new_tokens=_answer_tokens(name)
        )
        prompts = [[render_prompt(tokenizer, task.prompt) for task in text] for text in texts]
        if torch.cuda.is_available() or all(len(text) == 1 for text in texts):
            flat = iter(complete([prompt for of_text in prompts for prompt in of_text]))
            outputs = [[next(flat) for _ in of_text] for of_text in prompts]
        else:
            outputs = [complete(of_text, max_concurrency=1) for of_text in prompts]
        scores = [
            [
                score_reply(tokenizer.decode(output), task.answers)
                for output, task in zip(of_text, text, strict=True)
            ]
            for of_text, text in zip(outputs, texts, strict=True)
        ]
        mean = statistics.mean(map(statistics.mean, scores))
        print(f"  {arm.attention} {name} {length}, sheet {sheet}: {mean:.3f}", flush=True)
        return [
            {"scores": of_text, "outputs": said}
            for of_text, said in zip(scores, outputs, strict=True)
        ]

    def write_texts(self, name: str, length: int, sheet: int) -> list[list[LongTask]]:
        """The questions of one sheet, by the text that they are about.

        Seeds begin at the length: no two lengths have the same needles or words, and those from 0
        on, by which lessons were chosen, are not asked.
        """
        count = functools.partial(count_prompt_tokens, self._tokenizer)
        most = length - _answer_tokens(name)
        taught = name in self._size.lessons[-1].tasks
        questions = self._size.num_questions if taught else _UNTAUGHT_QUESTIONS
        texts: list[list[LongTask]] = []
        while sum(map(len, texts)) < questions:
            task = build_long_task(name, count, most, seed=length + len(texts))
            texts.append(task.split()[: self._size.max_questions_per_text])
        return texts[sheet::_SHEETS]

    @functools.cached_property
    def _tokenizer(self) -> Tokenizer:
        return Tokenizer(self._gated)


def _name(arm: Arm, task: str, length: int, sheet: int) -> str:
    return f"tasks_{arm.precision}_{arm.attention}_{task}_{length}_{sheet}"


def _name_lesson(number: int) -> str:
    return f"tasks_lesson_{number}"


def _timed(train: Callable[..., list[Step]]) -> Callable[..., dict[str, Any]]:
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
