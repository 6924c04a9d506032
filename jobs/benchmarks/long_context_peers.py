"""SmolLM2 in other engines: prefill and decoding at a depth, each in an environment of its own.

1. A virtual environment with the peer's pinned requirements, made under the work folder, or found.
2. For every length a process in it (`long_context_peer_child`): load, read, answer, end.

All read the same token ids. llama.cpp and OpenVINO read one GGUF file, in two manners each, so that
the faster counts. Price: 0.2 GB of packages for llama.cpp (compiled for this machine where no wheel
is: minutes), 0.3 GB for OpenVINO, 1.2 GB for transformers with a torch without CUDA.
"""

import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import gguf as gguf_format

from r1ray.compression.gguf import write_gguf
from r1ray.errors import ConfigError

__all__ = ["PEERS", "REQUIREMENTS", "Peer", "find_best", "measure_peer", "write_peer_gguf"]

# Of an environment: what was tested, and what else in it decides the speed.
REQUIREMENTS: dict[str, tuple[str, ...]] = {
    "llama_cpp": ("llama-cpp-python==0.3.36", "numpy==2.4.6"),
    "openvino": (
        "openvino==2026.4.1",
        "openvino-genai==2026.4.1.0",
        "openvino-tokenizers==2026.4.1.0",
        "numpy==2.4.6",
    ),
    "transformers": ("torch==2.13.0", "transformers==5.24.0", "numpy==2.4.6"),
}


@dataclass(frozen=True)
class Peer:
    """An engine, as it is asked.

    Attributes:
        environment: key of `REQUIREMENTS`, and of the engine in the child.
        options: of the engine, for the child.
        reads_gguf: or the model directory, in float32.
    """

    environment: str
    options: Mapping[str, Any] = field(default_factory=dict)
    reads_gguf: bool = True


PEERS: dict[str, Peer] = {
    "llama_cpp": Peer("llama_cpp", {"flash_attn": False}),  # llama-cpp-python's default
    "llama_cpp_flash": Peer("llama_cpp", {"flash_attn": True}),
    "openvino": Peer("openvino", {"attention": "PA"}),  # paged attention, OpenVINO GenAI's default
    "openvino_sdpa": Peer("openvino", {"attention": "SDPA"}),
    "transformers": Peer("transformers", reads_gguf=False),
}

_INDISPENSABLE = {"llama_cpp", "openvino"}
_CHILD = Path(__file__).with_name("long_context_peer_child.py")
_INSTALL_TIMEOUT_S = 3600.0
_BUDGET_S = 150.0  # of one length: repetitions that would start later are left out
_ERROR_CHARACTERS = 2000


class _FailedError(Exception):
    """A child that failed or took too long; the text says what it wrote last."""


def measure_peer(
    name: str,
    model_dir: Path,
    gguf: Path,
    work: Path,
    token_ids: Sequence[int],
    *,
    lengths: Sequence[int] = (8000,),
    new_tokens: int = 32,
    repeats: int = 3,
    num_threads: int = 2,
    timeout_s: float = 1800.0,
) -> dict[str, Any]:
    """What the peer takes to read prompts of `lengths` tokens, and to go on from there.

    Args:
        model_dir: the float model, for transformers; `gguf` is for the others.
        work: where environments are made, and found again if their requirements are the same.
        token_ids: `max(lengths) + repeats - 1` or more; repetition r reads from the r-th on.
        timeout_s: of each length, loading included.
    Returns:
        `name`, `weights`, `requirements`, and `error` if the environment could not be made.
        Otherwise `lengths`: from number of tokens, as text -> `prefill_s` and `decode_tokens_per_s`
        (medians), the single times, `peak_resident_bytes` since loading, the greedy `answer`,
        `version` and `settings`; or an `error`. What follows a failed length is not tried.
    Raises:
        ConfigError: an unknown peer, or too few tokens.
    """
    if name not in PEERS:
        raise ConfigError(f"peer {name!r} is not one of {', '.join(PEERS)}")
    wanted = max(lengths) + repeats - 1
    if len(token_ids) < wanted:
        raise ConfigError(f"{len(token_ids)} token ids are fewer than the {wanted} to be read")
    peer = PEERS[name]
    result: dict[str, Any] = {
        "name": name,
        "weights": _describe_gguf(gguf) if peer.reads_gguf else "float32",
        "requirements": list(REQUIREMENTS[peer.environment]),
    }
    try:
        python = _make_environment(peer.environment, work)
    except _FailedError as error:
        return result | {"error": str(error)}
    ids_path = work / "prompt_ids.json"
    ids_path.write_text(json.dumps(list(token_ids[:wanted])), encoding="utf-8")
    task = {
        "peer": peer.environment,
        "model": str((gguf if peer.reads_gguf else model_dir).resolve()),
        "ids": str(ids_path.resolve()),
        "new_tokens": new_tokens,
        "repeats": repeats,
        "num_threads": num_threads,
        "budget_s": _BUDGET_S,
        **peer.options,
    }
    measured: dict[str, Any] = {}
    failed = None
    for length in sorted(lengths):
        if failed is not None:
            measured[str(length)] = {"error": f"not tried after {failed} tokens failed"}
            continue
        try:
            found = _ask_child(python, task | {"num_tokens": length}, work, timeout_s=timeout_s)
            measured[str(length)] = _summarize(found)
        except _FailedError as error:
            failed = length
            measured[str(length)] = {"error": str(error)}
    return result | {"lengths": measured}


