"""One peer reads one prompt: run by `long_context_peers` inside the peer's own environment.

python long_context_peer_child.py TASK.json

Nothing of r1ray is imported here: it is not installed there. No peer may find a prompt in a cache:
each starts afresh, and every repetition's prompt begins one token later than the one before.
Prefill is the time from the call to the first token, of which nothing more is asked; decoding is
timed in a call of its own, between tokens. The last line of output is a JSON object.
"""

import ctypes
import gc
import itertools
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

__all__ = ["quantize_gguf", "time_peer"]

_WARM_UP_TOKENS = 64

Answer = tuple[list[int], list[float]]  # greedy tokens, and the clock when each was there


class _Peer(Protocol):
    package: str
    settings: dict[str, Any]

    def answer(self, ids: list[int], num_tokens: int) -> Answer:
        """`num_tokens` greedy tokens after `ids`, of which all were read."""


class _LlamaCpp:
    package = "llama-cpp-python"

    def __init__(self, task: dict[str, Any]) -> None:
        import llama_cpp

        self._llama = llama_cpp.Llama(
            model_path=task["model"],
            n_ctx=task["num_tokens"] + task["new_tokens"] + 1,
            n_threads=task["num_threads"],
            n_threads_batch=task["num_threads"],
            flash_attn=task["flash_attn"],
            verbose=False,
        )
        features = llama_cpp.llama_print_system_info().decode().removeprefix("CPU :")
        self.settings = {
            "flash_attn": task["flash_attn"],
            "kv_cache": "float16",
            "n_batch": self._llama.n_batch,
            "features": [
                part.split("=")[0].strip() for part in features.split("|") if "= 1" in part
            ],
        }

    def answer(self, ids: list[int], num_tokens: int) -> Answer:
        self._llama.reset()
        tokens, times = [], []
        for token in self._llama.generate(ids, temp=0.0, repeat_penalty=1.0):
            times.append(time.perf_counter())
            tokens.append(int(token))
            if len(tokens) == num_tokens:
                break
        _check_read(self._llama.n_tokens, len(ids) + num_tokens - 1)
        return tokens, times


class _OpenVino:
    package = "openvino-genai"

    def __init__(self, task: dict[str, Any]) -> None:
        import openvino
        import openvino_genai

        self._openvino, self._genai = openvino, openvino_genai
        options: dict[str, Any] = {
            "INFERENCE_NUM_THREADS": task["num_threads"],
            "ATTENTION_BACKEND": task["attention"],
        }
        if task["attention"] == "PA":
            scheduler = openvino_genai.SchedulerConfig()
            scheduler.enable_prefix_caching = False  # on, where nothing is said
            scheduler.max_num_batched_tokens = task["num_tokens"]  # the prompt whole, as by default
            options["scheduler_config"] = scheduler
        self._pipeline = openvino_genai.LLMPipeline(task["model"], "CPU", **options)
        core = openvino.Core()
        names = (
            "INFERENCE_PRECISION_HINT",
            "KV_CACHE_PRECISION",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE",
        )
        self.settings = {"attention": task["attention"], "prefix_caching": False} | {
            name.lower(): _name_value(core.get_property("CPU", name)) for name in names
        }

    def answer(self, ids: list[int], num_tokens: int) -> Answer:
        import numpy as np

        inputs = self._genai.TokenizedInputs(
            self._openvino.Tensor(np.array([ids], dtype=np.int64)),
            self._openvino.Tensor(np.ones((1, len(ids)), dtype=np.int64)),
        )
        config = self._genai.GenerationConfig(
            max_new_tokens=num_tokens, ignore_eos=True, do_sample=False, apply_chat_template=False
        )
        times: list[float] = []
        found = self._pipeline.generate(inputs, config, _streamer(self._genai, times))
        _check_read(found.perf_metrics.get_num_input_tokens(), len(ids))
        return [int(token) for token in found.tokens[0]], times


def _streamer(genai: Any, times: list[float]) -> Any:
    def write(_: Any, tokens: Any) -> Any:
        times.extend([time.perf_counter()] * (len(tokens) if isinstance(tokens, list) else 1))
        return genai.StreamingStatus.RUNNING

    methods = {"write": write, "end": lambda _: None}
    return type("Streamer", (genai.StreamerBase,), methods)()


