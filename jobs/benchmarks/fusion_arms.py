"""The arms of `jobs.bench_fusion`: how they are made equal, and one training run of one of them.

All arms see the same patches, and none has more parameters or work than the others: early fusion
runs its patches through the decoder as well, so mid and late run their encoder's blocks several
times instead, and the encoder's MLP is as wide as makes up for what the fusion itself takes.
"""

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from jobs.benchmarks.fusion_data import (
    IMAGE_SIZE,
    QUESTION_WORDS,
    TRAINING_WORDS,
    VOCABULARY,
    Examples,
)
from r1ray.config.fusion import FusionConfig, FusionType
from r1ray.data.batch_set import IGNORED
from r1ray.data.scenes import GRID
from r1ray.models import Decoder, ModelConfig
from r1ray.models.base import count_parameters
from r1ray.models.config import RopeConfig
from r1ray.models.fusion import ImageContext
from r1ray.models.fusion_file import attach_fusion

__all__ = [
    "ARMS",
    "FUSIONS",
    "MAX_FLOP_SPREAD",
    "MAX_PARAMETER_SPREAD",
    "REGIMES",
    "Arm",
    "Regime",
    "RunSize",
    "answer",
    "build_decoder",
    "fusion_of",
    "judge_texts",
    "measure_arms",
    "pretrain",
    "train_arm",
]

Arm = Literal["early", "mid", "late", "question_only", "image_only"]
Regime = Literal["frozen", "trained"]
FUSIONS: tuple[FusionType, ...] = ("early", "mid", "late")
ARMS: tuple[Arm, ...] = (*FUSIONS, "question_only", "image_only")
REGIMES: tuple[Regime, ...] = ("frozen", "trained")
MAX_PARAMETER_SPREAD, MAX_FLOP_SPREAD = 0.03, 0.05
_WARMUP_SHARE, _WEIGHT_DECAY = 0.05, 0.01
_EVALUATED_AT_ONCE = 500


@dataclass(frozen=True)
class RunSize:
    """How much is trained and asked.

    Attributes:
        batch: pictures of a step.
        questions: about each picture in training.
        text_steps, text_batch, text_questions: of the decoder's own training, on scenes in words.
    """

    steps: int
    batch: int
    train_examples: int
    test_examples: int
    text_steps: int
    text_batch: int
    questions: int = 4
    text_questions: int = 8
    text_learning_rate: float = 2e-3


def decoder_config() -> ModelConfig:
    """A Llama of 0.3 million parameters over the words."""
    return ModelConfig(
        family="llama",
        vocab_size=len(VOCABULARY),
        hidden_size=96,
        intermediate_size=256,
        num_layers=3,
        num_heads=3,
        num_kv_heads=3,
        head_dim=32,
        max_positions=512,
        rms_norm_eps=1e-5,
        rope=RopeConfig(theta=10_000.0),
        tie_embeddings=True,
    )


def build_decoder(seed: int) -> Decoder:
    """Untrained; embeddings as small as a tied head wants them."""
    torch.manual_seed(seed)
    model = Decoder(decoder_config())
    torch.nn.init.normal_(model.model.embed_tokens.get_parameter("weight"), std=0.05)
    return model


_ENCODER: dict[str, Any] = {
    "image_size": IMAGE_SIZE,
    "patch_size": IMAGE_SIZE // GRID,
    "encoder_width": 96,
    "encoder_heads": 3,
    "encoder_layers": 2,
}
_FUSIONS = {  # `measure_arms` says how equal they are
    "early": FusionConfig(type="early", encoder_rounds=1, encoder_mlp=256, **_ENCODER),
    "mid": FusionConfig(type="mid", encoder_rounds=4, encoder_mlp=88, **_ENCODER),
    "late": FusionConfig(type="late", encoder_rounds=3, encoder_mlp=232, width=64, **_ENCODER),
}


def fusion_of(arm: Arm) -> FusionConfig:
    """The arm's fusion; controls have early's."""
    return _FUSIONS.get(arm, _FUSIONS["early"])


