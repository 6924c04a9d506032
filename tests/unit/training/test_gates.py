"""Training gates: the model stays as it is, and they learn where its attention goes."""

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from r1ray.config.training import GatesConfig, TrainConfig
from r1ray.data.batch_set import IGNORED, MicroBatch
from r1ray.errors import ArtifactError, ConfigError, ShapeError
from r1ray.exchange import LocalTransport, build_exchange
from r1ray.exchange.transport import Pending
from r1ray.models import Decoder, load_model, save_model
from r1ray.models.gates import (
    GATES_NAME,
    attach_gates,
    detach_gates,
    is_gate,
    list_attentions,
)
from r1ray.models.quantization import quantize_modules
from r1ray.ops.block_gate import BlockGate, gate_targets
from r1ray.ops.block_selection import BLOCK, DENSE_BLOCKS
from r1ray.training.checkpoint import load_checkpoint, save_checkpoint
from r1ray.training.gates import GateTraining, _list_gates, average_missed, check_gate_lengths
from r1ray.training.step import TrainState
from tests.fakes import tiny_model
from tests.unit.training.batches import random_batch

BATCH = random_batch(2, 400, seed=0)


def _gated(seed: int = 0) -> Decoder:
    model = tiny_model(seed=seed)
    model.requires_grad_(False)
    attach_gates(model)
    return model


def _state(model: Decoder) -> TrainState:
    gates = GatesConfig()
    config = TrainConfig(
        num_steps=40, warmup_steps=2, precision="fp32", learning_rate=2e-2, gates=gates
    )
    exchange = build_exchange(config.exchange)
    return TrainState(model, config, exchange, LocalTransport(), GateTraining(gates, seed=0))


def test_gates_learn_and_nothing_else_changes() -> None:
    model, plain = _gated(), tiny_model()
    with torch.no_grad():  # sharper attention than a random model's: something to learn
        for owner in (model, plain):
            for attention in list_attentions(owner):
                attention.q_proj.weight.mul_(4.0)
                attention.k_proj.weight.mul_(4.0)
    state = _state(model)
    losses = [state.run_step([BATCH]).loss for _ in range(40)]
    assert losses[0] is not None
    assert losses[-1] is not None
    assert losses[-1] < 0.9 * losses[0]
    missed = sum(float(a.gate.missed.sum()) for a in list_attentions(model) if a.gate)  # type: ignore[union-attr, operator]
    marks = sum(int(a.gate.is_marked.sum()) for a in list_attentions(model) if a.gate)  # type: ignore[union-attr, operator]
    assert missed == marks == 0  # so short a sequence keeps all of its blocks
    trained = {name: item for name, item in model.state_dict().items() if not is_gate(name)}
    for name, item in plain.state_dict().items():
        assert torch.equal(trained[name], item), name
    assert all(attention.observe is None for attention in list_attentions(model))


def test_recall_is_the_share_of_needs_in_kept_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert GateTraining(GatesConfig(), seed=0).recall is None
    batch = random_batch(2, 400, seed=3)
    found = []
    for dense, most in ((32, 64), (2, 64), (2, 2), (2, 0)):
        monkeypatch.setattr("r1ray.ops.block_selection.DENSE_BLOCKS", dense)
        monkeypatch.setattr("r1ray.training.gates.DENSE_BLOCKS", dense)
        monkeypatch.setattr("r1ray.ops.block_selection._LEAST", min(4, most))
        monkeypatch.setattr("r1ray.ops.block_selection._MOST", most)
        objective = GateTraining(GatesConfig(), seed=0)
        objective.loss(_gated(), batch)
        found.append(objective.recall)
    short, all_of_few, some, none = found
    assert short is None  # nothing is chosen
    assert all_of_few == pytest.approx(1.0)  # of up to six blocks
    assert some is not None
    assert 0.4 < some < 0.95  # two of one to four
    assert none == 0.0


