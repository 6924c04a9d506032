"""The architecture of a decoder, read from and written as Hugging Face's `config.json`."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from r1ray.errors import ArtifactError
from r1ray.files import read_json

__all__ = ["CONFIG_NAME", "RECORD_NAME", "ModelConfig", "RopeConfig"]

CONFIG_NAME = "config.json"
RECORD_NAME = "r1ray.json"  # what Hugging Face's has no place for
Family = Literal["llama", "qwen2", "qwen3"]
_ARCHITECTURES: dict[Family, str] = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# Rope types, each with the parameters that it cannot do without.
ROPE_TYPES: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": (),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}
_MAX_LAYERS = 4096  # each is an object as soon as the model is described
_MAX_COUNT = 2**28
_COUNTS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "max_positions",
)


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: base frequency, scaling type and that scaling's parameters."""

    theta: float
    type: str = "default"
    parameters: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def depends_on_length(self) -> bool:
        """Whether a token's rotation depends on how long its sequence is."""
        return self.type in ("dynamic", "longrope")


@dataclass(frozen=True)
class ModelConfig:
    """Shape and variants of one decoder of the Llama, Qwen2 or Qwen3 family."""

    family: Family
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_embeddings: bool
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        for name in _COUNTS:
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ArtifactError(f"{name} is {value!r:.80}, not a whole number of at least 1")
            most = _MAX_LAYERS if name == "num_layers" else _MAX_COUNT
            if value > most:
                raise ArtifactError(f"{name} is {value!r:.80}, and no model has more than {most}")
        if self.head_dim % 2:
            raise ArtifactError(f"head_dim ({self.head_dim}) is odd; rotary pairs need it even")
        if self.num_heads % self.num_kv_heads:
            raise ArtifactError(
                f"num_attention_heads ({self.num_heads}) is not a multiple of "
                f"num_key_value_heads ({self.num_kv_heads})"
            )
        if self.rope.type not in ROPE_TYPES:
            raise ArtifactError(
                f"rope type {self.rope.type!r} is not one of {', '.join(ROPE_TYPES)}"
            )
        for name in ROPE_TYPES[self.rope.type]:
            value = self.rope.parameters.get(name)
            if name.endswith("_factor") and self.rope.type == "longrope":
                if not isinstance(value, list) or len(value) != self.head_dim // 2:
                    raise ArtifactError(
                        f"rope {name} is {value!r}, not a list of {self.head_dim // 2} numbers"
                    )
            elif not isinstance(value, int | float) or value <= 0:
                raise ArtifactError(
                    f"rope type {self.rope.type!r} needs a positive {name}, got {value!r}"
                )

    @property
    def max_context(self) -> int:
        """Tokens of the longest sequence: dynamic scaling goes beyond `max_positions`."""
        if self.rope.type == "dynamic":
            return int(self.max_positions * self.rope.parameters["factor"])
        return self.max_positions

    @property
    def even_context(self) -> int | None:
        """Tokens up to which rotations do not depend on a row's length; None: they never do."""
        if not self.rope.depends_on_length:
            return None
        if self.rope.type == "longrope":
            trained = self.rope.parameters.get("original_max_position_embeddings")
            return int(trained or self.max_positions)
        return self.max_positions

    def with_context(self, kind: Literal["yarn", "dynamic"], factor: float) -> "ModelConfig":
        """The configuration for `factor` times as many positions.

        Raises:
            ArtifactError: its positions are scaled already.
        """
        if self.rope.type != "default":
            raise ArtifactError(
                f"base.context: the checkpoint scales its positions already ({self.rope.type}); "
                "leave base.context out"
            )
        parameters: dict[str, Any] = {"factor": factor}
        if kind == "yarn":
            parameters["original_max_position_embeddings"] = self.max_positions
        rope = RopeConfig(self.rope.theta, kind, parameters)
        positions = self.max_positions if kind == "dynamic" else int(self.max_positions * factor)
        return dataclasses.replace(self, rope=rope, max_positions=positions)

    @classmethod
    def load(cls, model_dir: str | Path) -> "ModelConfig":
        """The configuration in `model_dir/config.json`.

        Raises:
            ArtifactError: no such file, not JSON, or a model that r1ray cannot run.
        """
        path = Path(model_dir) / CONFIG_NAME
        raw = read_json(path)
        try:
            return cls.from_hf(raw)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise ArtifactError(
                f"{path}: a key is missing or of the wrong type ({error!r})"
            ) from error
        except ArtifactError as error:
            raise ArtifactError(f"{path}: {error}") from error

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> "ModelConfig":
        """The configuration in the mapping of a `config.json` of any transformers release."""
        family = raw["model_type"]
        if not isinstance(family, str) or family not in _ARCHITECTURES:
            raise ArtifactError(
                f"model_type {family!r} is not one of {', '.join(sorted(_ARCHITECTURES))}"
            )
        if raw.get("hidden_act", "silu") != "silu":
            raise ArtifactError(f"hidden_act {raw['hidden_act']!r} is not silu")
        if raw.get("use_sliding_window"):
            raise ArtifactError("use_sliding_window: true is not supported; only full attention is")
        num_heads = raw["num_attention_heads"]
        eos = raw.get("eos_token_id")
        attention_bias = bool(raw.get("attention_bias", False))
        return cls(
            family=family,
            vocab_size=raw["vocab_size"],
            hidden_size=raw["hidden_size"],
            intermediate_size=raw["intermediate_size"],
            num_layers=raw["num_hidden_layers"],
            num_heads=num_heads,
            num_kv_heads=raw.get("num_key_value_heads") or num_heads,
            head_dim=raw.get("head_dim") or raw["hidden_size"] // max(1, num_heads),
            max_positions=raw.get("max_position_embeddings", 2048),
            rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            rope=_read_rope(raw),
            tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
            qkv_bias=family == "qwen2" or attention_bias,
            output_bias=family != "qwen2" and attention_bias,
            mlp_bias=bool(raw.get("mlp_bias", False)),
            qk_norm=family == "qwen3",
            eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
            bos_token_id=raw.get("bos_token_id"),
            pad_token_id=raw.get("pad_token_id"),
        )

    def to_hf(self) -> dict[str, Any]:
        """The mapping that transformers 4 and 5 both read as this model's `config.json`."""
        scaling = {"rope_type": self.rope.type, **self.rope.parameters}
        raw: dict[str, Any] = {
            "architectures": [_ARCHITECTURES[self.family]],
            "model_type": self.family,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_positions,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope.theta,
            "rope_scaling": None if self.rope.type == "default" else scaling,
            "rope_parameters": {"rope_theta": self.rope.theta, **scaling},
            "tie_word_embeddings": self.tie_embeddings,
            "bos_token_id": self.bos_token_id,
            "pad_token_id": self.pad_token_id,
            "eos_token_id": list(self.eos_token_ids) or None,
            "torch_dtype": "float32",
        }
        if self.family != "qwen2":
            raw["attention_bias"] = self.qkv_bias
        if self.family == "llama":
            raw["mlp_bias"] = self.mlp_bias
        return raw


def _read_rope(raw: Mapping[str, Any]) -> RopeConfig:
    """Both forms: `rope_theta` + `rope_scaling` (transformers 4) and `rope_parameters` (5)."""
    merged = dict(raw.get("rope_scaling") or {})
    merged.update(raw.get("rope_parameters") or {})
    theta = merged.pop("rope_theta", None) or raw.get("rope_theta") or 10_000.0
    legacy_type = merged.pop("type", None)
    rope_type = merged.pop("rope_type", None) or legacy_type or "default"
    if merged.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ArtifactError("partial_rotary_factor other than 1.0 is not supported")
    if "original_max_position_embeddings" in raw:  # has priority, as in transformers
        merged["original_max_position_embeddings"] = raw["original_max_position_embeddings"]
    return RopeConfig(theta=float(theta), type=rope_type, parameters=merged)
