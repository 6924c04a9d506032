import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from r1ray.artifacts import Artifact, ArtifactStore
from r1ray.errors import ArtifactError
from r1ray.publication import JUDGE, LINK, find_published, has_replaced


def _make(
    store: ArtifactStore, stage: str, name: str, inputs: Mapping[str, str], **metrics: Any
) -> Artifact:
    """An artifact that holds its name, and says that it was made of the training `name`."""

    def body(out_dir: Path) -> dict[str, Any]:
        record = {"provenance": {"trained_run_id": inputs.get("train_run_id")}, "name": name}
        (out_dir / "r1ray.json").write_text(json.dumps(record))
        return metrics

    return store.run(stage, {"name": name}, inputs, body)


def _served(store: ArtifactStore, name: str) -> Artifact:
    trained = _make(store, "train", name, {})
    return _make(store, "compress", name, {"train_run_id": trained.manifest.run_id})


def _judge(store: ArtifactStore, old: Artifact, new: Artifact, forgotten: list[str]) -> None:
    inputs = {"old": old.digest, "new": new.digest}
    _make(store, JUDGE, old.digest + new.digest, inputs, forgotten=forgotten)


def test_what_the_link_leads_to_is_published(tmp_path: Path) -> None:
    store = ArtifactStore(str(tmp_path), "run")
    with pytest.raises(ArtifactError, match=r"run/model leads to no model: nothing is published"):
        find_published(store)
    first, second = _served(store, "first"), _served(store, "second")
    store.link(LINK, first)
    assert find_published(store).served.digest == first.digest
    store.link(LINK, second)
    found = find_published(store)
    assert found.served.manifest.run_id == second.manifest.run_id
    assert found.trained.manifest.config["name"] == "second"
    (second.local_dir / "r1ray.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"r1ray\.json: "):
        find_published(store)


def test_a_model_that_does_not_say_what_it_was_made_of_cannot_be_updated(tmp_path: Path) -> None:
    store = ArtifactStore(str(tmp_path), "run")

    def body(out_dir: Path) -> dict[str, Any]:
        (out_dir / "r1ray.json").write_text("{}")
        return {}

    store.link(LINK, store.run("compress", {}, {}, body))
    with pytest.raises(ArtifactError, match="does not say what was quantized"):
        find_published(store)


def test_updates_are_followed_back_through_those_that_were_let_through(tmp_path: Path) -> None:
    store = ArtifactStore(str(tmp_path), "run")
    one, two, three, refused = (_served(store, name) for name in ("1", "2", "3", "refused"))
    assert not has_replaced(store, one)  # nothing is published
    _judge(store, one, two, [])
    _judge(store, two, three, [])
    _judge(store, two, refused, ["sums"])
    store.link(LINK, one)
    assert not has_replaced(store, one)
    store.link(LINK, three)
    assert [has_replaced(store, item) for item in (one, two, three)] == [True, True, False]
    assert not has_replaced(store, refused)
    store.link(LINK, refused)  # by hand
    assert not has_replaced(store, one)
    _judge(store, three, one, [])  # taken back by an update: no endless way
    store.link(LINK, one)
    assert not has_replaced(store, one)
    assert has_replaced(store, two)


def test_links_that_lead_out_of_the_run_are_refused(tmp_path: Path) -> None:
    store = ArtifactStore(str(tmp_path / "runs"), "run")
    (tmp_path / "runs" / "run").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "runs" / "run" / LINK).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArtifactError, match="a symbolic link leads it to"):
        find_published(store)


def test_finished_artifacts_are_listed_in_their_order(tmp_path: Path) -> None:
    store = ArtifactStore(str(tmp_path), "run")
    assert store.find_all("train") == []
    made = [_make(store, "train", name, {}) for name in ("a", "b", "c")]
    (tmp_path / "run" / "train" / "unfinished").mkdir()
    found = store.find_all("train")
    assert {item.manifest.run_id for item in found} == {item.manifest.run_id for item in made}
    times = [item.manifest.finished_at for item in found]
    assert times == sorted(times)
