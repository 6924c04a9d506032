"""The serving benchmark: its parts, each stored when it has been measured, and the record."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jobs.benchmarks.base_files import BaseFiles
from jobs.benchmarks.parts import StoredParts
from jobs.benchmarks.peer_environments import (
    REQUIREMENTS,
    PeerFailedError,
    ask_child,
    describe_gguf,
    make_environment,
    run_module,
    write_peer_gguf,
)
from jobs.benchmarks.serving_report import (
    condense,
    engine_rows,
    render_engines,
    serving_rows,
)
from r1ray.evaluation.record import build_record, describe_run, render_table, write_json

__all__ = ["PEERS", "SCENARIOS", "ServingBenchmark"]

_TARGET = Path("docs/benchmarks")
_THREADS = 2
_SHORT = 64  # tokens of a prompt
_STREAMS, _HTTP_TOKENS, _HTTP_PAIRS, _PORT = 8, 256, 9, 8731
_SOAK_MINUTES = 10.0


def _scenario(streams: int, prompt_tokens: int, new_tokens: int, repeats: int) -> dict[str, Any]:
    return {
        "name": f"{streams}x{prompt_tokens}",
        "streams": streams,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "repeats": repeats,
    }


SCENARIOS = (
    _scenario(1, _SHORT, 128, 5),
    _scenario(8, _SHORT, _HTTP_TOKENS, 3),
    _scenario(32, _SHORT, 128, 3),
    _scenario(1, 4000, 64, 2),
    _scenario(8, 4000, 64, 1),
)
# From name -> environment, engine in the child, options, scenarios that it takes part in.
PEERS: dict[str, tuple[str, str, dict[str, Any], tuple[dict[str, Any], ...]]] = {
    "llama_cpp": ("llama_cpp", "llama_cpp", {"flash_attn": False}, SCENARIOS),
    "llama_cpp_flash": ("llama_cpp", "llama_cpp", {"flash_attn": True}, SCENARIOS),
    "openvino": ("openvino", "openvino", {"max_batched_tokens": 4096}, SCENARIOS),
    "openvino_one": (
        "openvino",
        "openvino_one",
        {},
        tuple(item for item in SCENARIOS if item["streams"] == 1),
    ),
    "vllm": ("vllm", "vllm", {"dtype": "bfloat16"}, SCENARIOS[:3]),
}


class ServingBenchmark:
    """What `jobs.bench_serving` measures; every result is kept in `work`."""

    def __init__(self, work: Path, source: str) -> None:
        self._work, self._files = work, BaseFiles(work, source)
        self._parts = StoredParts(work)

    def engine(self) -> dict[str, Any]:
        """r1ray's engine without HTTP."""
        return self._own("engine", scenarios=SCENARIOS)

    def peers(self) -> list[dict[str, Any]]:
        """The other engines, one after the other."""
        return [self._parts.once(f"peer_{name}", self._measure_peer, name) for name in PEERS]

    def prefix(self) -> dict[str, Any]:
        """Seconds to the first token behind a long beginning, new and known."""
        return self._own("prefix", repeats=5)

    def interference(self) -> dict[str, Any]:
        """Seconds between tokens while a long prompt is read."""
        return self._own("interference", repeats=3)

    def admission(self) -> dict[str, Any]:
        """Tokens per second in memory that is short, by how much is reserved."""
        return self._own("admission", repeats=3)

    def http(self) -> list[dict[str, Any]]:
        """The same streams through HTTP."""
        return self._parts.once("http", self._measure_http)

    def soak(self) -> dict[str, Any]:
        """Ten minutes of all that can happen."""
        return self._parts.once("soak", self._measure_soak)

    def file_record(self, command: str) -> str:
        """Write the record and its tables; returns the table."""
        engine, peers = self.engine(), self.peers()
        rows = [
            *engine_rows(peers),
            *serving_rows(
                prefix=self.prefix(),
                interference=self.interference(),
                admission=self.admission(),
                http=self.http(),
                soak=self.soak(),
            ),
        ]
        _TARGET.mkdir(parents=True, exist_ok=True)
        record = build_record("serving", command, rows, self._parts.circumstances())
        engines = {"engine": condense(engine), "peers": list(map(condense, peers))}
        write_json(_TARGET / "serving.json", {**record, **engines})
        table = render_table(rows)
        text = (
            f"# Serving\n\n{describe_run(record)}\n\n{table}\n## Engines\n\n"
            f"{render_engines(engine, peers)}\n{_NOTES}"
        )
        (_TARGET / "serving.md").write_text(text, encoding="utf-8")
        return table

    def _own(self, part: str, **task: Any) -> dict[str, Any]:
        return self._parts.once(part, self._ask_own, {"part": part, **task})

    def _ask_own(self, task: Mapping[str, Any]) -> dict[str, Any]:
        return run_module("jobs.benchmarks.serving_own", {**self._task(), **task}, self._work)

    def _task(self) -> dict[str, Any]:
        return {
            "model": str(self._files.int8()),
            "base": str(self._files.base()),
            "ids": str(self._files.ids()),
            "num_threads": _THREADS,
        }

    def _measure_peer(self, name: str) -> dict[str, Any]:
        environment, engine, options, scenarios = PEERS[name]
        result: dict[str, Any] = {"name": name, "requirements": list(REQUIREMENTS[environment])}
        work = self._work / "peers"
        work.mkdir(exist_ok=True)
        try:
            python = make_environment(environment, work)
            model = (
                self._files.base()
                if engine == "vllm"
                else write_peer_gguf(self._files.base(), work)
            )
            weights = options["dtype"] if engine == "vllm" else describe_gguf(model)
            task = {
                "peer": engine,
                "model": str(model.resolve()),
                "ids": str(self._files.ids()),
                "num_threads": _THREADS,
                "max_streams": max(item["streams"] for item in scenarios),
                "scenarios": scenarios,
                **options,
            }
            script = Path(__file__).with_name("serving_peer_child.py")
            found = ask_child(python, script, task, work, timeout_s=3600.0)
            return result | {"weights": weights, "own": self._own_rates(scenarios)} | found
        except PeerFailedError as error:
            return result | {"error": str(error)}

    def _own_rates(self, scenarios: Iterable[Mapping[str, Any]]) -> dict[str, list[float]]:
        """Of those with short prompts, tokens per second of r1ray's engine at this time."""
        short = [item for item in scenarios if item["prompt_tokens"] == _SHORT]
        found = self._ask_own({"part": "engine", "scenarios": short})["scenarios"]
        return {name: item["tokens_per_s"] for name, item in found.items()}

    def _measure_http(self) -> list[dict[str, Any]]:
        from jobs.cli import connected_to_ray
        from r1ray.config.serving import ServeConfig
        from r1ray.serving.app import start_server, stop_server

        config = ServeConfig(
            model_name="bench",
            port=_PORT,
            num_cpus_per_replica=_THREADS,
            kv_cache="int8",
            max_concurrency=_STREAMS,
            max_context_tokens=1024,
        )
        with connected_to_ray():
            url = start_server(str(self._files.int8()), config)
            try:
                task = {
                    "url": url,
                    "model": config.model_name,
                    "ids": str(self._files.ids()),
                    "streams": _STREAMS,
                    "prompt_tokens": _SHORT,
                    "new_tokens": _HTTP_TOKENS,
                }
                return [self._measure_pair(task) for _ in range(_HTTP_PAIRS)]
            finally:
                stop_server()

    def _measure_pair(self, task: Mapping[str, Any]) -> dict[str, Any]:
        """Streams over HTTP, and the engine alone while the server has nothing to do."""
        run = run_module("jobs.benchmarks.serving_client", task, self._work)
        scenario = _scenario(_STREAMS, _SHORT, _HTTP_TOKENS, 1)
        own = self._ask_own({"part": "engine", "scenarios": [scenario]})["scenarios"]
        [engine_s] = own[scenario["name"]]["seconds"]
        return {**run, "engine_s": engine_s}

    def _measure_soak(self) -> dict[str, Any]:
        from jobs.benchmarks.serving_soak import measure_soak
        from jobs.cli import connected_to_ray

        ids = json.loads(self._files.ids().read_text(encoding="utf-8"))
        with connected_to_ray():
            return measure_soak(self._files.int8(), ids, _SOAK_MINUTES, _PORT)


_NOTES = f"""
- SmolLM2-135M; greedy; two threads. r1ray: INT8 weights and activations, int8 keys and values.
  llama.cpp and OpenVINO read one GGUF file; what each computes in is in the record.
- The machine's speed changes by the quarter of an hour: rows compare with r1ray's engine as it was
  beside each peer, and take the peer that it did worst against.
- Decoding is timed from the moment when all streams have their first token. First token: of the
  last stream to get one. 32 streams of 4,000 tokens are left out: llama.cpp would read for ten
  minutes.
- Interference: seven streams are written while 8,000 tokens are read, block-sparsely, as long
  prompts are where a model has gates; with dense attention besides.
- HTTP: {_STREAMS} streams of {_HTTP_TOKENS} tokens over Serve's proxy and ingress on the same
  cores, {_HTTP_PAIRS} times in turn with the engine alone; half the client's CPU time is taken
  off, since it had two cores.
- Soak: {_SOAK_MINUTES:g} minutes, 12 clients, two replicas with 64 MiB for keys and values each;
  one is killed at half time.
"""
