"""r1ray's engine without HTTP, as other engines are asked, and what only it is asked.

python -m jobs.benchmarks.serving_own TASK.json

The last line of output is a JSON object, as of `serving_peer_child`.
"""

import json
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from jobs.benchmarks.long_context_reading import load_reader
from jobs.benchmarks.serving_peer_child import time_engine
from r1ray.config.serving import AttentionKind
from r1ray.models import load_model
from r1ray.models.answer_lengths import AnswerLengths
from r1ray.models.decoder import Decoder
from r1ray.models.generation import BatchGenerator
from r1ray.models.requests import GenerationRequest
from r1ray.ops import native

__all__ = ["measure_admission", "measure_interference", "measure_prefix"]

_CONTEXT = 8192
_STEP_S = 0.075  # serve.max_step_ms


class _Own:
    def __init__(self, model: Decoder) -> None:
        self._model = model
        self.settings = {"kv_cache": "int8", "kernels": native.describe()}

    def answer(self, prompts: Sequence[list[int]], new_tokens: int) -> list[list[float]]:
        generator = _generator(self._model, len(prompts), max(map(len, prompts)) + new_tokens)
        for number, ids in enumerate(prompts):
            generator.add(_request(str(number), ids, new_tokens))
        times: dict[str, list[float]] = {str(number): [] for number in range(len(prompts))}
        while generator.num_running or generator.num_waiting:
            events = generator.step()
            now = time.perf_counter()
            for event in events:
                times[event.request_id].append(now)
        return list(times.values())


def measure_prefix(model: Decoder, ids: Sequence[int], repeats: int) -> dict[str, list[float]]:
    """Seconds to the first token behind 4,096 tokens: none of them known, and all but 32."""
    found: dict[str, list[float]] = {"cold_s": [], "warm_s": []}
    for repeat in range(repeats):
        generator = _generator(model, 2, _CONTEXT)
        shared = list(ids[97 * repeat : 97 * repeat + 4064])
        for name, kind in (("a", "cold_s"), ("b", "warm_s")):
            end = list(ids[5000 + 97 * ord(name) + repeat :][:32])
            generator.add(_request(name, [*shared, *end], 8))
            started = time.perf_counter()
            while not generator.step():
                pass
            found[kind].append(time.perf_counter() - started)
            while generator.num_running:
                generator.step()
    return found


def measure_interference(base: Path, ids: Sequence[int], repeats: int) -> dict[str, Any]:
    """By attention: seconds between tokens of seven streams, alone and while 8,000 are read.

    Gates are untrained, which takes the time that trained ones do (`long_context_reading`).
    """
    kinds: tuple[AttentionKind, ...] = ("sparse", "dense")
    return {
        kind: _measure_interference(load_reader(base, 8000, kind), ids, repeats) for kind in kinds
    }


def _measure_interference(
    model: Decoder, ids: Sequence[int], repeats: int
) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {"alone_s": [], "reading_s": [], "first_s": []}
    for repeat in range(repeats):
        generator = _generator(model, 8, _CONTEXT)
        for number in range(7):
            start = 97 * (7 * repeat + number)
            generator.add(_request(str(number), ids[start : start + 64], 2000))
        while len(generator.step()) < 7:
            pass
        found["alone_s"] += _intervals(generator, 200)
        generator.add(_request("long", ids[10 + repeat : 8010 + repeat], 8))
        started = time.perf_counter()
        found["reading_s"] += _intervals(generator, None)
        found["first_s"].append(time.perf_counter() - started)
    return found


def _intervals(generator: BatchGenerator, steps: int | None) -> list[float]:
    """Between the tokens of the streams: of so many steps, or until "long" has a token."""
    found: list[float] = []
    while steps is None or len(found) < steps:
        before = time.perf_counter()
        events = generator.step()
        found.append(time.perf_counter() - before)
        if any(event.request_id == "long" for event in events):
            break
    return found


def measure_admission(model: Decoder, ids: Sequence[int], repeats: int) -> dict[str, Any]:
    """Tokens per second of 96 requests in memory for four whole contexts of 1,024 tokens.

    Prompts have 64 to 256 tokens; answers 20 to 120, but may have 768: what most requests leave as
    it is. Predicted: by a sample of other answers of such lengths.
    """
    chance = random.Random(0)
    counts: dict[int, int] = {}
    for _ in range(1000):
        length = chance.randint(20, 120)
        counts[length] = counts.get(length, 0) + 1
    work = [(chance.randint(64, 256), chance.randint(20, 120)) for _ in range(96)]
    found: dict[str, Any] = {"predicted": [], "worst_case": [], "preempted": []}
    for repeat in range(repeats):
        for kind in ("predicted", "worst_case"):
            lengths = AnswerLengths(counts) if kind == "predicted" else None
            generator = BatchGenerator(
                model,
                max_concurrency=32,
                max_context_tokens=1024,
                max_step_tokens=1024,
                max_step_s=_STEP_S,
                num_pages=4 * 16,
                kv_dtype=torch.int8,
                lengths=lengths,
            )
            ends = {}
            for number, (num_prompt, num_new) in enumerate(work):
                start = 97 * (96 * repeat + number) % 20_000
                request = _request(str(number), ids[start : start + num_prompt], 768)
                generator.add(request)
                ends[request.request_id] = num_new
            started, written = time.perf_counter(), dict.fromkeys(ends, 0)
            while generator.num_running or generator.num_waiting:
                for event in generator.step():
                    written[event.request_id] += 1
                    if written[event.request_id] == ends[event.request_id]:
                        generator.cancel(event.request_id)
                        if lengths is not None:  # as where the model itself ends its answer
                            lengths.observe(ends[event.request_id], was_cut=False)
            seconds = time.perf_counter() - started
            found[kind].append(sum(written.values()) / seconds)
            if kind == "predicted":
                found["preempted"].append(generator.stats().num_preempted)
    return found


def _generator(model: Decoder, streams: int, context: int) -> BatchGenerator:
    return BatchGenerator(
        model,
        max_concurrency=streams,
        max_context_tokens=min(context, _CONTEXT),
        max_step_tokens=1024,
        max_step_s=_STEP_S,
        kv_dtype=torch.int8,
    )


def _request(name: str, ids: Sequence[int], new_tokens: int) -> GenerationRequest:
    return GenerationRequest(name, list(ids), new_tokens, frozenset())


def _main(task: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(task["num_threads"])
    ids = json.loads(Path(task["ids"]).read_text(encoding="utf-8"))
    if task["part"] == "interference":
        return measure_interference(Path(task["base"]), ids, task["repeats"])
    model = load_model(task["model"])
    parts = {"prefix": measure_prefix, "admission": measure_admission}
    if task["part"] in parts:
        return parts[task["part"]](model, ids, task["repeats"])
    own = _Own(model)
    return {"settings": own.settings, "scenarios": time_engine(own, ids, task)}


if __name__ == "__main__":
    print(json.dumps(_main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))))
