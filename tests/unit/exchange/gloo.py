"""Real gloo processes on loopback for tests: each runs a function and leaves its result."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from r1ray.exchange import CollectiveTransport

TIMEOUT_S = 60.0


def run_ranks(function: Callable[..., Any], world_size: int, *arguments: Any) -> list[Any]:
    """`function(transport, *arguments)` in processes of one gloo group; their results."""
    with tempfile.TemporaryDirectory() as directory:
        mp.spawn(_run, (world_size, directory, function, arguments), nprocs=world_size)
        return [
            torch.load(Path(directory) / f"rank{rank}.pt", weights_only=False)
            for rank in range(world_size)
        ]


def _run(
    rank: int,
    world_size: int,
    directory: str,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/init", rank=rank, world_size=world_size
    )
    transport = CollectiveTransport(timeout_s=TIMEOUT_S)
    torch.save(function(transport, *arguments), f"{directory}/rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    # A gloo thread that frees the tensors of its last collective while the interpreter ends aborts
    # the process (pytorch/pytorch#179291): results are stored, so end without that.
    os._exit(0)