def find_best(
    results: Iterable[Mapping[str, Any]],
    length: int,
    figure: Literal["prefill_s", "decode_tokens_per_s"],
    environments: Collection[str] = tuple(REQUIREMENTS),
) -> tuple[str, float] | None:
    """Name and figure of the fastest peer of `environments` at `length` tokens.

    None if llama.cpp or OpenVINO is among `environments` and was measured in neither manner: a bar
    against the best then does not count.
    """
    found = {
        result["name"]: result["lengths"][str(length)][figure]
        for result in results
        if figure in result.get("lengths", {}).get(str(length), {})
        and PEERS[result["name"]].environment in environments
    }
    measured = {PEERS[name].environment for name in found}
    if not found or not _INDISPENSABLE & set(environments) <= measured:
        return None
    choose = min if figure == "prefill_s" else max
    name = choose(found, key=lambda name: found[name])
    return name, found[name]


def write_peer_gguf(model_dir: Path, work: Path) -> Path:
    """The model as GGUF with all matrices in Q8_0, embedding and head included, as r1ray's INT8.

    r1ray's export keeps the embedding, which is the head as well, in float16; llama.cpp's own
    quantizer does the rest. Where that cannot be had, the export as it is: `weights` in the results
    names the types.
    """
    work.mkdir(parents=True, exist_ok=True)
    exported, target = work / "exported.gguf", work / "q8_0.gguf"
    if target.exists():
        return target
    write_gguf(model_dir, exported)
    partial = target.with_suffix(".tmp")
    task = {"peer": "quantize", "model": str(exported.resolve()), "target": str(partial.resolve())}
    try:
        python = _make_environment("llama_cpp", work)
        _ask_child(python, task, work, timeout_s=600.0)
    except _FailedError as error:
        print(f"  the embedding stays float16: {error}", flush=True)
        return exported
    partial.rename(target)
    return target


def _make_environment(name: str, work: Path) -> Path:
    """The Python of the environment `name`, with its requirements installed."""
    directory = work / "environments" / name
    python, stamp = directory / "bin" / "python", directory / "requirements.json"
    expected = [sys.version, *REQUIREMENTS[name]]
    if stamp.exists() and json.loads(stamp.read_text(encoding="utf-8")) == expected:
        return python
    shutil.rmtree(directory, ignore_errors=True)
    directory.parent.mkdir(parents=True, exist_ok=True)
    install = [python, "-I", "-m", "pip", "install", "--quiet", "--no-input"]
    for command in (
        [sys.executable, "-I", "-m", "venv", directory],
        [*install, "--disable-pip-version-check", *REQUIREMENTS[name]],
    ):
        _run([str(part) for part in command], timeout_s=_INSTALL_TIMEOUT_S)
    stamp.write_text(json.dumps(expected), encoding="utf-8")
    return python


def _ask_child(
    python: Path, task: Mapping[str, Any], work: Path, *, timeout_s: float
) -> dict[str, Any]:
    path = work / "task.json"
    path.write_text(json.dumps(task), encoding="utf-8")
    # -I: neither this repository's modules nor PYTHONPATH are seen.
    text = _run([str(python), "-I", str(_CHILD), str(path)], timeout_s=timeout_s)
    return _read_last_object(text)


def _run(command: Sequence[str], *, timeout_s: float) -> str:
    """What `command` wrote to its output; it and what it started are ended after `timeout_s`."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    environment.pop("OMP_NUM_THREADS", None)  # every engine is told its number of threads
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command, stdout=output, stderr=errors, env=environment, start_new_session=True
        )
        try:
            status: int | None = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        texts = []
        for file in (output, errors):
            file.seek(0)
            texts.append(file.read().decode("utf-8", errors="replace"))
    if status != 0:
        reason = f"ended after {timeout_s:g} s" if status is None else f"exit status {status}"
        raise _FailedError(_bound(f"{reason}: {texts[1] or texts[0]}"))
    return texts[0]


def _read_last_object(text: str) -> dict[str, Any]:
    """The JSON object in the last line; engines write what they like before it."""
    lines = text.strip().splitlines()
    try:
        found = json.loads(lines[-1])
    except (IndexError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise _FailedError(_bound(f"no JSON object in the last line: {text}"))
    return found


def _summarize(found: dict[str, Any]) -> dict[str, Any]:
    return {
        "prefill_s": statistics.median(found["prefill_runs_s"]),
        "decode_tokens_per_s": 1 / statistics.median(found["decode_runs_s"]),
    } | found


def _bound(text: str) -> str:
    """Start and end of `text`, without addresses: a record is no place for a registry's."""
    text = re.sub(r"\b(?:https?|file)://\S+", "(address)", text.strip())
    if len(text) <= _ERROR_CHARACTERS:
        return text
    half = _ERROR_CHARACTERS // 2
    return f"{text[:half]} … {text[-half:]}"


def _describe_gguf(path: Path) -> str:
    """Types of the matrices, the most frequent first, with those of few named: Q8_0, F16 (1)."""
    counts: dict[str, int] = {}
    for tensor in gguf_format.GGUFReader(path).tensors:
        if len(tensor.shape) == 2:
            kind = tensor.tensor_type.name
            counts[kind] = counts.get(kind, 0) + 1
    first, *rest = sorted(counts, key=lambda kind: -counts[kind])
    return ", ".join([first, *(f"{kind} ({counts[kind]})" for kind in rest)])
