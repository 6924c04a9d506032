"""The long-context benchmark: its parts, each stored when it has been measured, and the record."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from jobs.benchmarks import long_context_operator as operator
from jobs.benchmarks import long_context_reading as reading
from jobs.benchmarks.base_files import BaseFiles
from jobs.benchmarks.long_context_arms import LENGTHS
from jobs.benchmarks.long_context_fidelity import DEPTHS, FidelityBenchmark
from jobs.benchmarks.long_context_models import Lesson, TaskSize
from jobs.benchmarks.long_context_peers import PEERS, measure_peer
from jobs.benchmarks.long_context_report import (
    fidelity_rows,
    memory_rows,
    operator_rows,
    plot_operator,
    reading_rows,
    render_gates,
    render_passkeys,
    render_tasks,
    task_rows,
)
from jobs.benchmarks.long_context_tasks import TaskBenchmark
from jobs.benchmarks.parts import StoredParts
from jobs.benchmarks.peer_environments import write_peer_gguf
from r1ray.data.long_context import TASKS
from r1ray.data.texts import read_english
from r1ray.evaluation.record import build_record, describe_run, render_table, write_json
from r1ray.models.tokenizer import Tokenizer

__all__ = ["LongContextBenchmark"]

_TARGET = Path("docs/benchmarks")
_ON_GPU = TaskSize(
    (
        Lesson(
            tuple(TASKS), 2400, 8192, batch_tokens=16_384, batches_per_step=2, learning_rate=5e-4
        ),
    ),
    num_gate_texts=240,
    num_gate_documents=60,
    num_questions=100,
    max_questions_per_text=4,
)
_LOOKUPS = ("niah_multikey_2", "niah_multikey_3")
_TAUGHT = (*_LOOKUPS, "fwe", *_LOOKUPS, "niah_single_1")  # no more than have to count
_ON_CPU = TaskSize(  # short texts teach more a second
    (
        Lesson(_TAUGHT, 216, 2048, batch_tokens=2048, batches_per_step=1, learning_rate=3e-4),
        Lesson(_TAUGHT, 60, 4096, batch_tokens=4096, batches_per_step=1, learning_rate=2e-4),
    ),
    num_gate_texts=24,
    num_gate_documents=12,
    num_questions=100,
    max_questions_per_text=4,
)
_REREAD = 16_000


class LongContextBenchmark:
    """What `jobs.bench_long_context` measures; every result is kept in `work`."""

    def __init__(self, work: Path, source: str) -> None:
        self._work = work
        self._parts = StoredParts(work)
        self._files = BaseFiles(work, source)
        self._fidelity = FidelityBenchmark(self._parts, work, source)
        size = _ON_GPU if torch.cuda.is_available() else _ON_CPU
        self._tasks = TaskBenchmark(
            self._parts, work, source, size, lambda: self._fidelity.model_dir
        )

    def operator(self) -> dict[str, Any]:
        """From kind -> length -> arm -> seconds; dense and sparse in turns."""
        kinds = {"prefill": operator.measure_prefill, "decode": operator.measure_decode}
        return {
            kind: {
                length: self._parts.once(f"operator_{kind}_{length}", measure, length)
                for length in operator.LENGTHS
            }
            for kind, measure in kinds.items()
        }

    def memory(self) -> dict[str, Any]:
        """Peaks of one call at 1,024 tokens, and the growth of the sparse one."""
        return {
            "at_1024": self._parts.once("memory_1024", operator.measure_memory),
            "growth": self._parts.once("memory_growth", operator.measure_growth),
        }

    def reading(self) -> dict[str, Any]:
        """Seconds of reading and decoding by length and attention, and of re-reading."""
        base, ids = self._files.base(), self._token_ids()
        found: dict[str, Any] = {"by_length": {}}
        for length in reading.LENGTHS:
            name = f"reading_{length}"
            measured = self._parts.once(name, reading.measure_reading, base, ids, length)
            print(f"  {name}: {reading.describe(measured)}", flush=True)
            found["by_length"][length] = measured
        found["reread"] = self._parts.once(
            f"reading_again_{_REREAD}", reading.measure_rereading, base, ids, _REREAD
        )
        return found

    def peers(self) -> list[dict[str, Any]]:
        """The other engines, one after the other."""
        base, ids, work = self._files.base(), self._token_ids(), self._work / "peers"
        work.mkdir(parents=True, exist_ok=True)
        gguf = write_peer_gguf(base, work)
        return [
            self._parts.once(f"peer_{name}", measure_peer, name, base, gguf, work, ids)
            for name in PEERS
        ]

    def fidelity(self) -> None:
        """Perplexity, passkeys and recall of the base with gates."""
        self._fidelity.run()

    def tasks(self) -> None:
        """Scores of tasks that the model is taught."""
        self._tasks.run()

    def file_record(self, options: Sequence[str]) -> str:
        """Write the record, its tables and the plot; returns the table.

        Args:
            options: of the command, besides the parts.
        """
        found, reads = self.operator(), self.reading()
        fidelity, tasks = self._fidelity.results(), self._tasks.results()
        rows = [
            *memory_rows(**self.memory()),
            *operator_rows(found),
            *reading_rows(reads, self.peers()),
            *fidelity_rows(fidelity),
            *task_rows(tasks),
        ]
        kept = {"fidelity": fidelity, "tasks": tasks}
        parts = ["operator", "memory", "reading", "peers", *(part for part in kept if kept[part])]
        command = ["python", "-m", "jobs.bench_long_context", "--only", *parts, *options]
        _TARGET.mkdir(parents=True, exist_ok=True)
        record = build_record(
            "long_context", shlex.join(command), rows, self._parts.circumstances()
        )
        write_json(_TARGET / "long_context.json", {**record, "peers": self.peers()})
        plot_operator(found, _TARGET / "long_context.png")
        table = render_table(rows)
        text = (
            f"# Long contexts\n\n{describe_run(record)}\n\n{table}\n"
            "![operator](long_context.png)\n\n"
            f"{self._render_fidelity(fidelity)}{self._render_tasks(tasks)}{_NOTES}"
        )
        (_TARGET / "long_context.md").write_text(text, encoding="utf-8")
        return table

    def _render_fidelity(self, fidelity: dict[str, Any]) -> str:
        if not fidelity:
            return ""
        return (
            f"## Passkeys at depths\n\n{render_passkeys(fidelity, DEPTHS)}\n"
            "## Gates, trained by `jobs/configs/gates.yaml`\n\n"
            f"{render_gates(self._fidelity.gate_training())}\n"
        )

    def _render_tasks(self, tasks: dict[str, Any]) -> str:
        if not tasks:
            return ""
        return (
            f"## Tasks\n\n{render_tasks(tasks, TASKS, LENGTHS)}\n"
            "## Gates of the model that was taught them\n\n"
            f"{render_gates(self._tasks.gate_training())}\n"
        )

    def _token_ids(self) -> list[int]:
        return Tokenizer(self._files.base()).encode(read_english())


_NOTES = """
- Sizes throughout: 1.5 log2(n) blocks of 64 tokens besides the first, the block before and the own
  one; groups of 7.5% of the heads choose by exact scores of the keys, and keep the gate's blocks
  besides where a token is written; dense up to 2,048 tokens; int8 keys and values. Operator
  and reading have gates of that size that were not trained and heads marked at random, which take
  the same time; fidelity and tasks have trained gates, and the heads that missed most in training.
