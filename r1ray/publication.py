"""Which model of a run is published, and how one takes the place of another.

1. `<root>/<run>/model` is a link to the artifact that servers serve; replacing it, which is atomic,
   publishes another. Its run id is the version that /health names.
2. `judge` artifacts say which model was compared with which, and whether it was let through: they
   are the history of updates, and tell that one has been made already.
"""

from dataclasses import dataclass

from r1ray.artifacts import Artifact, ArtifactStore
from r1ray.errors import ArtifactError
from r1ray.files import read_json
from r1ray.models.config import RECORD_NAME

__all__ = ["JUDGE", "LINK", "Published", "find_published", "has_replaced", "list_versions"]

LINK = "model"
JUDGE = "judge"


@dataclass(frozen=True)
class Published:
    """What servers serve, and the float model that it was made of."""

    served: Artifact
    trained: Artifact


def find_published(store: ArtifactStore) -> Published:
    """The published model of a run.

    Raises:
        ArtifactError: there is none, or it is damaged.
    """
    target = store.linked(LINK)
    if target is None:
        raise ArtifactError(
            f"{store.path}/{LINK} leads to no model: nothing is published that could be updated; "
            "run `python -m jobs.pipeline` or `python -m jobs.compress` with this run.root and "
            "run.name first"
        )
    served = store.require("compress", target.name, hint="it was published a moment ago")
    path = served.local_dir / RECORD_NAME
    try:
        run_id = str(read_json(path)["provenance"]["trained_run_id"])
    except (KeyError, TypeError) as error:
        raise ArtifactError(f"{path}: does not say what was quantized ({error!r})") from error
    trained = store.require("train", run_id, hint="an update goes on from it; keep its directory")
    return Published(served, trained)


def has_replaced(store: ArtifactStore, before: Artifact) -> bool:
    """Whether what is published came from `before` by updates."""
    target = store.linked(LINK)
    if target is None or target.name == before.manifest.run_id:
        return False
    published = store.find("compress", target.name, verify=False)
    return published is not None and before.digest in list_versions(store, published)


def list_versions(store: ArtifactStore, served: Artifact) -> list[str]:
    """Digests of a model and of those that it took the place of by updates, the newest first."""
    sources = {
        judged.manifest.inputs["new"]: judged.manifest.inputs["old"]
        for judged in store.find_all(JUDGE)
        if not judged.manifest.metrics["forgotten"]
    }
    digest: str | None = served.digest
    found: list[str] = []
    while digest is not None and digest not in found:
        found.append(digest)
        digest = sources.get(digest)
    return found
