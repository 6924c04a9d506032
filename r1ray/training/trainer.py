"""The `train` stage: a Ray Train run that survives failures and resumes after a kill.

1. Workers run `run_worker`; the group restarts from the last checkpoint when one of them dies.
2. Checkpoints live in the stage's own directory; a driver that was killed finds them there when
   the same run is started again (Ray Train resumes by storage path and name).
3. The last checkpoint becomes the stage's model directory, the history `history.json`.
"""

import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer

from r1ray.artifacts import Artifact, ArtifactStore
from r1ray.config.schema import TrainConfig
from r1ray.errors import ExchangeError
from r1ray.models.checkpoint import copy_tokenizer, load_model, save_model
from r1ray.training.checkpoint import HISTORY_NAME, load_history
from r1ray.training.step import StepRecord
from r1ray.training.worker import WorkerJob, run_worker

__all__ = ["CHECKPOINTS_DIR", "train_model"]

CHECKPOINTS_DIR = "checkpoints"
_POLL_S = 0.5


@ray.remote(num_cpus=0)
class _Board:
    """Step records as rank 0 posts them; the driver reads them for its progress display."""

    def __init__(self) -> None:
        self._last: dict[str, Any] | None = None

    def post(self, records: list[dict[str, Any]]) -> None:
        self._last = records[-1]

    def last(self) -> dict[str, Any] | None:
        return self._last


def train_model(
    config: TrainConfig,
    *,
    seed: int,
    store: ArtifactStore,
    base: Artifact,
    prepared: Artifact,
    run_id: str,
    out_dir: Path,
    on_step: Callable[[StepRecord], None] = lambda *_: None,
) -> dict[str, Any]:
    """Train, then write the model directory and `history.json` into `out_dir`; returns metrics.

    Raises:
        ExchangeError: more workers failed than `train.resources.max_failures` allows.
    """
    resources = config.resources
    board = _Board.remote()  # type: ignore[attr-defined]
    job = WorkerJob(config, seed, store.root, base.manifest.run_id, prepared.manifest.run_id, board)
    trainer = TorchTrainer(
        run_worker,
        train_loop_config={"job": job},
        scaling_config=ray.train.ScalingConfig(
            num_workers=resources.num_workers,
            use_gpu=resources.use_gpu,
            resources_per_worker={"CPU": resources.num_cpus_per_worker}
            | ({"GPU": 1} if resources.use_gpu else {}),
        ),
        run_config=ray.train.RunConfig(
            name=CHECKPOINTS_DIR,
            storage_path=store.directory("train", run_id),
            storage_filesystem=store.filesystem,
            failure_config=ray.train.FailureConfig(max_failures=resources.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
        ),
        torch_config=TorchConfig(
            backend="nccl" if resources.use_gpu else "gloo", timeout_s=int(resources.timeout_s)
        ),
    )
    with _Watcher(board, on_step):
        try:
            result = trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise ExchangeError(
                f"training gave up after {resources.max_failures} restarts; the last failure was: "
                f"{error}"
            ) from error
    assert result.checkpoint is not None, "the last step reports a checkpoint"
    with result.checkpoint.as_directory() as directory:
        history = load_history(Path(directory))
        save_model(load_model(directory), out_dir)
        (out_dir / HISTORY_NAME).write_bytes((Path(directory) / HISTORY_NAME).read_bytes())
    copy_tokenizer(base.local_dir, out_dir)
    return _summarize(history)


class _Watcher:
    """Polls the board on a thread while `fit` blocks the driver."""

    def __init__(self, board: Any, on_step: Callable[[StepRecord], None]) -> None:
        self._board, self._on_step = board, on_step
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="train-progress", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=10)

    def _run(self) -> None:
        shown = 0
        while not self._stop.wait(_POLL_S):
            last = ray.get(self._board.last.remote(), timeout=60)
            if last is not None and last["step"] != shown:
                shown = last["step"]
                self._on_step(StepRecord(**last))


def _summarize(history: list[StepRecord]) -> dict[str, Any]:
    seconds = sum(record.seconds for record in history)
    tail = history[-max(1, len(history) // 10) :]
    return {
        "steps": len(history),
        "first_loss": history[0].loss,
        "final_loss": sum(record.loss for record in tail) / len(tail),
        "tokens": sum(record.num_tokens for record in history),
        "seconds": seconds,
        "tokens_per_s": sum(record.num_tokens for record in history) / seconds,
        "exchange_wait_share": sum(record.exchange_wait_s for record in history) / seconds,
        "skipped_steps": sum(record.was_skipped for record in history),
        "last_step": asdict(history[-1]),
    }
