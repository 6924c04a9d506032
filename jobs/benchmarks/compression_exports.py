"""The exports as others read them: GGUF by llama.cpp, compressed-tensors by transformers.

Each answers greedily from the same prompt tokens as the served model; the answers are compared
token by token. llama.cpp runs in an environment that is made for it; where that cannot be had, or
what makes transformers read the format is not installed, a reader is left out, and said so.
"""

import importlib.util
from pathlib import Path
from typing import Any

import torch

from jobs.benchmarks.peer_environments import PeerFailedError, ask_child, make_environment
from r1ray.compression.compressed_tensors import write_compressed_tensors
from r1ray.compression.export import weight_bytes
from r1ray.compression.gguf import write_gguf
from r1ray.data.texts import read_english
from r1ray.models import load_model
from r1ray.models.batch_generation import generate_batch
from r1ray.models.tokenizer import Tokenizer

__all__ = ["measure_exports"]

_PROMPTS, _PROMPT_TOKENS, _NEW_TOKENS = 20, 64, 32
_CHILD = Path(__file__).with_name("compression_export_child.py")


def measure_exports(served_dir: Path, work: Path) -> dict[str, Any]:
    """From reader -> share of equal tokens, and of answers that are equal throughout; sizes."""
    tokenizer, model = Tokenizer(served_dir), load_model(served_dir)
    ids = tokenizer.encode(read_english())
    prompts = [ids[n * 500 : n * 500 + _PROMPT_TOKENS] for n in range(_PROMPTS)]
    expected = generate_batch(
        model,
        prompts,
        max_new_tokens=_NEW_TOKENS,
        stop_token_ids=frozenset(),
        max_concurrency=_PROMPTS,
    )
    work.mkdir(parents=True, exist_ok=True)
    gguf_path, tensors_dir = work / "model.gguf", work / "compressed_tensors"
    write_gguf(served_dir, gguf_path)
    write_compressed_tensors(served_dir, tensors_dir)
    readers = {
        "llama_cpp": lambda: _ask_llama_cpp(gguf_path, prompts, work),
        "transformers": lambda: _ask_transformers(tensors_dir, prompts),
    }
    results: dict[str, Any] = {
        "sizes": {
            "served": weight_bytes(served_dir),
            "gguf": gguf_path.stat().st_size,
            "compressed_tensors": weight_bytes(tensors_dir),
        }
    }
    for name, ask in readers.items():
        try:
            results[name] = _compare(ask(), expected)
        except PeerFailedError as error:
            print(f"  {name} is LEFT OUT: {error}", flush=True)
    return results


def _compare(found: list[list[int]], expected: list[list[int]]) -> dict[str, float]:
    pairs = [
        (mine, theirs)
        for answer, wanted in zip(found, expected, strict=True)
        for mine, theirs in zip(answer, wanted, strict=True)
    ]
    return {
        "first_tokens": sum(a[0] == b[0] for a, b in zip(found, expected, strict=True))
        / len(found),
        "tokens": sum(mine == theirs for mine, theirs in pairs) / len(pairs),
        "answers": sum(a == b for a, b in zip(found, expected, strict=True)) / len(found),
    }


def _ask_llama_cpp(path: Path, prompts: list[list[int]], work: Path) -> list[list[int]]:
    task = {"model": str(path.resolve()), "prompts": prompts, "new_tokens": _NEW_TOKENS}
    python = make_environment("llama_cpp", work)
    found: list[list[int]] = ask_child(python, _CHILD, task, work, timeout_s=600.0)["answers"]
    return found


def _ask_transformers(directory: Path, prompts: list[list[int]]) -> list[list[int]]:
    import transformers

    if importlib.util.find_spec("compressed_tensors") is None:
        raise PeerFailedError("compressed-tensors is not installed")
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        for _ in range(_NEW_TOKENS):
            with torch.inference_mode():
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        answers.append(ids[0, len(prompt) :].tolist())
    return answers
