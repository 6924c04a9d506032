"""The GPU benchmark: every CUDA path against its plain counterpart, in one process.

Times are medians of repetitions after a warm-up, taken in turns; intervals are of the repetitions'
ratios, 2.5% to 97.5%.
"""

import dataclasses
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from jobs.benchmarks.layers_child import build_shape
from jobs.benchmarks.parts import check_is_committed
from r1ray.config.training import TrainConfig
from r1ray.data.batch_set import IGNORED, MicroBatch
from r1ray.data.packing import pack_best_fit
from r1ray.errors import ConfigError
from r1ray.evaluation.latency import measure_latency
from r1ray.evaluation.record import (
    Row,
    build_record,
    describe_circumstances,
    render_table,
    write_json,
)
from r1ray.exchange import LocalTransport, build_exchange
from r1ray.exchange.codecs import get_codec
from r1ray.models import Decoder, ModelConfig
from r1ray.models.kv_cache import KVCache
from r1ray.models.quantization import quantize_modules
from r1ray.models.tiered import move_to_device
from r1ray.ops.int8 import int8_linear, quantize_int8
from r1ray.training.step import TrainState

__all__ = ["measure_and_file"]

_TARGET = Path("docs/benchmarks")
_CUDA = torch.device("cuda")
_VOCABULARY = 49_152
_REPEATS = 15
_STEPS = 6
_BATCH_TOKENS = 16_384
_STREAMED_SHARE = 0.33  # of the weights: the GPU memory that a streamed model may use


def measure_and_file(command: str) -> str:
    """Measure, write docs/benchmarks/gpu.{json,md}; returns the table of rows.

    Raises:
        ConfigError: there is no GPU, or there are uncommitted changes.
    """
    if not torch.cuda.is_available():
        raise ConfigError("jobs.bench_gpu needs a CUDA device, and torch sees none")
    check_is_committed()
    circumstances = describe_circumstances()
    rows: list[Row] = []
    for measure in (_products, _codecs, _decoding, _precisions, _packing, _streaming):
        print(f"bench_gpu: {measure.__name__.strip('_')}", flush=True)
        for row in measure():
            print(f"  {row.id} {row.value} {row.unit}", flush=True)
            rows.append(row)
        gc.collect()
        torch.cuda.empty_cache()
    _TARGET.mkdir(parents=True, exist_ok=True)
    write_json(_TARGET / "gpu.json", build_record("gpu", command, rows, circumstances))
    table = render_table(rows)
    hardware, versions = circumstances["hardware"], circumstances["versions"]
    text = (
        f"# GPU\n\n`{command}` on one {hardware['gpu']}, torch {versions['torch']}, commit "
        f"{circumstances['commit']}, {circumstances['date']}.\n\n{table}\n{_NOTES}"
    )
    (_TARGET / "gpu.md").write_text(text, encoding="utf-8")
    return table


def _products() -> Iterator[Row]:
    """INT8 linear layers, rounding of activations included, against bf16 ones."""
    for inputs, outputs in ((576, 1536), (4096, 4096)):
        weight = torch.randn(outputs, inputs, device=_CUDA)
        q_OI, scale_O = quantize_int8(weight)
        narrow = weight.bfloat16()
        for rows in (1, 64, 4096):
            x = torch.randn(rows, inputs, device=_CUDA).bfloat16()
            seconds = _in_turns(
                {
                    "int8": partial(int8_linear, x, q_OI, scale_O),
                    "bf16": partial(F.linear, x, narrow),
                },
                calls=50,
            )
            yield _time(f"gpu.int8_linear_time.{inputs}x{outputs}.m{rows}", seconds, "int8", "bf16")


def _codecs() -> Iterator[Row]:
    """Encoding what is exchanged: from GPU memory to a payload on the host."""
    x = torch.randn(1 << 25, device=_CUDA)
    for name in ("int4", "int4_zstd"):
        codec = get_codec(name)
        seconds = _in_turns({"": partial(codec.encode_with_reconstruction, x)})[""]
        yield Row(
            f"gpu.encode_rate.{name}", x.nbytes / statistics.median(seconds) / 1e6, "MB of fp32/s"
        )


