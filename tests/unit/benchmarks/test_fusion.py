"""The fusion benchmark: equal arms, controls that see half, a rule that was fixed, runs kept."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from jobs.benchmarks import fusion as fusion_module
from jobs.benchmarks.fusion import FusionBenchmark
from jobs.benchmarks.fusion_arms import (
    ARMS,
    MAX_FLOP_SPREAD,
    MAX_PARAMETER_SPREAD,
    REGIMES,
    RunSize,
    answer,
    build_decoder,
    measure_arms,
    pretrain,
    train_arm,
)
from jobs.benchmarks.fusion_data import VOCABULARY, write_examples, write_texts
from jobs.benchmarks.fusion_report import compare, difference_rows, plot_arms, render_kinds
from r1ray.data.batch_set import IGNORED
from r1ray.data.scenes import KINDS

TINY = RunSize(steps=3, batch=4, train_examples=20, test_examples=20, text_steps=2, text_batch=4)
CPU = torch.device("cpu")


def test_arms_are_equal_in_parameters_and_work() -> None:
    found = measure_arms()

    assert set(found) == {"early", "mid", "late"}
    for values in found.values():
        assert values["parameters"] < 5e6
        assert abs(values["parameters"] / found["early"]["parameters"] - 1) < MAX_PARAMETER_SPREAD
        assert abs(values["flop"] / found["early"]["flop"] - 1) < MAX_FLOP_SPREAD


def test_every_word_of_questions_and_scenes_is_known() -> None:
    ids_NL, labels_NL = write_texts(40, 0, questions=3)

    assert len(set(VOCABULARY)) == len(VOCABULARY)
    assert ((labels_NL != IGNORED).sum(1) == 1 + 3 + 1).all()  # the second asks for three words
    is_target = labels_NL[:, :-1] != IGNORED
    assert (ids_NL[:, 1:][is_target] == labels_NL[:, :-1][is_target]).all()


def test_examples_end_in_their_answers() -> None:
    one, more = write_examples(20, 10), write_examples(20, 10, questions=4)

    for examples, count in ((one, 1), (more, 1 + 3 + 1 + 3)):  # every other: size, color, shape
        is_answered = examples.labels_NT[:, :-1] != IGNORED
        assert (is_answered.sum(1) == count).all()
        found = examples.ids_NT[:, 1:][is_answered]
        assert (found == examples.labels_NT[:, :-1][is_answered]).all()
        assert examples.kinds == KINDS * 4
    assert (one.pixels_N3SS == more.pixels_N3SS).all()


@pytest.mark.parametrize(
    ("arm", "without_image", "without_words"),
    [("early", False, False), ("question_only", True, False), ("image_only", False, True)],
)
def test_controls_do_not_see_the_other_half(
    arm: Any, without_image: bool, without_words: bool
) -> None:
    examples, chosen = write_examples(20, 100), torch.arange(20)
    other_image = dataclasses.replace(examples, pixels_N3SS=examples.pixels_N3SS.flip(0))
    ids_NT = examples.ids_NT.roll(1, 0)
    other_words = dataclasses.replace(examples, ids_NT=ids_NT)
    decoder = build_decoder(0)
    train_arm(arm, "trained", 1e-3, 0, TINY, decoder, examples, {})

    with torch.no_grad():
        seen, image, words = (
            answer(decoder, arm, asked, chosen)[0] for asked in (examples, other_image, other_words)
        )

    assert torch.equal(seen, image) is without_image
    assert torch.equal(seen, words) is without_words


def test_without_words_there_is_one_answer() -> None:
    examples, chosen = write_examples(20, 7, questions=4), torch.arange(20)
    decoder = build_decoder(0)
    train_arm("image_only", "trained", 1e-3, 0, TINY, decoder, examples, {})

    _, labels_P = answer(decoder, "image_only", examples, chosen)

    _, first_P = answer(decoder, "image_only", write_examples(20, 7), chosen)
    assert torch.equal(labels_P, first_P)


def test_a_frozen_decoder_stays_as_it_was() -> None:
    examples = write_examples(20, 7)
    decoder, before = build_decoder(0), build_decoder(0).state_dict()

    train_arm("mid", "frozen", 1e-2, 0, TINY, decoder, examples, {"test": examples})

    after = decoder.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_decoder_learns_from_texts() -> None:
    size = dataclasses.replace(TINY, text_steps=40, text_batch=16)
    texts = write_texts(16, 0, questions=2)
    is_target = texts[1] != IGNORED

    def loss(model: Any) -> float:
        with torch.no_grad():
            logits = model(texts[0])[is_target]
            return float(torch.nn.functional.cross_entropy(logits, texts[1][is_target]))

    assert loss(pretrain(size, 0, texts, CPU)) < 0.7 * loss(build_decoder(0))


def _right(rates: dict[str, float], seed: int = 0) -> dict[str, NDArray[np.bool_]]:
    rng = np.random.default_rng(seed)
    return {arm: rng.random((5, 400)) < rate for arm, rate in rates.items()}


@pytest.mark.parametrize(
    ("frozen", "trained", "verdicts"),
    [
        ((0.5, 0.8, 0.5), (0.5, 0.8, 0.5), (True, True, True)),
        ((0.5, 0.8, 0.5), (0.8, 0.8, 0.5), (True, False, False)),  # as good is not better
        ((0.9, 0.8, 0.5), (0.5, 0.8, 0.5), (False, True, False)),
        ((0.5, 0.8, 0.9), (0.9, 0.5, 0.5), (False, False, False)),
    ],
)
def test_mid_is_best_where_both_intervals_lie_above_zero(
    frozen: tuple[float, ...], trained: tuple[float, ...], verdicts: tuple[bool, ...]
) -> None:
    right = {
        regime: _right(dict(zip(("early", "mid", "late"), rates, strict=True)), seed)
        for seed, (regime, rates) in enumerate((("frozen", frozen), ("trained", trained)))
    }

    rows = {row.id: row for row in difference_rows(right)}

    names = ("fusion.verdict_frozen", "fusion.verdict_trained", "fusion.mid_vs_best_other")
    assert tuple(rows[name].met for name in names) == verdicts


def test_differences_are_paired() -> None:
    """Questions are of very different difficulty; that mid gets a few more of them shows."""
    easy_RQ = np.tile(np.random.default_rng(0).random(400) < 0.5, (5, 1))
    better_RQ = easy_RQ.copy()
    better_RQ[:, np.flatnonzero(~easy_RQ[0])[:20]] = True

    found = compare(better_RQ, easy_RQ)

    assert found.points == pytest.approx(5.0)
    assert 2.5 < found.low < 5.0 < found.high < 7.5


def test_seeds_count_as_they_differ() -> None:
    """A gain that one seed of five has alone is none to rely on."""
    before_RQ = np.zeros((5, 400), dtype=bool)
    after_RQ = before_RQ.copy()
    after_RQ[0] = True

    assert compare(after_RQ, before_RQ).low == 0.0


def test_tables_and_the_plot_have_every_kind(tmp_path: Path) -> None:
    right = {"frozen": _right({"early": 0.5, "mid": 0.6, "late": 0.4})}
    kinds, chances = ["count", "exist"] * 200, {"count": 0.25, "exist": 0.5}

    table = render_kinds(right, kinds, chances)
    plot_arms(right, kinds, chances, tmp_path / "plot.png")

    assert table.splitlines()[2] == "| | *question alone, at best* | 25.0 | 50.0 |"
    assert len(table.splitlines()) == 6
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_benchmark_goes_on_where_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = write_examples(20, 7)
    monkeypatch.setattr(fusion_module, "read_easy_vqa", lambda: (examples, examples))

    def build(*shard: int) -> FusionBenchmark:
        return FusionBenchmark(
            tmp_path / "work",
            size=TINY,
            num_seeds=2,
            target=tmp_path / "docs",
            shard=(shard[0], 2) if shard else (0, 1),
        )

    counts = []
    for number in (0, 1):
        build(number).sweep()
        counts.append(len(list((tmp_path / "work").glob("*_[01].json"))))
    build().file_record("python -m jobs.bench_fusion")

    record = json.loads((tmp_path / "docs" / "fusion.json").read_text())
    rows = {row["id"] for row in record["results"]}
    accuracies = {f"fusion.accuracy_{regime}_{arm}" for regime in REGIMES for arm in ARMS}
    assert accuracies <= rows
    assert {"fusion.mid_vs_best_other", "fusion.verdict_frozen", "fusion.verdict_trained"} <= rows
    assert counts == [15, 30]
    runs = {path.name for path in (tmp_path / "work").glob("*_[01].json")}
    assert len(runs) == 40, "30 of the sweep, and the second seed of each arm and regime"
    assert "FLOP" in (tmp_path / "docs" / "fusion.md").read_text()
