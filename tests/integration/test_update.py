"""A published model learns more on a local Ray: refused where it forgets, published where not."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from r1ray import pipeline, updates
from r1ray.artifacts import Artifact, ArtifactStore
from r1ray.compression.export import export_model
from r1ray.config import PipelineConfig, load_config
from r1ray.data.batch_set import BatchSet
from r1ray.errors import ArtifactError, ConfigError, ForgettingError
from r1ray.models.checkpoint import copy_tokenizer, load_model, save_model
from r1ray.models.memory import FISHER_NAME, RESERVOIR_NAME, memory_path
from r1ray.models.tokenizer import Tokenizer
from r1ray.pipeline import Pipeline
from r1ray.publication import LINK, Published, find_published, has_replaced
from r1ray.updates import _find_memory, run_update
from tests.fakes import EOS_ID, write_tiny_model

pytestmark = pytest.mark.usefixtures("local_ray")

GCD = "{name: gcd, options: {min_numbers: 2, max_numbers: 2, min_value: 1, max_value: 50}}"
SPELL = "{name: spell_backward, options: {min_word_len: 3, max_word_len: 5}}"


def _configure(root: Path, *overrides: str) -> PipelineConfig:
    return load_config(
        "jobs/configs/tiny.yaml",
        [
            f"run.root={root}",
            f"base.source={root / 'model'}",
            f"tasks.families=[{GCD}, {SPELL}]",
            "evaluate.num_problems=40",
            "train.num_steps=6",
            *overrides,
        ],
    )


def _write_knowing_model(path: Path) -> None:
    """A model that answers every question with 1, which most greatest common divisors are."""
    write_tiny_model(path, max_positions=1024)
    [one] = Tokenizer(path).encode("1")
    model = load_model(path)
    with torch.no_grad():
        for name, item in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                item.zero_()  # the last token alone decides
        embedding = model.model.embed_tokens.get_parameter("weight")
        embedding.zero_()[:, 0] = 1.0
        embedding[one] = 0.0
        embedding[one, 1] = 1.0
        head = model.lm_head.get_parameter("weight")
        head.zero_()
        head[one, 0] = head[EOS_ID, 1] = 4.0
    save_model(model, path)


def _publish(config: PipelineConfig) -> Artifact:
    """What the stages publish, but for the training: the base is what was trained."""
    first = Pipeline(config)
    base, prepared, store = first.base(), first.prepare(), first.store

    def train(out_dir: Path) -> dict[str, Any]:
        save_model(load_model(base.local_dir), out_dir)
        copy_tokenizer(base.local_dir, out_dir)
        shutil.copytree(prepared.local_dir / "memory", out_dir / "memory")
        return {}

    trained = store.run("train", {}, {"prepare": prepared.digest}, train)

    def compress(out_dir: Path) -> dict[str, Any]:
        return export_model(config.compress, trained, BatchSet(prepared.local_dir), out_dir)

    served = store.run("compress", {}, {"train": trained.digest}, compress)
    store.link(LINK, served)
    return served


@pytest.fixture(scope="module")
def root(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("update")
    _write_knowing_model(root / "model")
    config = _configure(
        root, "prepare.sources=[{type: tasks, num_samples: 40, families: [gcd]}]", "continual={}"
    )
    _publish(config)
    return root


def test_a_model_that_forgets_is_not_published(root: Path) -> None:
    config = _configure(
        root,
        "prepare.sources=[{type: tasks, num_samples: 64, families: [spell_backward]}]",
        "continual={replay: null, lora: {rank: 4, alpha: 8}}",
        "train.fake_quant=null",
        "train.learning_rate=0.3",
        "train.num_steps=12",
        "train.resources.num_workers=1",
    )
    store = ArtifactStore(str(root), "tiny")
    before = find_published(store)
    with pytest.raises(ForgettingError) as refusal:
        run_update(config)
    assert "not published: the new model loses" in str(refusal.value)
    assert "on gcd, and update.max_forgetting_points is 3;" in str(refusal.value)
    assert "| gcd | taught before | " in str(refusal.value)
    assert "**forgotten**" in str(refusal.value)
    assert "| spell_backward | new | " in str(refusal.value)
    assert find_published(store) == before
    [judged] = store.find_all("judge")
    changes = json.loads((judged.local_dir / "forgetting.json").read_text())
    [gcd] = [item for item in changes if item["family"] == "gcd"]
    assert gcd["old"]["value"] > 0.1  # it did know
    assert len((judged.local_dir / "replies.jsonl").read_text().splitlines()) == 80
    # The adapters were merged: a plain model, whose unadapted parameters did not move.
    trained = store.find_all("train")[-1]
    model, started = load_model(trained.local_dir), load_model(before.trained.local_dir)
    assert model.state_dict().keys() == started.state_dict().keys()
    is_same = {
        name: torch.equal(item, started.state_dict()[name])
        for name, item in model.state_dict().items()
    }
    assert {name for name, same in is_same.items() if not same} <= {
        name for name in is_same if ".layers." in name and name.endswith("_proj.weight")
    }
    assert not all(is_same.values())


def test_a_sequence_is_learned_and_published_and_found_again(root: Path) -> None:
    rows = root / "rows.jsonl"
    rows.write_text("".join(f'{{"question": "{n}?", "answer": "{n}!"}}\n' for n in range(30)))
    config = _configure(
        root,
        "prepare.sources=[{type: tasks, num_samples: 64, families: [spell_backward]}, "
        f"{{type: files, paths: [{rows}]}}]",
        "continual={replay: {share: 0.25, reservoir_rows: 50}, averaging: {start_share: 0.9}, "
        "ewc: {strength: 10, fisher_batches: 4}}",
        "train.learning_rate=1e-5",
        "train.exchange={type: delta4}",
        "train.fake_quant=null",
    )
    store = ArtifactStore(str(root), "tiny")
    before = find_published(store)
    outcome = run_update(config)
    after = find_published(store)
    assert outcome.is_new
    assert outcome.version == after.served.manifest.run_id != before.served.manifest.run_id
    assert (root / "tiny" / LINK).resolve().name == outcome.version

    by_digest = {item.digest: item for item in store.find_all("prepare")}
    last = by_digest[after.trained.manifest.inputs["prepare"]]
    first = by_digest[last.manifest.inputs["prepare"]]
    seen = [
        json.loads(
            pq.read_schema(memory_path(item.local_dir, RESERVOIR_NAME)).metadata[b"r1ray.reservoir"]
        )
        for item in (first, last)
    ]
    assert [item["num_seen"] for item in seen] == [104, 134]  # 40 of the published model's own
    counts = [item.manifest.metrics for item in (first, last)]
    assert [(item["num_samples"], item["num_replayed"]) for item in counts] == [(64, 21), (30, 10)]
    middle = {item.digest: item for item in store.find_all("train")}[
        after.trained.manifest.inputs["train"]
    ]
    fishers = [pq_sum(memory_path(item.local_dir, FISHER_NAME)) for item in (middle, after.trained)]
    assert 0 < fishers[0] < fishers[1]  # it adds up

    again = run_update(config)
    assert (again.is_new, again.version) == (False, outcome.version)
    assert len(store.find_all("train")) == 4
    assert has_replaced(store, before.served)
    assert not has_replaced(store, after.served)


def pq_sum(path: Path) -> float:
    """Of everything in a safetensors file."""
    from safetensors.torch import load_file

    return sum(float(item.sum()) for item in load_file(path).values())


@pytest.mark.parametrize("replay", ["null", "{reservoir_rows: 40}"])
def test_all_phases_are_prepared_before_any_is_trained(root: Path, replay: str) -> None:
    config = _configure(
        root,
        "run.name=phases",
        "prepare.sources=[{type: tasks, num_samples: 20, families: [gcd]}, "
        "{type: tasks, num_samples: 30, families: [spell_backward]}]",
        f"continual={{replay: {replay}}}",
    )
    last = Pipeline(config).prepare()
    store = ArtifactStore(str(root), "phases")
    assert store.find_all("train") == []
    alone = Pipeline(config, only="train")  # as jobs.train: what it needs must be there
    phases = [alone._prepare(phase) for phase in range(alone.num_phases)]
    counts = [item.manifest.metrics["num_samples"] for item in phases]
    assert (counts, phases[-1].digest) == ([20, 30], last.digest)


def test_phases_without_replay_are_all_remembered_as_taught(root: Path) -> None:
    config = _configure(
        root,
        "run.name=taught",
        "prepare.sources=[{type: tasks, num_samples: 20, families: [gcd]}, "
        "{type: tasks, num_samples: 30, families: [spell_backward]}]",
        "continual={replay: null}",
        "train.num_steps=3",
    )
    Pipeline(config).compress()

    with pytest.raises(ConfigError, match="was taught gcd, which tasks"):
        run_update(_configure(root, "run.name=taught", "continual={}", f"tasks.families=[{SPELL}]"))
    store = ArtifactStore(str(root), "taught")
    memory = _find_memory(
        store, find_published(store), _configure(root, "run.name=taught", "continual={}")
    )
    assert memory is not None
    assert memory.manifest.metrics["num_seen"] == 20 + 30


def test_a_report_publishes_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = _configure(root, "run.name=reported", "train.num_steps=3")
    Pipeline(config).compress()
    store = ArtifactStore(str(root), "reported")
    other = store.run("compress", {"other": 1}, {}, _copy(find_published(store)))
    store.link(LINK, other)
    monkeypatch.setattr(pipeline, "evaluate_models", lambda *_, **__: {})

    Pipeline(config, only="evaluate").evaluate()

    assert find_published(store).served.digest == other.digest


def test_one_update_at_a_time(root: Path) -> None:
    store = ArtifactStore(str(root), "tiny")

    with store.lock("judge", "update"), pytest.raises(ArtifactError, match="another process"):
        run_update(_configure(root, "continual={}"))


def test_what_was_published_meanwhile_stays(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ArtifactStore(str(root), "tiny")
    before = find_published(store)
    other = store.run("compress", {"other": 1}, {"train": before.trained.digest}, _copy(before))

    def judge(*_: Any) -> Artifact:
        store.link(LINK, other)
        return other

    monkeypatch.setattr(updates, "_judge", judge)
    monkeypatch.setitem(other.manifest.metrics, "forgotten", [])
    with pytest.raises(ArtifactError, match="leads to another model since this update began"):
        run_update(_configure(root, "continual={replay: null}", "train.num_steps=3"))

    assert find_published(store).served.digest == other.digest
    store.link(LINK, before.served)


def _copy(published: Published) -> Callable[[Path], dict[str, Any]]:
    def body(out_dir: Path) -> dict[str, Any]:
        shutil.copytree(published.served.local_dir, out_dir, dirs_exist_ok=True)
        (out_dir / "note.txt").write_text("another one")
        return {}

    return body


def test_what_cannot_be_an_update_is_refused_before_anything_runs(root: Path) -> None:
    with pytest.raises(ConfigError, match="an update needs `continual`"):
        run_update(_configure(root))
    with pytest.raises(ArtifactError, match="nothing is published that could be updated"):
        run_update(_configure(root, "continual={}", "run.name=other"))
    with pytest.raises(ConfigError, match="was taught gcd, which tasks"):
        run_update(_configure(root, "continual={}", f"tasks.families=[{SPELL}]"))
    with pytest.raises(ConfigError, match="no link can lead servers"):
        run_update(_configure(root, "continual={}", "run.root=s3://bucket/runs"))
