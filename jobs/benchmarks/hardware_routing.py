"""A mixed load over a fast and a slow replica: routed by time, or given to each in turn.

One server has both: a model with two groups, and two models with the same two replicas, which the
client asks in turn. Who is not asked takes no time.
"""

import asyncio
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from r1ray.config.serving import BackendKind, GroupConfig, ModelArgs

__all__ = ["measure_routing"]

_ROUTED = "routed"
_CONTEXT = 2048
_ROUNDS = 3
_PER_S, _LONGEST = 2.0, 1500
_KINDS: dict[str, BackendKind] = {"fast": "native", "slow": "openvino"}


def measure_routing(
    model_dir: Path, ids: Sequence[int], num_requests: int, port: int
) -> dict[str, list[dict[str, Any]]]:
    """From arm -> rounds of the load, taken in turns after one that warms up: makespan, answers."""
    from ray import serve

    from r1ray.serving.app import APP_NAME, ServeArgs, build_app, stop_server

    arms = {_ROUTED: [_ROUTED], "in_turns": list(_KINDS)}
    found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    try:
        models = _list_models(str(model_dir))
        app = build_app(ServeArgs(models=models, playground=False))
        serve.run(app, name=APP_NAME, route_prefix="/")
        for number in range(_ROUNDS + 1):
            for arm, names in arms.items():
                plan = _plan_load(num_requests, len(ids), seed=number)
                url = f"http://127.0.0.1:{port}"
                measured = asyncio.run(_run(url, ids, names, plan))
                print(f"  {arm}: {measured['makespan_s']:.1f} s", flush=True)
                if number:
                    found[arm].append(measured)
        return found
    finally:
        stop_server()


def _list_models(model_dir: str) -> list[ModelArgs]:
    groups = [
        GroupConfig(
            name=name,
            backend=backend,
            num_cpus_per_replica=0.5,  # a thread; the others of four replicas do nothing then
            max_concurrency=4,
            max_queued_requests=256,
            kv_cache="int8",
        )
        for name, backend in _KINDS.items()
    ]
    return [
        ModelArgs(model_name=name, model_dir=model_dir, groups=some, max_context_tokens=_CONTEXT)
        for name, some in {_ROUTED: groups, **{item.name: [item] for item in groups}}.items()
    ]


def _plan_load(num_requests: int, num_ids: int, seed: int) -> list[tuple[float, int, int, int]]:
    """(when it comes, tokens of its prompt and of its answer, where the prompt begins) of each."""
    chance = random.Random(seed)
    came, plan = 0.0, []
    for _ in range(num_requests):
        came += chance.expovariate(_PER_S)
        num_prompt = min(int(chance.lognormvariate(5.0, 1.0)) + 16, _LONGEST)
        plan.append(
            (came, num_prompt, chance.randint(16, 128), chance.randrange(num_ids - _LONGEST))
        )
    return plan


async def _run(
    url: str,
    ids: Sequence[int],
    names: Sequence[str],
    plan: Sequence[tuple[float, int, int, int]],
) -> dict[str, Any]:
    async with httpx.AsyncClient(base_url=url, timeout=1200) as client:
        started = time.perf_counter()

        async def ask(number: int) -> float:
            at, num_prompt, num_new, first = plan[number]
            await asyncio.sleep(at)
            body = {
                "model": names[number % len(names)],
                "prompt": list(ids[first : first + num_prompt]),
                "max_tokens": num_new,
                "temperature": 0,
                "ignore_eos": True,
            }
            begun = time.perf_counter()
            (await client.post("/v1/completions", json=body)).raise_for_status()
            return time.perf_counter() - begun

        seconds = await asyncio.gather(*map(ask, range(len(plan))))
        return {"makespan_s": time.perf_counter() - started, "answer_s": seconds}