def measure_arms() -> dict[str, dict[str, Any]]:
    """Parameters and FLOP of a forward of every arm: of one question, and as in training.

    Raises:
        AssertionError: an arm differs from early by more than it may.
    """
    found: dict[str, dict[str, Any]] = {}
    for arm in FUSIONS:
        config = fusion_of(arm)
        parameters, flop = _measure(config, QUESTION_WORDS)
        found[arm] = {
            "parameters": parameters,
            "flop": flop,
            "training_flop": _measure(config, TRAINING_WORDS)[1],
            "encoder_layers": config.encoder_layers,
            "encoder_rounds": config.encoder_rounds,
            "encoder_mlp": config.encoder_mlp,
        }
    reference = found["early"]
    for values in found.values():
        for key, most in (
            ("parameters", MAX_PARAMETER_SPREAD),
            ("flop", MAX_FLOP_SPREAD),
            ("training_flop", MAX_FLOP_SPREAD),
        ):
            values[f"{key}_spread"] = spread = values[key] / reference[key] - 1
            assert abs(spread) <= most, f"{key} differ by {spread:.1%}, above {most:.0%}"
    return found


def _measure(config: FusionConfig, words: int) -> tuple[int, int]:
    """(parameters of decoder and fusion, FLOP of a forward of a picture and so many words)."""
    with torch.device("meta"):
        model = Decoder(decoder_config())
        attach_fusion(model, config)
        ids_1T = torch.zeros(1, words, dtype=torch.long)
        pixels = torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            _hidden(model, pixels, ids_1T)
    return count_parameters(model), counter.get_total_flops()


def _hidden(model: Decoder, pixels_B3SS: Tensor, ids_BT: Tensor) -> Tensor:
    """Final states [B, T, D] of the words, which an image stands before."""
    assert model.fusion is not None
    memory_BPF = model.fusion.remember(pixels_B3SS)
    places_B1 = torch.zeros(len(ids_BT), 1, dtype=torch.long, device=ids_BT.device)
    context = ImageContext(memory_BPF[:, None], places_B1, places_B1 + 2**31)
    taken = model.fusion.config.num_image_tokens
    return model.hidden(F.pad(ids_BT, (taken, 0), value=-1), images=context)[:, taken:]


def pretrain(
    size: RunSize, seed: int, texts: tuple[Tensor, Tensor], device: torch.device
) -> Decoder:
    """A decoder that answers questions about scenes in words.

    Args:
        texts: as `write_texts` has them.
    """
    model = build_decoder(seed).to(device).train()
    ids_NL, labels_NL = (part.to(device) for part in texts)
    optimizer, steps = _build_optimizer(model, size.text_learning_rate), size.text_steps
    for step, chosen in enumerate(_draw(len(ids_NL), size.text_batch, steps, seed, device)):
        labels_BL = labels_NL[chosen]
        is_target_BL = labels_BL != IGNORED
        logits_PV = model.lm_head(model.hidden(ids_NL[chosen])[is_target_BL])
        loss = F.cross_entropy(logits_PV, labels_BL[is_target_BL])
        _update(optimizer, loss, size.text_learning_rate, step, steps)
        if step % 200 == 199:
            share = (logits_PV.argmax(-1) == labels_BL[is_target_BL]).float().mean()
            print(f"  text step {step + 1}: loss {loss.item():.3f}, right {float(share):.3f}")
    return model.eval()


@torch.inference_mode()
def judge_texts(model: Decoder, texts: tuple[Tensor, Tensor]) -> float:
    """The share of questions about scenes in words that are answered right."""
    right: list[bool] = []
    device = model.model.norm.weight.device
    for ids_BL, labels_BL in zip(
        *(part.to(device).split(_EVALUATED_AT_ONCE) for part in texts), strict=True
    ):
        is_target_BL = labels_BL != IGNORED
        answers_P = model.lm_head(model.hidden(ids_BL)[is_target_BL]).argmax(-1)
        right += (answers_P == labels_BL[is_target_BL]).tolist()
    return sum(right) / len(right)


