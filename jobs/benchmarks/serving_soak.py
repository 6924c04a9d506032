"""A server under a mixed load for minutes, with clients that leave, and a replica that is killed.

Every request is to end: with a whole answer, or with an error of OpenAI's shape. Those that were
under way in the killed replica, and bad ones, are to get such errors, and no others. Afterwards no
page is to be held, and the replicas' memory is not to have grown since the first third.
"""

import asyncio
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from r1ray.config.serving import ServeConfig
from r1ray.serving.app import APP_NAME, start_server, stop_server
from r1ray.serving.readiness import deployment_name

__all__ = ["measure_soak"]

_MODEL = "soak"
_CLIENTS = 12
_REPLICAS = 2
_TIMEOUT_S = 120.0
_NOTICE_S = 2.0  # until Serve knows that a replica is lost, and sends nothing there
_BAD: list[dict[str, Any]] = [
    {"temperature": -1},
    {"prompt": [-5]},
    {"max_tokens": 10**6},
    {"unknown": 1},
    {"structured_outputs": {"regex": "(("}},
]
_HELD = ("r1ray:num_requests_running", "r1ray:num_requests_waiting", "r1ray:kv_cache_usage_perc")
_GOOD = ("whole", "left", "refused", "busy")


def measure_soak(model_dir: Path, ids: Sequence[int], minutes: float, port: int) -> dict[str, Any]:
    """Counts of how requests ended, what is held afterwards, and memory over time."""
    config = ServeConfig(
        model_name=_MODEL,
        port=port,
        num_replicas=_REPLICAS,
        num_cpus_per_replica=1,
        kv_cache="int8",
        kv_cache_mib=64,  # short: sequences wait, and give way
        max_concurrency=8,
        max_queued_requests=4,
        max_context_tokens=2048,
    )
    url = start_server(str(model_dir), config)
    try:
        return asyncio.run(_soak(url, list(ids), 60 * minutes))
    finally:
        stop_server()


async def _soak(url: str, ids: list[int], seconds: float) -> dict[str, Any]:
    ends, lost = Counter[str](), list[str]()
    memory: list[dict[str, Any]] = []
    started = time.monotonic()
    killed_at: float | None = None
    async with httpx.AsyncClient(base_url=url, timeout=_TIMEOUT_S) as client:

        async def work(number: int) -> None:
            chance = random.Random(number)
            while time.monotonic() - started < seconds:
                begun = time.monotonic()
                try:
                    kind = await asyncio.wait_for(_ask(client, ids, chance), _TIMEOUT_S)
                except (httpx.HTTPError, TimeoutError, ValueError) as error:
                    kind = f"lost: {type(error).__name__}"
                was_there = killed_at is not None and begun <= killed_at + _NOTICE_S
                if kind == "failed" and not was_there:
                    kind = "failed without a reason"
                ends[kind] += 1
                if kind not in (*_GOOD, "failed"):
                    lost.append(kind)

        async def watch() -> None:
            nonlocal killed_at
            while time.monotonic() - started < seconds:
                await asyncio.sleep(min(5.0, seconds / 40))
                at = time.monotonic() - started
                memory.append({"at_s": at, "resident_bytes": _resident()})
                if killed_at is None and at > seconds / 2:
                    killed_at = time.monotonic()
                    os.kill(min(_resident()), signal.SIGKILL)

        await asyncio.gather(watch(), *[work(number) for number in range(_CLIENTS)])
        await asyncio.sleep(5)
        held = await _ask_held(client)
    return {
        "seconds": seconds,
        "ends": dict(ends),
        "lost": lost,
        "held": held,
        "memory": memory,
    }


async def _ask(client: httpx.AsyncClient, ids: list[int], chance: random.Random) -> str:
    """How one request ended: whole, left, refused, busy or failed; whatever else is wrong."""
    body: dict[str, Any] = {
        "model": _MODEL,
        "temperature": chance.choice([0, 1]),
        "max_tokens": chance.choice([4, 30, 200]),
        "stream": chance.random() < 0.7,
    }
    start, length = chance.randrange(5000), chance.choice([5, 70, 300, 1500])
    body["prompt"] = ids[start : start + length]
    is_bad = chance.random() < 0.1
    if is_bad:
        body |= chance.choice(_BAD)
    leaves = body["stream"] and chance.random() < 0.2
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            await response.aread()
            if "error" not in response.json():
                return f"no error body with status {response.status_code}"
            if response.status_code == 429:
                await asyncio.sleep(0.5)
                return "busy"
            if is_bad and response.status_code == 400:
                return "refused"
            return "failed" if response.status_code == 503 else f"status {response.status_code}"
        if is_bad:
            return "answered, though bad"
        if not body["stream"]:
            await response.aread()
            reason = response.json()["choices"][0]["finish_reason"]
            return "whole" if reason in ("stop", "length") else f"reason {reason}"
        events = [""]
        async for line in response.aiter_lines():
            if line:
                events.append(line)
            if leaves and len(events) > 2:
                return "left"
    if '"error"' in "".join(events[-2:]):
        return "failed"
    is_whole = events[-1] == "data: [DONE]" and '"finish_reason":"' in events[-2]
    return "whole" if is_whole else "a stream that ends without a reason"


def _resident() -> dict[int, int]:
    """Bytes of each replica's process."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            title = (path / "cmdline").read_bytes().decode(errors="replace")
            if title.startswith(f"ray::ServeReplica:{APP_NAME}:{deployment_name(_MODEL)}"):
                pages = int((path / "statm").read_text(encoding="ascii").split()[1])
                found[int(path.name)] = pages * os.sysconf("SC_PAGE_SIZE")
        except OSError:  # it has ended
            continue
    return found


async def _ask_held(client: httpx.AsyncClient) -> dict[str, float | None]:
    """As `_read_held`, once all replicas are there again; None where one stays away."""
    deadline = time.monotonic() + _TIMEOUT_S
    while (held := await _read_held(client)) is None and time.monotonic() < deadline:
        await asyncio.sleep(1)
    return dict.fromkeys(_HELD) if held is None else {**held}


async def _read_held(client: httpx.AsyncClient) -> dict[str, float] | None:
    """Of all replicas together: requests, and the share of the pages that they hold.

    None where a replica does not tell one of them.
    """
    found = dict.fromkeys(_HELD, 0.0)
    told = Counter[str]()
    text = (await client.get("/metrics")).raise_for_status().text
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name in _HELD:
                found[sample.name] += sample.value
                told[sample.name] += 1
    return found if all(told[name] == _REPLICAS for name in _HELD) else None