def test_the_model_reads_as_it_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """In INT8, chunk after chunk, what it reads at once over keys and values in float."""
    seen: list[list[torch.Tensor]] = [[], []]
    whole, model = _gated(), _gated()
    with torch.no_grad():
        for attention in (*list_attentions(whole), *list_attentions(model)):
            attention.q_proj.weight.mul_(4.0)
            attention.k_proj.weight.mul_(4.0)
    quantize_modules(whole)
    batch = random_batch(2, 20 * BLOCK + 10, seed=5)

    def observe(_1: object, _2: object, _3: object, q: torch.Tensor, k: torch.Tensor) -> None:
        for unit in range(4, 21):
            part = slice(unit * BLOCK, unit * BLOCK + BLOCK)
            seen[0].append(gate_targets(q[:, :, part], k, part.start))

    def spy(q: torch.Tensor, k: torch.Tensor, start: int) -> torch.Tensor:
        seen[1].append(gate_targets(q, k, start))
        return seen[1][-1]

    for attention in list_attentions(whole):
        attention.observe = observe
    whole.hidden(batch.input_ids_BT)
    monkeypatch.setattr("r1ray.training.gates.gate_targets", spy)
    objective = GateTraining(GatesConfig(num_units=64), seed=0)
    objective.loss(model, objective.draw(model, batch, 0))
    by_shape = [sorted(of, key=lambda item: item.shape[-1]) for of in seen]
    assert len(by_shape[0]) == 17 * model.config.num_layers
    for one, other in zip(*by_shape, strict=True):
        assert (one - other).abs().mean() < 0.05 * one.mean()
    assert model.scheme is None


def test_what_gates_miss_marks_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("r1ray.ops.block_selection.DENSE_BLOCKS", 2)
    monkeypatch.setattr("r1ray.ops.block_selection._LEAST", 0)
    monkeypatch.setattr("r1ray.ops.block_selection._MOST", 0)  # nothing but the first is chosen
    model = _gated()
    with torch.no_grad():
        for attention in list_attentions(model):
            attention.q_proj.weight.mul_(8.0)
            attention.k_proj.weight.mul_(8.0)
    gates = GatesConfig(exact_heads=0.5)
    GateTraining(gates, seed=0).loss(model, random_batch(2, 400, seed=3))
    found = [attention.gate for attention in list_attentions(model)]
    assert all(isinstance(gate, BlockGate) for gate in found)
    missed = torch.stack([gate.missed for gate in found])  # type: ignore[union-attr]
    marks = torch.stack([gate.is_marked for gate in found])  # type: ignore[union-attr]
    assert int(marks.sum()) == marks.numel() // 2
    assert missed[marks].min() >= missed[~marks].max()


def test_heads_are_marked_by_what_all_workers_missed() -> None:
    mine, other = _gated(), _gated()
    missed = torch.tensor([[0.8, 0.0, 0.2, 0.0], [0.0, 0.0, 0.9, 0.3]])
    for model, missed_N in zip((mine, other), missed, strict=True):
        _list_gates(model)[0].missed.copy_(missed_N)

    class Two(LocalTransport):
        world_size = 2

        def all_reduce_sum(self, x: Tensor) -> Pending:
            x += torch.stack([gate.missed for gate in _list_gates(other)])
            return super().all_reduce_sum(x)

    average_missed(mine, Two(), GatesConfig(exact_heads=0.13))

    first = _list_gates(mine)[0]
    assert first.missed.tolist() == pytest.approx([0.4, 0.0, 0.55, 0.15])
    assert first.is_marked.tolist() == [False, False, True, False]


