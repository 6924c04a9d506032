"""One model computed by our kernels, by OpenVINO, and by torch alone in three number formats.

python -m jobs.benchmarks.hardware_engines TASK.json

The last line of output is a JSON object: from arm -> what -> seconds, one of each repetition.
"""

import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from r1ray.models import load_model
from r1ray.models.backend import Backend, DecoderBackend
from r1ray.models.openvino import OpenVinoBackend
from r1ray.models.pages import count_pages
from r1ray.ops.native import library

__all__ = ["PROMPT", "STREAMS"]

PROMPT = 512  # tokens
STREAMS = (1, 8)
_STEPS = 16
_PAUSE_S = 0.3  # threads of the arm before stop spinning


@contextmanager
def _without_kernels() -> Iterator[None]:
    """Torch alone, as where no compiler was."""
    load, library._load = library._load, lambda: None  # type: ignore[assignment]
    try:
        yield
    finally:
        library._load = load


def _time_once(backend: Backend, ids: Sequence[int]) -> dict[str, float]:
    """Seconds of reading a prompt, and the median ones of a step of each number of streams.

    What the other streams attend to is all zeros, which takes no other time.
    """
    pages = count_pages(PROMPT + _STEPS + 1)
    pool = backend.build_pool(max(STREAMS) * pages)
    tables = [list(range(row * pages, (row + 1) * pages)) for row in range(max(STREAMS))]
    started = time.perf_counter()
    prompt_1T = torch.tensor([ids[:PROMPT]])
    backend.next_logits(prompt_1T, pool.slice(tables[:1], [0]), [PROMPT - 1])
    found = {"prefill": time.perf_counter() - started}
    for streams in STREAMS:
        seconds = []
        for step in range(_STEPS):
            ids_B1 = torch.tensor([[ids[97 * row + PROMPT + step]] for row in range(streams)])
            rows = pool.slice(tables[:streams], [PROMPT + step] * streams)
            started = time.perf_counter()
            backend.next_logits(ids_B1, rows, range(streams))
            seconds.append(time.perf_counter() - started)
        found[f"decode_{streams}"] = statistics.median(seconds)
    return found


def _main(task: dict[str, Any]) -> dict[str, dict[str, list[float]]]:
    threads = task["num_threads"]
    torch.set_num_threads(threads)
    ids = json.loads(Path(task["ids"]).read_text(encoding="utf-8"))
    int8 = load_model(task["model"])
    backends: dict[str, Backend] = {
        "native": DecoderBackend(int8, torch.int8),
        "openvino": OpenVinoBackend(int8, num_threads=threads, is_int8_cache=True),
    }
    with _without_kernels():
        backends["torch_int8"] = DecoderBackend(int8, torch.int8)
        for name, dtype in {"fp32": torch.float32, "bf16": torch.bfloat16}.items():
            backends[f"torch_{name}"] = DecoderBackend(load_model(task["base"], dtype=dtype))
    found: dict[str, dict[str, list[float]]] = {name: {} for name in backends}
    for repeat in range(task["repeats"] + 1):
        for name, backend in backends.items():
            time.sleep(_PAUSE_S)
            is_torch = name.startswith("torch")
            with _without_kernels() if is_torch else nullcontext(), torch.inference_mode():
                once = _time_once(backend, ids[repeat:])
            for what, seconds in once.items() if repeat else ():  # the first warms up
                found[name].setdefault(what, []).append(seconds)
    return found


if __name__ == "__main__":
    print(json.dumps(_main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))))
