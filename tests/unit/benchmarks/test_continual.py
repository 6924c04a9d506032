import random
from pathlib import Path

import pytest

from jobs.bench_continual import main
from jobs.benchmarks.continual_arms import ARMS, DEFAULT, JOINT, Scale, build_model, learn, score
from jobs.benchmarks.continual_report import Run, render_arms, rows
from jobs.benchmarks.continual_tasks import FAMILIES, accuracy, draw, encode, to_batch
from r1ray.config.continual import ContinualConfig
from r1ray.data.batch_set import IGNORED
from r1ray.models.checkpoint import save_model

_AFTER = [
    {"a": 0.9, "b": 0.0, "c": 0.1},
    {"a": 0.6, "b": 1.0, "c": 0.0},
    {"a": 0.5, "b": 0.8, "c": 0.7},
]


def test_the_default_arm_is_what_the_configuration_defaults_to() -> None:
    assert ARMS[DEFAULT] == ContinualConfig()


def test_forgetting_and_transfer_are_read_off_the_matrix() -> None:
    run = Run(_AFTER, [1.0, 2.0], 0)
    assert run.average_accuracy == pytest.approx((0.5 + 0.8 + 0.7) / 3)
    assert run.forgetting == pytest.approx(((0.9 - 0.5) + (1.0 - 0.8)) / 2)
    assert run.backward_transfer == pytest.approx(-run.forgetting)
    assert run.learned == [1.0, 0.7]
    better = Run([*_AFTER[:2], {"a": 0.95, "b": 0.8, "c": 0.7}], [], 0)
    assert better.forgetting == pytest.approx((-0.05 + 0.2) / 2)  # it went on learning a


def test_rows_have_the_promised_ids_and_bars() -> None:
    kept = Run(
        [_AFTER[0], {"a": 0.88, "b": 0.98, "c": 0.0}, {"a": 0.88, "b": 0.98, "c": 0.69}], [], 9
    )
    runs = {name: [Run(_AFTER, [3.0], 0)] for name in ARMS} | {DEFAULT: [kept]}
    runs[JOINT] = [Run([_AFTER[2]], [4.0], 0)]
    found = {row.id: row for row in rows(runs)}
    assert found["continual.naive_forgetting"].value == pytest.approx(0.3)
    assert found["continual.default_forgetting"].value == pytest.approx(0.01)
    assert found["continual.default_new_task_cost"].value == pytest.approx(0.02)
    bars = [found[f"continual.{name}"].bar for name in ("naive_forgetting", "default_forgetting")]
    assert bars == [">= 0.15", "<= 0.03"]
    assert all(row.met for row in found.values() if row.bar)
    assert f"| {DEFAULT} (default) | 85.0% | 1.0 points |" in render_arms(runs)


def test_answers_of_the_families_are_what_their_names_say() -> None:
    chance = random.Random(0)
    for _ in range(50):
        word, answer = FAMILIES["reverse"](chance)
        assert answer == word[::-1]
        digits, answer = FAMILIES["sort"](chance)
        assert list(answer) == sorted(digits)
        word, answer = FAMILIES["every_other"](chance)
        assert answer == word[::2]
        word, answer = FAMILIES["shift"](chance)
        assert [(ord(b) - ord(a)) % 26 for a, b in zip(word, answer, strict=True)] == [3] * len(
            word
        )


def test_held_out_questions_are_not_trained_on() -> None:
    heldout = draw("sort", 100, seed=10**6)
    training = draw("sort", 2000, seed=0, without=heldout)
    assert len({problem.question for problem in [*training, *heldout]}) == 2100


def test_labels_are_the_answer_and_its_end() -> None:
    samples = [encode(problem) for problem in draw("reverse", 3, seed=0)]
    batch = to_batch(samples)
    for (ids, is_target), labels in zip(samples, batch.labels_BT.tolist(), strict=True):
        shown = [label for label in labels if label != IGNORED]
        assert shown == [token for token, flag in zip(ids, is_target, strict=True) if flag]
    assert batch.num_targets == sum(sum(is_target) for _, is_target in samples)


def test_a_phase_writes_what_the_next_one_needs(tmp_path: Path) -> None:
    scale = Scale(num_steps=2, num_problems=4, device="cpu")
    save_model(build_model(0), tmp_path / "start")
    assert accuracy(build_model(0), scale.heldout("sort")) == 0.0
    learn(tmp_path / "start", ["sort"], ARMS[DEFAULT], scale, 0, tmp_path / "one")
    learn(tmp_path / "one", ["shift"], ARMS[DEFAULT], scale, 0, tmp_path / "two")
    assert (tmp_path / "two" / "memory" / "reservoir.parquet").is_file()
    assert set(score(tmp_path / "two", scale)) == set(FAMILIES)


def test_an_unknown_arm_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--work", str(tmp_path), "--only", "magic"]) == 2
    assert "no arm 'magic'; choose from naive, replay_5" in capsys.readouterr().err
