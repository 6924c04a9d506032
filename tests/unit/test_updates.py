"""What an update knows of the models before."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from r1ray import updates
from r1ray.artifacts import Artifact, ArtifactStore
from r1ray.config import load_config
from r1ray.data.reservoir import Reservoir
from r1ray.data.tokenize_table import SAMPLE_SCHEMA
from r1ray.publication import JUDGE, Published
from r1ray.updates import _find_memory, _list_prepared


def test_data_of_all_updates_and_phases_is_found(tmp_path: Path) -> None:
    store = ArtifactStore(str(tmp_path), "run")

    def make(stage: str, name: str, **inputs: str) -> Artifact:
        def body(out_dir: Path) -> dict[str, Any]:
            (out_dir / "name").write_text(name)
            return {"forgotten": []}

        return store.run(stage, {"name": name}, inputs, body)

    data = [make("prepare", name) for name in ("one", "two", "three", "four")]
    first = make("train", "first", base="b", prepare=data[0].digest)
    second = make("train", "second", train=first.digest, prepare=data[1].digest)
    old = make("compress", "old", train=second.digest)
    third = make("train", "third", base="the second, imported", prepare=data[2].digest)
    middle = make("compress", "middle", train=third.digest)
    fourth = make("train", "fourth", base="the third, imported", prepare=data[3].digest)
    new = make("compress", "new", train=fourth.digest)
    make(JUDGE, "one", old=old.digest, new=middle.digest)
    make(JUDGE, "two", old=middle.digest, new=new.digest)

    found = _list_prepared(store, Published(served=new, trained=fourth))

    assert [item.digest for item in found] == [item.digest for item in data]


def test_samples_that_were_replayed_are_remembered_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ArtifactStore(str(tmp_path), "run")

    def samples(*tokens: int) -> pa.Table:
        rows = [{name: [token] for name in SAMPLE_SCHEMA.names} for token in tokens]
        return pa.Table.from_pylist(rows).cast(SAMPLE_SCHEMA)

    def prepare(name: str, remembered: list[int]) -> Artifact:
        def body(out_dir: Path) -> dict[str, Any]:
            if remembered:
                reservoir = Reservoir(10, seed=0)
                reservoir.add(samples(*remembered))
                reservoir.save(out_dir)
            return {}

        return store.run("prepare", {"name": name}, {}, body)

    data = {"one": [1], "two": [2, 1], "three": [3]}  # the second has the first replayed
    prepared = [prepare("one", []), prepare("two", [1, 2]), prepare("three", [])]
    monkeypatch.setattr(updates, "_list_prepared", lambda *_: prepared)
    monkeypatch.setattr(
        updates,
        "read_samples",
        lambda directory: [
            samples(*data[str(item.manifest.config["name"])])
            for item in prepared
            if item.local_dir == directory
        ],
    )
    trained = store.run("train", {}, {}, lambda _: {})
    config = load_config("jobs/configs/tiny.yaml", ["continual={replay: {reservoir_rows: 5}}"])

    memory = _find_memory(store, Published(served=trained, trained=trained), config)

    assert memory is not None
    kept = Reservoir.recall(memory.local_dir, 5, seed=0)
    assert sorted(token for [token] in kept.samples()["input_ids"].to_pylist()) == [1, 2, 3]
    assert kept.num_seen == 3