- Operator: `jobs/benchmarks/long_context_operator.py` says what is timed. Decode is timed in seven
  processes, which differ by up to a factor of two. The exponents are fitted
  between 8,192 and 65,536 tokens. Memory: the peak of resident memory over the call, its output
  left out; sparse attention is forced on at 1,024 tokens, where it would be dense.
- Reading: dense and sparse in turns, ratios by pairs with their range; INT8 weights, chunks of
  1,024 tokens. Dense attention runs the same kernels over all blocks, which takes less time than
  torch's over float32. Peers run in environments of their own, two threads each; what each computes
  in is in the record.
- Fidelity: SmolLM2 as published, with gates trained on 2 cores, on tasks of the same templates.
  Perplexity of Python's documentation in whole windows, of tokens beyond 2,048; token agreement is
  of the greedy choices at the last 256 of each. Passkeys: 5 keys at each depth, none of them in a
  block that is always kept, asked without a chat. Needle recall: of the heads that give the
  needle's block at least a tenth of their attention as the answer is written, the share whose
  group keeps that block.
- Tasks: SmolLM2 is taught tasks densely first: on a GPU all six, 2,400 texts of up to 8,192 tokens;
  on a CPU the needles and fwe, 216 texts of up to 2,048 tokens and 60 of up to 4,096. Then the
  published model's gates are trained further, on the same tasks and source code. Answers are
  greedy; up to 4 questions are about one text, and intervals are bootstrapped over texts; that of
  the worst drop does not allow for its having been picked. None of the texts was looked at while
  lessons were chosen. A task counts where dense attention scores at least 50%; what was not taught
  is asked 24 questions, and listed.
"""