def train_arm(
    arm: Arm,
    regime: Regime,
    learning_rate: float,
    seed: int,
    size: RunSize,
    decoder: Decoder,
    train: Examples,
    asked: Mapping[str, Examples],
) -> dict[str, Any]:
    """Train one arm, which `decoder` is part of from then on.

    Args:
        asked: sets of questions.
    Returns:
        By set, whether each answer is right; losses, seconds and device.
    """
    started = time.perf_counter()
    device = train.ids_NT.device
    attach_fusion(decoder, fusion_of(arm), seed=seed)
    assert decoder.fusion is not None
    decoder.train().requires_grad_(regime == "trained")
    decoder.fusion.requires_grad_(True)
    optimizer = _build_optimizer(decoder, learning_rate)
    losses = []
    for step, chosen in enumerate(_draw(len(train), size.batch, size.steps, seed, device)):
        loss = F.cross_entropy(*answer(decoder, arm, train, chosen))
        _update(optimizer, loss, learning_rate, step, size.steps)
        if step % 50 == 49:
            losses.append(loss.item())
    decoder.eval()
    right = {name: _ask(decoder, arm, examples) for name, examples in asked.items()}
    seconds = time.perf_counter() - started
    return {"right": right, "losses": losses, "seconds": seconds, "device": str(device)}


@torch.inference_mode()
def _ask(decoder: Decoder, arm: Arm, examples: Examples) -> list[bool]:
    """Whether each answer is right."""
    right: list[bool] = []
    numbers = torch.arange(len(examples), device=examples.ids_NT.device)
    for chosen in numbers.split(_EVALUATED_AT_ONCE):
        logits_PV, labels_P = answer(decoder, arm, examples, chosen)
        right += (logits_PV.argmax(-1) == labels_P).tolist()
    return right


def answer(decoder: Decoder, arm: Arm, examples: Examples, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """(logits [P, V], right answers [P]), row by row; controls do not see the other half."""
    pixels, ids_BT = examples.pixels_N3SS[chosen], examples.ids_NT[chosen]
    labels_BT = examples.labels_NT[chosen]
    if arm == "question_only":
        pixels = torch.full_like(pixels, 128)
    is_answered_BT = labels_BT != IGNORED
    if arm == "image_only":  # without words there is one answer: to the question of the test
        is_answered_BT &= is_answered_BT.cumsum(1) == 1
        ids_BT = torch.zeros_like(ids_BT)
    hidden_BTD = _hidden(decoder, pixels, ids_BT)
    if arm == "image_only":  # nor where a question ends, which says how long it is
        hidden_BTD = hidden_BTD[:, :1].expand_as(hidden_BTD)
    return decoder.lm_head(hidden_BTD[is_answered_BT]), labels_BT[is_answered_BT]


def _draw(
    num_examples: int, batch: int, steps: int, seed: int, device: torch.device
) -> Iterator[Tensor]:
    """Numbers of the examples of each step: all of them in a new order again and again."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        while len(left) < batch:
            left = torch.cat([left, torch.randperm(num_examples, generator=generator)])
        yield left[:batch].to(device)
        left = left[batch:]


def _build_optimizer(model: Decoder, learning_rate: float) -> torch.optim.AdamW:
    parameters = [item for item in model.parameters() if item.requires_grad]
    return torch.optim.AdamW(
        parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=_WEIGHT_DECAY
    )


def _update(optimizer: torch.optim.AdamW, loss: Tensor, peak: float, step: int, steps: int) -> None:
    """One step at a rate that warms up to `peak` and falls to nothing along a cosine."""
    warmup = max(1, int(_WARMUP_SHARE * steps))
    done = max(0.0, (step + 1 - warmup) / max(1, steps - warmup))
    rate = peak * min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * done))
    [group] = optimizer.param_groups
    group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
    optimizer.step()
