"""The `evaluate` stage: base, tuned and quantized model on the same problems, text and machine."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from r1ray.compression.export import weight_bytes
from r1ray.config.schema import EvaluateConfig, ImageQuestionsConfig
from r1ray.data.reasoning import Problem
from r1ray.data.texts import read_english
from r1ray.evaluation.accuracy import (
    Answer,
    Proportion,
    answer_problems,
    paired_difference,
    proportion,
)
from r1ray.evaluation.image_accuracy import (
    ImageQuestion,
    answer_image_questions,
    read_image_questions,
)
from r1ray.evaluation.latency import Latency, measure_latency
from r1ray.evaluation.perplexity import measure_perplexity
from r1ray.evaluation.record import describe_circumstances, write_json
from r1ray.models.checkpoint import load_model
from r1ray.models.tokenizer import Tokenizer

__all__ = ["EVALUATION_NAME", "ModelResult", "evaluate_models"]

EVALUATION_NAME = "evaluation.json"
REPLIES_NAME = "replies.jsonl"


@dataclass(frozen=True)
class ModelResult:
    """Everything measured on one model.

    Attributes:
        accuracy: over all problems; by_family: per family.
        mentions_answer: share of replies whose last line holds the answer in whatever form.
    """

    name: str
    accuracy: Proportion
    by_family: dict[str, Proportion]
    mentions_answer: Proportion
    perplexity: float
    latency: Latency
    weight_bytes: int


def evaluate_models(
    config: EvaluateConfig,
    models: dict[str, Path],
    problems: Sequence[Problem],
    system_prompt: str,
    out_dir: Path,
    on_problem: Callable[[str, int], None] = lambda *_: None,
) -> dict[str, Any]:
    """Measure every model of `models` (name -> directory); writes figures and replies to `out_dir`.

    Args:
        models: `base`, `tuned`, and what was quantized, under its name.
        on_problem: called with the model's name and the number of problems it has answered.
    """
    _, _, quantized = models
    text = read_english()
    questions = [] if config.images is None else read_image_questions(config.images)
    results, correct, images = {}, {}, {}
    with (out_dir / REPLIES_NAME).open("w", encoding="utf-8") as stream:
        for name, directory in models.items():
            result, answers = _evaluate(
                name, directory, config, problems, system_prompt, text, on_problem
            )
            results[name] = asdict(result)
            correct[name] = [answer.is_correct for answer in answers]
            if config.images is not None:
                images[name] = _ask_about_images(directory, config, config.images, questions)
            for answer in answers:
                record = {"model": name, **asdict(answer)}
                stream.write(json.dumps(record, ensure_ascii=False) + "\n")
    evaluation = {
        "models": results,
        "gain": paired_difference(correct["tuned"], correct["base"]),
        "drop": paired_difference(correct["tuned"], correct[quantized]),
        "circumstances": describe_circumstances(),
    }
    if images:
        evaluation["images"] = images
    write_json(out_dir / EVALUATION_NAME, evaluation)
    return {name: result["accuracy"]["value"] for name, result in results.items()}


def _ask_about_images(
    directory: Path,
    config: EvaluateConfig,
    images: ImageQuestionsConfig,
    questions: list[ImageQuestion],
) -> dict[str, Any]:
    """Accuracy on questions about images: of all, and by their kind."""
    answers = answer_image_questions(
        load_model(directory),
        Tokenizer(directory),
        questions,
        images,
        max_new_tokens=config.max_new_tokens,
        max_concurrency=config.max_concurrency,
    )
    kinds = sorted({answer.kind for answer in answers})
    return {
        "accuracy": asdict(proportion([answer.is_correct for answer in answers])),
        "by_kind": {
            kind: asdict(proportion([a.is_correct for a in answers if a.kind == kind]))
            for kind in kinds
        },
    }


def _evaluate(
    name: str,
    directory: Path,
    config: EvaluateConfig,
    problems: Sequence[Problem],
    system_prompt: str,
    text: str,
    on_problem: Callable[[str, int], None],
) -> tuple[ModelResult, list[Answer]]:
    model, tokenizer = load_model(directory), Tokenizer(directory)
    answers = answer_problems(
        model,
        tokenizer,
        problems,
        system_prompt,
        max_new_tokens=config.max_new_tokens,
        max_concurrency=config.max_concurrency,
        on_finish=lambda finished: on_problem(name, finished),
    )
    families = sorted({answer.family for answer in answers})
    result = ModelResult(
        name=name,
        accuracy=proportion([answer.is_correct for answer in answers]),
        by_family={
            family: proportion([a.is_correct for a in answers if a.family == family])
            for family in families
        },
        mentions_answer=proportion([answer.mentions_answer for answer in answers]),
        perplexity=measure_perplexity(
            model,
            tokenizer,
            text,
            max_tokens=config.perplexity_tokens,
            window=config.perplexity_window,
        ),
        latency=measure_latency(model, new_tokens=config.latency_tokens),
        weight_bytes=weight_bytes(directory),
    )
    return result, answers
