"""What one model of `jobs.bench_compression` is worth: answers, perplexity, size, memory, time."""

import contextlib
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from jobs.benchmarks.compression_models import NUM_PROBLEMS, Arm
from jobs.benchmarks.exchange_data import tokenize_problems, validation_loss, write_batches
from r1ray.compression.export import weight_bytes
from r1ray.config import PipelineConfig
from r1ray.data.batch_set import BatchSet, MicroBatch
from r1ray.data.reasoning import build_messages, draw_heldout
from r1ray.data.texts import read_english
from r1ray.evaluation.accuracy import answer_problems
from r1ray.evaluation.latency import measure_latency
from r1ray.evaluation.perplexity import measure_perplexity
from r1ray.models import Decoder, load_model, save_model
from r1ray.models.checkpoint import copy_tokenizer
from r1ray.models.kv_cache import KVCache
from r1ray.models.tokenizer import Tokenizer

__all__ = [
    "compare_latency",
    "heldout_batches",
    "measure_answers",
    "measure_costs",
    "measure_resident",
    "task_perplexity",
]

_ENGLISH_TOKENS, _WINDOW = 16_384, 1024
_LATENCY_TURNS, _TOKENS_A_TURN = 15, 8
_TIMED_ANSWERS = 40
_RESIDENT_TIMEOUT_S = 300


def measure_answers(arm: Arm, model_dir: Path, batches: list[MicroBatch]) -> dict[str, Any]:
    """What a model knows: answers to the held-out problems, perplexity, size on disk.

    Args:
        batches: held-out traces, for the perplexity on the task.
    """
    with _as_it_runs(arm, model_dir) as directory:
        model, tokenizer = load_model(directory), Tokenizer(directory)
        answers = answer_problems(
            model,
            tokenizer,
            draw_heldout(arm.config.tasks, NUM_PROBLEMS),
            arm.config.tasks.system_prompt,
            max_new_tokens=arm.config.evaluate.max_new_tokens,
            max_concurrency=arm.config.evaluate.max_concurrency,
            on_finish=lambda _: None,
        )
        return {
            "is_correct": [answer.is_correct for answer in answers],
            "task_perplexity": task_perplexity(model, batches),
            "english_perplexity": measure_perplexity(
                model, tokenizer, read_english(), max_tokens=_ENGLISH_TOKENS, window=_WINDOW
            ),
            "weight_bytes": weight_bytes(directory),
        }


def measure_costs(arm: Arm, model_dir: Path, plain_dir: Path) -> dict[str, Any]:
    """What a model takes: resident memory, and time a token, in turns with the one in `plain_dir`.

    Times are lists of milliseconds, one of a turn.
    """
    with _as_it_runs(arm, model_dir) as directory:
        models = {"plain_decode_ms": load_model(plain_dir), "decode_ms": load_model(directory)}
        taken: dict[str, list[float]] = {name: [] for name in models}
        for _ in range(_LATENCY_TURNS):
            for name, model in models.items():
                found = measure_latency(model, repeats=1, new_tokens=_TOKENS_A_TURN)
                taken[name].append(found.decode_ms_per_token)
        del models, model
        return {**taken, "resident_bytes": measure_resident(directory)}


@contextlib.contextmanager
def _as_it_runs(arm: Arm, model_dir: Path) -> Iterator[Path]:
    """The model directory; where the arm is run in bf16, a copy in that."""
    if not arm.is_bf16:
        yield model_dir
        return
    with tempfile.TemporaryDirectory(prefix="r1ray-bf16-") as directory:
        save_model(load_model(model_dir, dtype=torch.bfloat16), directory)
        copy_tokenizer(model_dir, directory)
        yield Path(directory)


def heldout_batches(config: PipelineConfig, tokenizer_dir: Path, out_dir: Path) -> list[MicroBatch]:
    """Micro-batches of the held-out problems' own traces."""
    problems = draw_heldout(config.tasks, NUM_PROBLEMS)
    samples = tokenize_problems(Tokenizer(tokenizer_dir), problems, config)
    write_batches(samples, config.prepare, out_dir)
    batches = BatchSet(out_dir)
    return [batches[index] for index in range(len(batches))]


def task_perplexity(model: Decoder, batches: list[MicroBatch]) -> float:
    """exp of the mean cross-entropy of the held-out traces' target tokens."""
    return math.exp(validation_loss(model, batches))


def measure_resident(model_dir: Path) -> int:
    """What loading a model and one forward add to a process that has imported everything."""
    found = subprocess.run(
        [sys.executable, "-m", "jobs.benchmarks.resident_child", str(model_dir)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        timeout=_RESIDENT_TIMEOUT_S,
    )
    result: Mapping[str, int] = json.loads(found.stdout.splitlines()[-1])
    return result["grown_bytes"]


def compare_latency(
    models: Mapping[str, Decoder], tokenizer_dir: Path, config: PipelineConfig
) -> dict[str, Any]:
    """Seconds for the same answers of `teacher_fp32`, by model; they take turns, one stream each.

    An answer is decoded token by token, each model being given the same tokens.
    """
    tokenizer = Tokenizer(tokenizer_dir)
    problems = draw_heldout(config.tasks, _TIMED_ANSWERS)
    answers = answer_problems(
        models["teacher_fp32"],
        tokenizer,
        problems,
        config.tasks.system_prompt,
        max_new_tokens=config.evaluate.max_new_tokens,
        max_concurrency=_TIMED_ANSWERS,
        on_finish=lambda _: None,
    )
    pairs = []
    for problem, answer in zip(problems, answers, strict=True):
        messages = build_messages(problem, config.tasks.system_prompt)
        prompt = tokenizer.encode(tokenizer.render_chat(messages, add_generation_prompt=True))
        pairs.append((prompt, tokenizer.encode(answer.reply)))
    for model in models.values():
        _replay(model, *pairs[0])  # warm-up
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for prompt, reply in pairs:
        for name, model in models.items():
            seconds[name].append(_replay(model, prompt, reply))
    return {"seconds": seconds, "num_tokens": [len(reply) for _, reply in pairs]}


@torch.inference_mode()
def _replay(model: Decoder, prompt: list[int], reply: list[int]) -> float:
    """Seconds to read `prompt` and to decode `reply`, whatever the model would say itself."""
    cache = KVCache(
        model.config, max_rows=1, max_tokens=len(prompt) + len(reply), dtype=torch.float32
    )
    started = time.perf_counter()
    rows = cache.add_rows(1)
    model.next_logits(torch.tensor([prompt]), rows, [len(prompt) - 1])
    rows.advance([len(prompt)])
    for token in reply:
        rows = cache.active()
        model.next_logits(torch.tensor([[token]]), rows, [0])
        rows.advance([1])
    return time.perf_counter() - started
