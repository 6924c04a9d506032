"""One application whose model is on a GPU and on CPUs."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from r1ray.config.serving import GroupConfig, ServeConfig
from r1ray.serving.app import start_server, stop_server
from tests.e2e.processes import free_port, until
from tests.fakes import write_tiny_model


def test_a_gpu_and_cpus_answer_for_one_model(local_ray: None, tmp_path: Path) -> None:
    one_each = {"max_concurrency": 1, "max_queued_requests": 1, "num_cpus_per_replica": 1}
    config = ServeConfig(
        model_name="tiny",
        port=free_port(),
        max_context_tokens=256,
        groups=[
            GroupConfig(name="gpu", device="cuda", num_gpus_per_replica=1, **one_each),  # type: ignore[arg-type]
            GroupConfig(name="cpu", device="cpu", **one_each),  # type: ignore[arg-type]
        ],
    )
    url = start_server(str(write_tiny_model(tmp_path)), config)
    body = {"model": "tiny", "prompt": "the quick brown fox", "max_tokens": 100, "temperature": 0}

    def ask(_: int) -> httpx.Response:
        return httpx.post(f"{url}/v1/completions", json=body, timeout=60)

    def is_measured(group: str) -> bool:
        text = httpx.get(f"{url}/metrics", timeout=30).text
        return any("measured_step" in line and group in line for line in text.splitlines())

    try:
        until(lambda: is_measured("gpu") and is_measured("cpu"))
        with ThreadPoolExecutor(4) as threads:
            answers = list(threads.map(ask, range(4)))
        metrics = httpx.get(f"{url}/metrics", timeout=30).text
    finally:
        stop_server()
    assert [answer.status_code for answer in answers] == [200] * 4
    assert len({answer.json()["choices"][0]["text"] for answer in answers}) == 1
    for group in ("gpu", "cpu"):
        assert any(
            line.startswith("r1ray:request_success_total") and f'group="{group}"' in line
            for line in metrics.splitlines()
        ), f"group {group} answered nothing"
