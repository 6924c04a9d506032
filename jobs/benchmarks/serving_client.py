"""Streams of a server, read by a client in a process of its own: what it costs is told.

python -m jobs.benchmarks.serving_client TASK.json

The last line of output is a JSON object.
"""

import asyncio
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import httpx

__all__: list[str] = []

_STRIDE = 97


async def _read(client: httpx.AsyncClient, body: dict[str, Any]) -> tuple[int, list[float]]:
    """(tokens, the clock at each message)."""
    times: list[float] = []
    count = 0
    async with client.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            times.append(time.perf_counter())
            if '"usage":{' in line:
                count = json.loads(line.removeprefix("data: "))["usage"]["completion_tokens"]
    return count, times


async def _run(task: dict[str, Any], ids: list[int], repeat: int) -> dict[str, Any]:
    length, streams = task["prompt_tokens"], task["streams"]
    bodies = [
        {
            "model": task["model"],
            "prompt": ids[start : start + length],
            "max_tokens": task["new_tokens"],
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        for start in (_STRIDE * (streams * repeat + number) for number in range(streams))
    ]
    async with httpx.AsyncClient(base_url=task["url"], timeout=600) as client:
        before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        answers = await asyncio.gather(*[_read(client, body) for body in bodies])
        seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
    if any(count != task["new_tokens"] for count, _ in answers):
        raise RuntimeError(f"{[count for count, _ in answers]} tokens were answered")
    return {
        "seconds": seconds,
        "client_cpu_s": sum(
            getattr(after, name) - getattr(before, name) for name in ("ru_utime", "ru_stime")
        ),
        "first_s": [times[0] - started for _, times in answers],
        "num_messages": sum(len(times) for _, times in answers),
    }


def _main(task: dict[str, Any]) -> dict[str, Any]:
    ids = json.loads(Path(task["ids"]).read_text(encoding="utf-8"))
    _warm_up, run = (asyncio.run(_run(task, ids, repeat)) for repeat in range(2))
    return run


if __name__ == "__main__":
    print(json.dumps(_main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))))
