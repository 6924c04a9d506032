"""The engine over the model that a path leads to, replaced when the path leads elsewhere.

1. A thread looks every two seconds where the path leads; publishing a model replaces that link
   (`ArtifactStore.link`).
2. Where it has changed, the new model is loaded beside the old one, which goes on answering.
3. New requests go to the new engine; the old one is closed when its last answer has ended. Nothing
   is restarted, and nobody waits.
4. A model that cannot be loaded, or whose tokens or images are not those of the served one, is
   reported once; the old one stays. A replica that starts later can only take the new one: it
   refuses requests that were made for the old one, as the old ones do with the new.

Price: both models' weights, and both caches, from loading until the last old answer has ended; a
further version waits until then.
"""

import hashlib
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from r1ray.errors import ConfigError, ServingError
from r1ray.models.fusion_file import read_fusion
from r1ray.models.tokenizer import TOKENIZER_FILES
from r1ray.serving.engine import Engine

__all__ = ["FOLLOW_S", "EngineFollower", "digest_inputs"]

logger = logging.getLogger(__name__)

FOLLOW_S = 2.0
_IMAGES = "images"


class EngineFollower:
    """Lends the engine of the newest version that could be loaded.

    Args:
        path: of a model directory, or of a link to one.
        build: makes an engine over a model directory.
        look_every_s: seconds between two looks; None to be told by `look` alone.
        has_room: whether another engine fits beside the one that answers.
    """

    def __init__(
        self,
        path: str,
        build: Callable[[str], Engine],
        *,
        look_every_s: float | None = FOLLOW_S,
        has_room: bool = True,
    ) -> None:
        self._path, self._build, self._has_room = path, build, has_room
        self._lock = threading.Lock()  # guards the next three
        self._target = self._refused = os.path.realpath(path)
        self._inputs_digest = digest_inputs(self._target)  # of all versions that are followed
        self._engine = build(self._target)
        self._leases: dict[Engine, int] = {self._engine: 0}
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        if look_every_s is not None:
            self._thread = threading.Thread(
                target=self._run, args=(look_every_s,), name="r1ray-follow", daemon=True
            )
            self._thread.start()

    @property
    def engine(self) -> Engine:
        """The one that new requests go to."""
        return self._engine

    @property
    def engines(self) -> list[Engine]:
        """That one, and the one before while it has answers to end."""
        with self._lock:
            return list(self._leases)

    @property
    def version(self) -> str:
        """Name of the directory that is served: for an artifact, its run id."""
        return Path(self._target).name

    def check_inputs(self, digest: bytes | None) -> None:
        """Whether a request was made for this model, as every version followed so far reads it.

        Raises:
            ServingError: 503; it was made by the files of another version, which this replica
                found when it started, or which the ingress did.
        """
        if digest not in (None, self._inputs_digest):
            raise ServingError(
                "the model was published with another tokenizer or other images since this server "
                "started; restart the server",
                status=503,
                code="service_unavailable",
            )

    @contextmanager
    def lease(self) -> Iterator[Engine]:
        """The engine for one request, which stays until the request has ended."""
        with self._lock:
            engine = self._engine
            self._leases[engine] += 1
        try:
            yield engine
        finally:
            with self._lock:
                self._leases[engine] -= 1

    def look(self) -> None:
        """Close what has ended; then serve what the path leads to, if that is something else."""
        self._close_idle()
        target = os.path.realpath(self._path)
        if target in (self._target, self._refused) or len(self._leases) > 1:
            return
        self._refused = target  # until it is served
        try:
            if not self._has_room:
                raise ConfigError(
                    "serve.budget_mib has room for one version at a time; restart the server to "
                    "serve it"
                )
            _check_same_requests(self._target, target)
            engine = self._build(target)
        except Exception:  # whatever is wrong with it, the old one answers
            logger.exception("%s cannot be served; %s stays", target, self._target)
            return
        with self._lock:
            self._engine, self._target = engine, target
            self._leases[engine] = 0
        logger.info("%s is served", target)

    def close(self) -> None:
        """Stop following, and serving. Idempotent."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join(30)
        for engine in self.engines:
            engine.close()

    def _close_idle(self) -> None:
        with self._lock:
            idle = [
                engine
                for engine, count in self._leases.items()
                if count == 0 and engine is not self._engine
            ]
            for engine in idle:
                del self._leases[engine]
        for engine in idle:
            engine.close()

    def _run(self, every_s: float) -> None:
        while not self._closed.wait(every_s):
            try:
                self.look()
            except Exception:  # such as an engine that does not stop
                logger.exception("looking at %s failed", self._path)


def digest_inputs(model_dir: str) -> bytes:
    """Of all that turns a text and images into a request."""
    digest = hashlib.sha256()
    for content in _read_inputs(model_dir).values():
        digest.update(hashlib.sha256(content or b"").digest())
    return digest.digest()


def _read_inputs(model_dir: str) -> dict[str, bytes | None]:
    """What each file says of it, and how images are seen; None for a file that is not there."""
    files = {name: Path(model_dir) / name for name in TOKENIZER_FILES}
    inputs = {name: file.read_bytes() if file.is_file() else None for name, file in files.items()}
    return {**inputs, _IMAGES: repr(read_fusion(model_dir)).encode()}


def _check_same_requests(old: str, new: str) -> None:
    """Requests are tokenized, and their images fitted, by whoever read the old directory."""
    before, after = _read_inputs(old), _read_inputs(new)
    for name, content in after.items():
        if content == before[name]:
            continue
        if name == _IMAGES:
            raise ConfigError(
                "it sees images in another way than the served model; restart the server"
            )
        raise ConfigError(f"its {name} is not that of the served model; restart the server")