class _Transformers:
    package = "transformers"

    def __init__(self, task: dict[str, Any]) -> None:
        import torch
        import transformers

        torch.set_num_threads(task["num_threads"])
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            task["model"], dtype=torch.float32, attn_implementation="sdpa"
        ).eval()
        self.settings = {"attention": "sdpa", "kv_cache": "float32", "torch": version("torch")}

    def answer(self, ids: list[int], num_tokens: int) -> Answer:
        import torch

        cache: Any = None
        part = torch.tensor([ids])
        tokens: list[int] = []
        times: list[float] = []
        with torch.inference_mode():
            while len(tokens) < num_tokens:
                found = self._model(part, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache = found.past_key_values
                tokens.append(int(found.logits[0, -1].argmax()))
                times.append(time.perf_counter())
                part = torch.tensor([[tokens[-1]]])
        _check_read(cache.get_seq_length(), len(ids) + num_tokens - 1)
        return tokens, times


_PEERS: dict[str, Callable[[dict[str, Any]], _Peer]] = {
    "llama_cpp": _LlamaCpp,
    "openvino": _OpenVino,
    "transformers": _Transformers,
}


def time_peer(peer: _Peer, ids: list[int], task: dict[str, Any]) -> dict[str, Any]:
    """Seconds of prefill of `num_tokens` tokens, and between tokens thereafter; peak memory.

    Args:
        ids: `num_tokens + repeats - 1` of them or more.
        task: `num_tokens`, `new_tokens`, `repeats`, and `budget_s`, after which no repetition
            starts.
    """
    num_tokens = task["num_tokens"]
    peer.answer(ids[-_WARM_UP_TOKENS:], 2)  # thread pools, libraries
    _reset_peak()
    seconds: list[float] = []
    for repeat in range(task["repeats"]):
        if sum(seconds) > task["budget_s"]:
            break
        prompt = ids[repeat : repeat + num_tokens]
        started = time.perf_counter()
        _check_count(peer.answer(prompt, 1), 1)
        seconds.append(time.perf_counter() - started)
    tokens, times = _check_count(
        peer.answer(ids[:num_tokens], 1 + task["new_tokens"]), 1 + task["new_tokens"]
    )
    return {
        "prefill_runs_s": seconds,
        "decode_runs_s": [after - before for before, after in itertools.pairwise(times)],
        "answer": tokens,
        "peak_resident_bytes": _read_status("VmHWM"),
    }


def quantize_gguf(source: str, target: str) -> None:
    """Write all matrices of the GGUF file `source` as Q8_0, by llama.cpp's own quantizer."""
    import llama_cpp

    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0
    settings.allow_requantize = True  # what is Q8_0 in `source` is copied
    status = llama_cpp.llama_model_quantize(
        os.fsencode(source), os.fsencode(target), ctypes.byref(settings)
    )
    if status:
        raise RuntimeError(f"llama_model_quantize returned {status}")


def _check_read(found: int, expected: int) -> None:
    if found != expected:
        raise RuntimeError(f"{found} tokens were read, {expected} were given")


def _check_count(answer: Answer, expected: int) -> Answer:
    if {len(part) for part in answer} != {expected}:
        raise RuntimeError(f"{len(answer[0])} tokens were answered, {expected} were wanted")
    return answer


def _name_value(value: Any) -> str:
    return str(value.get_type_name()) if hasattr(value, "get_type_name") else str(value)


def _limit_memory() -> None:
    """Let an engine that wants more than is free fail, not the machine."""
    with Path("/proc/meminfo").open(encoding="ascii") as lines:
        free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    resource.setrlimit(resource.RLIMIT_DATA, (free * 1024, resource.RLIM_INFINITY))


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
    if task["peer"] == "quantize":
        quantize_gguf(task["model"], task["target"])
        return {}
    _limit_memory()
    ids = json.loads(Path(task["ids"]).read_text(encoding="utf-8"))
    started = time.perf_counter()
    peer = _PEERS[task["peer"]](task)
    load_s = time.perf_counter() - started
    described = {"version": version(peer.package), "settings": peer.settings, "load_s": load_s}
    return described | time_peer(peer, ids, task)


if __name__ == "__main__":
    print(json.dumps(_main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))))
