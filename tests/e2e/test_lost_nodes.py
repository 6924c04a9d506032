"""Stages on a cluster of several nodes, one of which is lost with all that it runs."""

import json
import os
import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from ray.cluster_utils import Cluster

from r1ray.artifacts import Artifact
from r1ray.config import PipelineConfig, load_config
from r1ray.pipeline import Pipeline
from tests.e2e.answers import read_metric, read_text
from tests.e2e.processes import TINY_CONFIG, free_port, start_job, stop, until, wait_for_checkpoint
from tests.fakes import write_tiny_model

pytestmark = pytest.mark.usefixtures("local_ray")

NUM_NODES = 3
NUM_STEPS = 40
CONTEXT = 8192
# A node that answers nobody is dead after 1.5 s; one that is only slow has ten seconds to answer.
QUICK_DEATH = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_failure_threshold": 3,
}


class Nodes:
    """A head for the driver, where no CPU is for tasks, and nodes of one CPU each."""

    def __init__(self) -> None:
        memory = {"object_store_memory": 100 << 20, "include_dashboard": False}
        head = memory | {"num_cpus": 0, "_system_config": QUICK_DEATH}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self._memory = memory
        self.refill()

    def refill(self) -> None:
        """Bring the nodes that were lost back."""
        while len(self._cluster.worker_nodes) < NUM_NODES:
            self._cluster.add_node(num_cpus=1, wait=False, **self._memory)

    def start_job(self, job: str, *overrides: str) -> subprocess.Popen[str]:
        self._cluster.wait_for_nodes()
        token = os.environ["RAY_AUTH_TOKEN"]
        extra = {"RAY_ADDRESS": self._cluster.address, "RAY_AUTH_TOKEN": token}
        return start_job(job, *overrides, extra=extra)

    def find(self, work: str) -> dict[Any, list[psutil.Process]]:
        """The processes at `work`, as Ray titles them, by the node that runs them."""
        found: dict[Any, list[psutil.Process]] = {}
        for node in self._cluster.worker_nodes:
            for process in _list_processes(node):
                try:
                    title = process.cmdline()
                except psutil.Error:  # it has ended
                    continue
                if title and title[0].startswith(f"ray::{work}"):
                    found.setdefault(node, []).append(process)
        return found

    def lose(self, node: Any) -> None:
        """All that the node runs ends in the same moment."""
        for process in _list_processes(node):
            process.kill()
        self._cluster.remove_node(node, allow_graceful=False)

    def shutdown(self) -> None:
        self._cluster.shutdown()