def test_what_answers_look_for_is_what_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each sequence counts the same, however many targets it has."""
    monkeypatch.setattr(
        "r1ray.training.gates.count_missed",
        lambda _kept, largest: torch.arange(largest.shape[2]).float().expand(largest.shape[:3]),
    )
    labels = torch.full((2, 400), IGNORED)
    labels[0, 4 * BLOCK + 44] = labels[0, 4 * BLOCK + 46] = 1
    labels[1, 5 * BLOCK + 8] = 1
    batch = MicroBatch(BATCH.input_ids_BT[:2], labels, 800, 3)
    model, objective = _gated(), GateTraining(GatesConfig(), seed=0)
    objective.loss(model, objective.draw(model, batch, 0))
    for attention in list_attentions(model):
        assert isinstance(attention.gate, BlockGate)
        expected = torch.full_like(attention.gate.missed, 0.05 * (45 + 8) / 2)
        torch.testing.assert_close(attention.gate.missed, expected)
    labels[1] = IGNORED  # a sequence without answers does not count
    model = _gated()
    objective.loss(model, objective.draw(model, batch, 0))
    for attention in list_attentions(model):
        assert isinstance(attention.gate, BlockGate)
        expected = torch.full_like(attention.gate.missed, 0.05 * 45)
        torch.testing.assert_close(attention.gate.missed, expected)
    before = [attention.gate.missed.clone() for attention in list_attentions(model)]  # type: ignore[union-attr, operator]
    labels[0] = IGNORED
    labels[0, 100] = 1
    objective.loss(model, objective.draw(model, batch, 0))
    after = [attention.gate.missed for attention in list_attentions(model)]  # type: ignore[union-attr]
    assert all(map(torch.equal, before, after))


def test_every_token_of_a_unit_up_to_the_last_target_is_learned_from() -> None:
    labels = BATCH.labels_BT.clone()
    labels[:, :330] = IGNORED
    labels[1, 340:] = IGNORED  # padding behind an answer
    batch = dataclasses.replace(BATCH, labels_BT=labels, num_targets=int((labels >= 0).sum()))
    drawn = GateTraining(GatesConfig(), seed=0).draw(_gated(), batch, 0)
    first = 4 * BLOCK  # before, there is nothing to choose
    lasts = [int((row != IGNORED).nonzero()[-1]) for row in labels]
    assert drawn.num_targets == sum(last + 1 - first for last in lasts)
    assert (drawn.labels_BT[:, :first] == IGNORED).all()
    for row, last in enumerate(lasts):
        following = batch.input_ids_BT[row, first + 1 : last + 2]
        assert torch.equal(drawn.labels_BT[row, first : last + 1], following)
        assert (drawn.labels_BT[row, last + 1 :] == IGNORED).all()


def test_units_are_drawn_anew_and_half_of_them_answer() -> None:
    batch = random_batch(1, 60 * BLOCK, seed=4)
    labels = torch.full_like(batch.labels_BT, IGNORED)
    labels[0, 40 * BLOCK + 5] = labels[0, 50 * BLOCK :: BLOCK] = 1
    batch = dataclasses.replace(batch, labels_BT=labels)
    objective, model = GateTraining(GatesConfig(num_units=8), seed=0), _gated()
    steps = [objective.draw(model, batch, step) for step in (0, 0, 1)]
    steps.append(objective.draw(model, dataclasses.replace(batch, index=5), 0))
    units = [
        {at // BLOCK for at in (item.labels_BT[0] != IGNORED).nonzero().flatten().tolist()}
        for item in steps
    ]
    assert units[0] == units[1]
    assert len(set(map(frozenset, units))) == 3  # the step and the batch decide
    for found in units:
        assert len(found) == 8
        assert min(found) >= DENSE_BLOCKS
        assert len(found & {40, *range(50, 60)}) >= 4


def test_sequences_without_blocks_to_choose_from_teach_nothing() -> None:
    state = _state(_gated())
    assert state.run_step([random_batch(2, 250, seed=0)]).loss == 0.0
    alone = _state(_gated()).run_step([BATCH]).loss
    both = _state(_gated()).run_step([BATCH, random_batch(2, 250, seed=0)]).loss
    assert both == pytest.approx(alone, rel=0.02)  # two targets of 288


def test_lengths_without_a_choice_are_refused() -> None:
    check_gate_lengths(4 * BLOCK + 1)
    for longest in (0, 4 * BLOCK):
        with pytest.raises(ConfigError, match=f"has {longest} tokens.* raise prepare.max_tokens"):
            check_gate_lengths(longest)


def test_packed_rows_are_refused() -> None:
    packed = MicroBatch(BATCH.input_ids_BT[:1], BATCH.labels_BT[:1], 400, 10, (150, 250))
    with pytest.raises(ShapeError, match="gates learn from whole sequences"):
        GateTraining(GatesConfig(), seed=0).loss(_gated(), packed)


@pytest.mark.parametrize("is_int8", [False, True])
def test_gates_are_saved_beside_the_weights(is_int8: bool, tmp_path: Path) -> None:
    model = _gated()
    with torch.no_grad():
        for attention in list_attentions(model):
            assert attention.gate is not None
            attention.gate.query_weight.normal_()
    if is_int8:
        quantize_modules(model)
    save_model(model, tmp_path)
    loaded = load_model(tmp_path, dtype=torch.bfloat16)
    for mine, theirs in zip(list_attentions(loaded), list_attentions(model), strict=True):
        assert mine.gate is not None
        assert theirs.gate is not None
        assert torch.equal(mine.gate.query_weight, theirs.gate.query_weight)
    (tmp_path / GATES_NAME).unlink()
    assert all(item.gate is None for item in list_attentions(load_model(tmp_path)))


def test_gates_that_do_not_fit_are_named(tmp_path: Path) -> None:
    save_model(_gated(), tmp_path / "gated")
    save_model(tiny_model(), tmp_path / "plain")
    damaged = (tmp_path / "gated" / GATES_NAME).read_bytes()
    (tmp_path / "plain" / GATES_NAME).write_bytes(damaged[: len(damaged) // 2])
    with pytest.raises(ArtifactError, match=r"gates\.safetensors: cannot be read"):
        load_model(tmp_path / "plain")
    name = "model.layers.0.self_attn.gate.is_marked"
    gates = load_file(tmp_path / "gated" / GATES_NAME)
    metadata = {"format": "pt", "block": "64"}
    save_file(gates | {name: torch.zeros(7)}, tmp_path / "plain" / GATES_NAME, metadata)
    with pytest.raises(ArtifactError, match=rf"{name} is .* of shape \(7,\), and the model's is"):
        load_model(tmp_path / "plain")
    half = {key: item.half() if item.is_floating_point() else item for key, item in gates.items()}
    save_file(half, tmp_path / "plain" / GATES_NAME, metadata)
    with pytest.raises(ArtifactError, match=r"float16 .*, and the model's is torch.float32"):
        load_model(tmp_path / "plain")
    save_file(
        {key: item for key, item in gates.items() if key != name},
        tmp_path / "plain" / GATES_NAME,
        metadata,
    )
    with pytest.raises(ArtifactError, match=rf"{name} is missing.* train gates"):
        load_model(tmp_path / "plain")


def test_a_resumed_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole = _state(_gated())
    history = [whole.run_step([BATCH], flush=step == 2) for step in range(3)]
    save_checkpoint(tmp_path, whole, history, rank=0, world_size=1)
    resumed = _state(_gated(seed=3))
    load_checkpoint(tmp_path, resumed)
    for state in (whole, resumed):
        state.run_step([BATCH])
    for name, item in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], item), name


def test_a_model_that_is_saved_without_gates_leaves_none_behind(tmp_path: Path) -> None:
    model = _gated()
    save_model(model, tmp_path)
    assert detach_gates(model)
    save_model(model, tmp_path)
    assert not (tmp_path / GATES_NAME).exists()
    assert not detach_gates(model)
