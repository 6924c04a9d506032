"""What an update knows of the models before."""

from pathlib import Path
from typing import Any

from r1ray.artifacts import Artifact, ArtifactStore
from r1ray.publication import JUDGE, Published
from r1ray.updates import _list_prepared


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