def _list_processes(node: Any) -> list[psutil.Process]:
    """The node's raylet, and what it has started."""
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    return [raylet, *raylet.children(recursive=True)]


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    nodes = Nodes()
    yield nodes
    nodes.shutdown()


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of all runs: what is made in one test is there in the next."""
    directory = tmp_path_factory.mktemp("nodes")
    write_tiny_model(directory / "model", max_positions=CONTEXT)
    (directory / "data").mkdir()
    for name in "abc":
        rows = [{"prompt": f"{name} {n}", "completion": "so " * (1 + n % 20)} for n in range(500)]
        path = directory / "data" / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        f"run.root={directory / 'runs'}",
        f"base.source={directory / 'model'}",
        f"prepare.sources=[{{type: files, paths: ['{directory / 'data'}']}}]",
        f"train.num_steps={NUM_STEPS}",
        "train.resources.checkpoint_every_steps=5",
        f"serve.max_context_tokens={CONTEXT}",
    ]


def _configure(overrides: list[str], root: str | Path | None = None) -> PipelineConfig:
    return load_config(TINY_CONFIG, [*overrides, *([f"run.root={root}"] if root else [])])


def _finish(job: subprocess.Popen[str]) -> str:
    """What the job said, once it has succeeded."""
    output, _ = job.communicate(timeout=120)
    assert job.returncode == 0, output[-4000:]
    return output


def test_prepare_makes_the_same_batches_when_a_node_is_lost(
    nodes: Nodes, overrides: list[str], tmp_path: Path
) -> None:
    undisturbed = Pipeline(_configure(overrides, tmp_path)).prepare()
    config = _configure(overrides)
    Pipeline(config, only="base").base()
    job = nodes.start_job("prepare", *overrides)
    try:
        until(lambda: nodes.find("MapBatches"), process=job)
        [node, *_] = nodes.find("MapBatches")
        [task, *_] = nodes.find("MapBatches")[node]
        task.suspend()
        assert task.cmdline()[0].startswith("ray::MapBatches"), "it ended before it was stopped"
        nodes.lose(node)
        _finish(job)
    finally:
        stop(job)
    assert Pipeline(config).prepare().digest == undisturbed.digest


def test_training_goes_on_from_its_checkpoint_when_a_node_is_lost(
    nodes: Nodes, overrides: list[str]
) -> None:
    pipeline = Pipeline(_configure(overrides))
    pipeline.prepare()
    nodes.refill()
    job = nodes.start_job("train", *overrides)
    train = Path(pipeline.store.path) / "train"
    try:
        until(lambda: len(nodes.find("RayTrainWorker")) == 2, process=job)
        [node, _] = nodes.find("RayTrainWorker")
        assert not nodes.find("_Board"), "what is there once is on the driver's node"
        wait_for_checkpoint(train, job)
        nodes.lose(node)
        assert not list(train.glob("*/manifest.json")), "lost too late to test anything"
        output = _finish(job)
    finally:
        stop(job)
    [resumed] = re.findall(r"resuming after step (\d+)", output)
    assert 5 <= int(resumed) < NUM_STEPS
    trained: Artifact = pipeline.train()
    history = json.loads((trained.local_dir / "history.json").read_text())
    assert [record["step"] for record in history] == list(range(1, NUM_STEPS + 1))


def test_answers_go_on_when_the_node_of_a_replica_is_lost(
    nodes: Nodes, overrides: list[str]
) -> None:
    Pipeline(_configure(overrides)).compress()
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    job = nodes.start_job("serve", *overrides, f"serve.port={port}", "serve.num_replicas=2")
    running = "r1ray:num_requests_running"

    def count_running() -> list[float]:
        """By replica."""
        try:
            return sorted(read_metric(url, running).values())
        except httpx.HTTPError:  # nobody listens yet
            return []

    try:
        until(lambda: count_running() == [0, 0], 120, job)
        ingresses = nodes.find("ServeReplica:r1ray:OpenAIIngress")
        engines = nodes.find("ServeReplica:r1ray:engine")
        assert len(engines) == 2, "the replicas share a node"
        [node, *_] = [node for node in engines if node not in ingresses]
        with openai.OpenAI(base_url=f"{url}/v1", api_key="unused", timeout=60) as client:

            def ask(content: str, **fields: Any) -> Any:
                options = {"temperature": 0, "extra_body": {"ignore_eos": True}} | fields
                messages: Any = [{"role": "user", "content": content}]
                return client.chat.completions.create(model="tiny", messages=messages, **options)

            def read(stream: Any) -> str | openai.APIError:
                try:
                    return read_text(stream)
                except openai.APIError as error:
                    return error

            prompts = ["the quick brown fox", "and then the other one"]
            streams = [ask(prompt, stream=True, max_tokens=7000) for prompt in prompts]
            until(lambda: count_running() == [1, 1], process=job)
            nodes.lose(node)
            with ThreadPoolExecutor(2) as pool:
                results = list(pool.map(read, streams))
            whole = {
                prompt: result
                for prompt, result in zip(prompts, results, strict=True)
                if isinstance(result, str)
            }
            assert len(whole) == 1, results
            assert "the model replica was lost" in str(results)
            [(prompt, text)] = whole.items()
            answer = ask(prompt, max_tokens=7000)
            assert answer.usage.completion_tokens == 7000
            assert answer.choices[0].message.content == text
            for number in range(4):  # openai's client comes back after a 503
                assert ask(f"question {number}", max_tokens=8).usage.completion_tokens == 8
        assert httpx.get(f"{url}/health", timeout=30).status_code == 200
    finally:
        stop(job)
    assert job.returncode == 0
