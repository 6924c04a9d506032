"""Gates trained on a local Ray, on top of a model that was trained before."""

from pathlib import Path

import pytest
import torch

from r1ray.config import load_config
from r1ray.errors import ConfigError
from r1ray.models import load_model, save_model
from r1ray.models.gates import attach_gates, is_gate, list_attentions
from r1ray.pipeline import Pipeline
from tests.fakes import write_tiny_model

GATES = ("train.gates={}", "train.fake_quant=null", "train.precision=fp32")


@pytest.mark.usefixtures("local_ray")
def test_two_workers_train_gates_and_compression_keeps_them(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "model", max_positions=1024)
    config = load_config(
        "jobs/configs/tiny.yaml",
        [
            f"run.root={tmp_path}",
            f"base.source={tmp_path / 'model'}",
            "prepare.sources=[{type: long_context, num_tasks: 0, num_documents: 40}]",
            "prepare.max_tokens=600",
            "prepare.batch_tokens=1200",
            "train.exchange={type: delta4}",
            "compress.exports=[gguf, compressed_tensors]",
            *GATES,
        ],
    )
    pipeline = Pipeline(config)
    trained, served = pipeline.train(), pipeline.compress()
    before = load_model(tmp_path / "model").state_dict()
    after = load_model(trained.local_dir).state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    weights = [after[name] for name in after if is_gate(name) and "query_weight" in name]
    start = torch.eye(8) / 2
    assert not any(torch.equal(weight, start.repeat(2, 2, 1)) for weight in weights)
    for mine, theirs in zip(
        list_attentions(load_model(served.local_dir)),
        list_attentions(load_model(trained.local_dir)),
        strict=True,
    ):
        assert mine.gate is not None
        assert theirs.gate is not None
        assert torch.equal(mine.gate.key_weight, theirs.gate.key_weight)


@pytest.mark.usefixtures("local_ray")
def test_gates_go_on_from_gates_and_are_left_behind_when_the_model_changes(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "model", max_positions=1024)
    model = load_model(tmp_path / "model")
    attach_gates(model)
    save_model(model, tmp_path / "model")
    settings = [f"run.root={tmp_path}", f"base.source={tmp_path / 'model'}"]
    with pytest.raises(ConfigError, match=r"longest prepared sequence has .* learn from more than"):
        Pipeline(load_config("jobs/configs/tiny.yaml", [*settings, *GATES])).train()
    settings += [
        "prepare.sources=[{type: long_context, num_tasks: 0, num_documents: 16}]",
        "prepare.max_tokens=600",
    ]
    gated = Pipeline(load_config("jobs/configs/tiny.yaml", [*settings, *GATES])).train()
    for attention in list_attentions(load_model(gated.local_dir)):
        assert attention.gate is not None
        assert not torch.equal(attention.gate.key_norm, torch.ones(8))
    tuned = Pipeline(load_config("jobs/configs/tiny.yaml", settings)).train()
    assert all(item.gate is None for item in list_attentions(load_model(tuned.local_dir)))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.precision=bf16", "set precision: fp32"),
        ("train.fake_quant=w8a8", "leave fake_quant"),
        ("prepare.batching={type: packing}", "goes with prepare.batching"),
    ],
)
def test_what_gates_cannot_be_trained_with_is_said(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config("jobs/configs/tiny.yaml", [*GATES, override])