def _decoding() -> Iterator[Row]:
    """One sequence alone, token by token, by SmolLM2-135M's sizes."""
    found = {}
    for name in ("fp32", "bf16", "int8"):
        model = _build(_smollm2())
        if name == "int8":
            quantize_modules(model)
        if name == "bf16":
            model = model.bfloat16()
        found[name] = measure_latency(model, prompt_tokens=512, repeats=_REPEATS)
    for name, latency in found.items():
        yield Row(
            f"gpu.decode_ms.{name}",
            latency.decode_ms_per_token,
            "ms a token",
            baseline="fp32",
            baseline_value=found["fp32"].decode_ms_per_token,
        )


def _precisions() -> Iterator[Row]:
    """Training under the range controller against fp32, both with TF32 off."""
    for name, shape in (("smollm2_135m", _smollm2()), ("smollm2_1.7b", _large())):
        batch = _padded([1024] * 8)
        seconds = {}
        for precision in ("fp32", "bf16", "fp16"):
            state = _state(shape, precision)
            seconds[precision] = _time_steps(state, [batch])
            del state
            _clear()
        for precision in ("bf16", "fp16"):
            yield _speed(f"gpu.training_speed.{name}.{precision}", seconds, precision, "fp32")
        yield Row(
            f"gpu.training_rate.{name}.bf16",
            batch.num_tokens / statistics.median(seconds["bf16"]),
            "tokens/s",
        )


def _packing() -> Iterator[Row]:
    """The same documents in packed rows and in padded batches of random composition."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(5.8, 0.8, 400), 16, 2048).astype(int).tolist()
    padded, start = [], 0
    while start < len(lengths):
        stop = start + 1
        while (
            stop < len(lengths)
            and (stop + 1 - start) * max(lengths[start : stop + 1]) <= _BATCH_TOKENS
        ):
            stop += 1
        padded.append(_padded(lengths[start:stop]))
        start = stop
    packed = [_packed([lengths[i] for i in bin_]) for bin_ in pack_best_fit(lengths, _BATCH_TOKENS)]
    seconds = {}
    for name, batches in (("padded", padded), ("packed", packed)):
        state = _state(_smollm2(), "bf16")
        seconds[name] = _time_steps(state, batches)
        del state
        _clear()
    yield _speed("gpu.packed_vs_random_batches", seconds, "packed", "padded")
    for name, batches in (("padded", padded), ("packed", packed)):
        held = sum(batch.input_ids_BT.numel() for batch in batches)
        yield Row(f"gpu.padding_share.{name}", 1 - sum(lengths) / held, "share of positions")


def _streaming() -> Iterator[Row]:
    """A model of 1.7 billion parameters in a third of the GPU memory that it takes."""
    shape = _large()
    calls: dict[str, list[float]] = {}
    weights = budget = peak = 0
    for name in ("resident", "streamed"):
        before = torch.cuda.memory_allocated()
        model = _build(shape)
        weights = sum(item.nbytes for item in model.parameters())
        budget = int(_STREAMED_SHARE * weights)
        if name == "streamed":
            model = model.cpu()
            torch.cuda.reset_peak_memory_stats()
            move_to_device(model, _CUDA, budget_bytes=budget)
        for tokens in (1, 2048):
            calls[f"{name}.{tokens}"] = _in_turns({"": _forward(model, tokens)})[""]
        peak = torch.cuda.max_memory_allocated() - before
        del model
        _clear()
    yield Row(
        "gpu.streamed_peak",
        peak / 2**20,
        f"MiB of GPU memory (budget: {budget / 2**20:.0f})",
        baseline="weights, MiB",
        baseline_value=weights / 2**20,
    )
    for tokens in (1, 2048):
        seconds = {name: calls[f"{name}.{tokens}"] for name in ("resident", "streamed")}
        yield _time(f"gpu.streamed_slowdown.{tokens}_tokens", seconds, "streamed", "resident")


def _forward(model: Decoder, tokens: int) -> Callable[[], Any]:
    ids = torch.arange(tokens, device=_CUDA)[None]

    @torch.inference_mode()
    def run() -> torch.Tensor:
        cache = KVCache(
            model.config, max_rows=1, max_tokens=tokens, dtype=torch.float32, device=_CUDA
        )
        return model.next_logits(ids, cache.add_rows(1), [tokens - 1])

    return run


def _in_turns(works: Mapping[str, Callable[[], Any]], *, calls: int = 1) -> dict[str, list[float]]:
    """Seconds of `calls` calls of each, over and over in turns, after a warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for repeat in range(_REPEATS + 2):
        for name, work in works.items():
            torch.cuda.synchronize()
            started = time.perf_counter()
            for _ in range(calls):
                work()
            torch.cuda.synchronize()
            if repeat >= 2:
                seconds[name].append((time.perf_counter() - started) / calls)
    return seconds


