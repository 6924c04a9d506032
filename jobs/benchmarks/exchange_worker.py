"""One worker of one cell: `python -m jobs.benchmarks.exchange_worker --spec FILE --rank R`.

The clock starts when all workers are ready to take the first step, and nothing is left out of it:
weights are copied aside at every `eval_every`-th step, and judged after the run by the benchmark.
Workers therefore agree on nothing through the network but what their arm exchanges. Rank 0 asks the
others to end early, where a run exceeds its cap, by a file.
"""

import argparse
import datetime
import hashlib
import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from jobs.benchmarks.exchange_arms import ArmRunner, build_arm
from jobs.benchmarks.exchange_cells import WorkerSpec
from jobs.benchmarks.exchange_data import build_model, list_batches
from jobs.benchmarks.links import LinkBytes, read_link_bytes
from r1ray.config.training import TrainConfig
from r1ray.data.batch_set import MicroBatch, plan_order
from r1ray.models import Decoder
from r1ray.training.loss import summed_loss

__all__ = [
    "SNAPSHOTS_NAME",
    "StepBatches",
    "WorkerResult",
    "digest_weights",
    "plan_steps",
    "run_worker",
]

SNAPSHOTS_NAME = "snapshots.pt"
_STOP_NAME = "stop"
_STOP_MARGIN = 8  # steps: more than any worker is ahead of rank 0 when it asks


@dataclass
class WorkerResult:
    """What one worker measured; the lists have one entry a step.

    Attributes:
        ended_s: end of the step, in seconds of the clock.
        waited_s: of the step, as the exchange reports it; None where it does not.
        sent, received: bytes at the interface so far, from before the workers connected.
        kept: steps after which rank 0 copied the weights aside, ascending.
        digest: SHA-256 of the weights at the end.
    """

    ended_s: list[float] = field(default_factory=list)
    waited_s: list[float | None] = field(default_factory=list)
    sent: list[int] = field(default_factory=list)
    received: list[int] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    digest: str = ""


@dataclass(frozen=True)
class StepBatches:
    """One worker's micro-batches of a step, and the target tokens of all workers' in it."""

    batches: list[MicroBatch]
    num_targets: int


def plan_steps(
    batches: Sequence[MicroBatch],
    *,
    num_steps: int,
    per_step: int,
    seed: int,
    world_size: int,
    rank: int,
) -> list[StepBatches]:
    """The steps of one worker; the workers' batches of a step are the same for any world size."""
    order = plan_order(len(batches), seed=seed, start=0, world_size=1, rank=0)
    steps = []
    for _ in range(num_steps):
        chosen = [batches[index] for _, index in itertools.islice(order, per_step)]
        num_targets = sum(batch.num_targets for batch in chosen)
        steps.append(StepBatches(chosen[rank::world_size], num_targets))
    return steps


def run_worker(spec: WorkerSpec, rank: int) -> None:
    """Train as `spec` says, and write what was measured into its `out_dir`."""
    torch.set_num_threads(1)
    before = read_link_bytes()
    cell, config, out_dir = spec.cell, TrainConfig(**spec.train), Path(spec.out_dir)
    task_dir, base_dir = Path(spec.task_dir), Path(spec.base_dir)
    steps = plan_steps(
        list_batches(task_dir, cell.model, "training"),
        num_steps=cell.num_steps,
        per_step=config.batches_per_step,
        seed=cell.seed,
        world_size=cell.num_workers,
        rank=rank,
    )
    torch.manual_seed(cell.seed)
    model = build_model(cell.model, task_dir, base_dir, cell.seed)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://{spec.address}:{spec.port}",
        rank=rank,
        world_size=cell.num_workers,
        timeout=datetime.timedelta(seconds=config.resources.timeout_s),
    )
    runner = build_arm(cell.arm, model, config)
    _warm_up(model, steps[0].batches[0])
    dist.barrier()
    result = WorkerResult()
    snapshots = _train(runner, model, steps, spec, rank, before, result)
    runner.close()
    dist.destroy_process_group()
    result.digest = digest_weights(model)
    if rank == 0:
        torch.save(snapshots, out_dir / SNAPSHOTS_NAME)
    (out_dir / f"rank{rank}.json").write_text(json.dumps(asdict(result)), encoding="utf-8")


def _train(
    runner: ArmRunner,
    model: Decoder,
    steps: Sequence[StepBatches],
    spec: WorkerSpec,
    rank: int,
    before: LinkBytes,
    result: WorkerResult,
) -> list[list[Tensor]]:
    """Run the steps into `result`; returns the weights that rank 0 keeps."""
    cell, stop_path = spec.cell, Path(spec.out_dir) / _STOP_NAME
    snapshots = []
    started, num_steps = time.perf_counter(), len(steps)
    for number, step in enumerate(steps, start=1):
        if stop_path.exists():
            num_steps = min(num_steps, int(stop_path.read_text()))
        waited_s = runner.step(step.batches, step.num_targets, is_last=number == num_steps)
        elapsed_s = time.perf_counter() - started
        passed = read_link_bytes()
        result.ended_s.append(elapsed_s)
        result.waited_s.append(waited_s)
        result.sent.append(passed.sent - before.sent)
        result.received.append(passed.received - before.received)
        if rank == 0 and _is_kept(number, num_steps, cell.eval_every):
            result.kept.append(number)
            snapshots.append([parameter.detach().clone() for parameter in model.parameters()])
        if number >= num_steps:
            break
        if rank == 0 and elapsed_s > cell.cap_s and not stop_path.exists():
            partial = stop_path.with_suffix(".tmp")
            partial.write_text(str(number + _STOP_MARGIN))
            partial.rename(stop_path)
    return snapshots


def _is_kept(number: int, num_steps: int, eval_every: int) -> bool:
    return eval_every > 0 and (number == num_steps or number % eval_every == 0)


def _warm_up(model: Decoder, batch: MicroBatch) -> None:
    """The first pass through a model is slow: libraries set themselves up."""
    summed_loss(model, batch).backward()
    model.zero_grad(set_to_none=True)


def digest_weights(model: Decoder) -> str:
    """SHA-256 of all weights: equal where they are bit-identical."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().numpy().tobytes())
    return digest.hexdigest()


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spec", type=Path, required=True)
    parser.add_argument("--rank", type=int, required=True)
    arguments = parser.parse_args()
    spec = WorkerSpec.from_json(json.loads(arguments.spec.read_text(encoding="utf-8")))
    run_worker(spec, arguments.rank)


if __name__ == "__main__":
    _main()