def _time_steps(state: TrainState, batches: list[MicroBatch]) -> list[float]:
    for _ in range(2):
        state.run_step(batches)
    torch.cuda.synchronize()
    return [state.run_step(batches).seconds for _ in range(_STEPS)]


def _time(row_id: str, seconds: Mapping[str, list[float]], mine: str, base: str) -> Row:
    """`mine`'s time over that of `base`."""
    return _ratio(row_id, seconds[mine], seconds[base], "x the time", base, seconds[base])


def _speed(row_id: str, seconds: Mapping[str, list[float]], mine: str, base: str) -> Row:
    """`mine`'s speed over that of `base`."""
    return _ratio(row_id, seconds[base], seconds[mine], "x the speed", base, seconds[base])


def _ratio(
    row_id: str,
    above: list[float],
    below: list[float],
    unit: str,
    baseline: str,
    baseline_seconds: list[float],
) -> Row:
    ratios = np.asarray(above) / np.asarray(below)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return Row(
        row_id,
        float(np.median(ratios)),
        unit,
        (float(low), float(high)),
        f"{baseline}, s",
        statistics.median(baseline_seconds),
    )


def _state(shape: ModelConfig, precision: str) -> TrainState:
    config = TrainConfig(num_steps=1000, precision=precision)  # type: ignore[arg-type]
    return TrainState(_build(shape), config, build_exchange(config.exchange), LocalTransport())


def _padded(lengths: list[int]) -> MicroBatch:
    ids_BT = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    labels_BT = torch.full_like(ids_BT, IGNORED)
    for row, length in enumerate(lengths):
        ids_BT[row, :length] = torch.randint(_VOCABULARY, (length,))
        labels_BT[row, : length - 1] = ids_BT[row, 1:length]
    return MicroBatch(ids_BT, labels_BT, sum(lengths), sum(lengths) - len(lengths))


def _packed(lengths: list[int]) -> MicroBatch:
    """One row of `_BATCH_TOKENS`, the rest of it padding."""
    rest = _BATCH_TOKENS - sum(lengths)
    documents = (*lengths, *([rest] if rest else []))
    ids_1T = torch.randint(_VOCABULARY, (1, _BATCH_TOKENS))
    labels_1T = ids_1T.roll(-1, 1)
    ends = np.cumsum(lengths) - 1
    labels_1T[0, ends] = IGNORED
    labels_1T[0, ends[-1] :] = IGNORED
    return MicroBatch(ids_1T, labels_1T, sum(lengths), sum(lengths) - len(lengths), documents)


def _build(shape: ModelConfig) -> Decoder:
    torch.manual_seed(0)
    with torch.device(_CUDA):
        model = Decoder(shape)
    return model.eval()


def _clear() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def _smollm2() -> ModelConfig:
    """SmolLM2-135M's sizes."""
    return build_shape(30, vocab_size=_VOCABULARY)


def _large() -> ModelConfig:
    """SmolLM2-1.7B's sizes."""
    return dataclasses.replace(
        _smollm2(),
        hidden_size=2048,
        intermediate_size=8192,
        num_layers=24,
        num_heads=32,
        num_kv_heads=32,
    )


_NOTES = f"""
- int8_linear_time: `int8_linear` over a bf16 product of the same sizes; 50 calls a repetition.
- decode_ms: SmolLM2-135M's sizes, one sequence, after a prompt of 512 tokens.
- training_speed: steps of 8 x 1024 tokens; fp32 without TF32; bf16 and fp16 under the range
  controller; times include the optimizer.
- packed_vs_random_batches: 400 documents of 16 to 2,048 tokens (lognormal), micro-batches of up to
  {_BATCH_TOKENS} tokens, bf16; packed rows run FlexAttention, padded ones flash attention.
- streamed: weights in fp32, {100 * _STREAMED_SHARE:.0f}% of their size as the budget of GPU memory,
  the others copied from pinned host memory in every forward.
"""
