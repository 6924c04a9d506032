"""A smaller decoder cut out of a larger one: chosen layers, and the strongest channels of each.

1. Layers are taken as they are listed.
2. Of an MLP, the neurons with the largest product of the norms of their three weights are kept.
3. Of attention, whole groups (a key/value head and its queries) are kept, by the norm of what they
   write (o_proj).
4. Of the residual stream, the channels with the largest embedding are kept, everywhere the same.

What is kept keeps its order and its weights, so the student starts close to its teacher, and the
tokenizer stays the same. Price: one pass over the weights.

Source: structured pruning by weight magnitude, as in Minitron, arXiv:2407.14679.
"""

import dataclasses

import torch
from torch import Tensor, nn

from r1ray.config.schema import StudentConfig
from r1ray.errors import ConfigError
from r1ray.models.config import ModelConfig
from r1ray.models.decoder import Attention, Block, Decoder

__all__ = ["build_student", "plan_student"]


def plan_student(teacher: ModelConfig, config: StudentConfig) -> ModelConfig:
    """The student's shape.

    Raises:
        ConfigError: it is not smaller than the teacher in what it names.
    """
    limits = {
        "hidden_size": (config.hidden_size, teacher.hidden_size),
        "intermediate_size": (config.intermediate_size, teacher.intermediate_size),
        "num_kv_heads": (config.num_kv_heads, teacher.num_kv_heads),
    }
    for name, (wanted, limit) in limits.items():
        if wanted is not None and wanted > limit:
            raise ConfigError(
                f"student.{name} ({wanted}) is above the base model's {limit}; lower it"
            )
    if config.layers is not None and max(config.layers) >= teacher.num_layers:
        raise ConfigError(
            f"student.layers names layer {max(config.layers)}, but the base model's last one is "
            f"{teacher.num_layers - 1}"
        )
    num_kv_heads = config.num_kv_heads or teacher.num_kv_heads
    return dataclasses.replace(
        teacher,
        num_layers=teacher.num_layers if config.layers is None else len(config.layers),
        hidden_size=config.hidden_size or teacher.hidden_size,
        intermediate_size=config.intermediate_size or teacher.intermediate_size,
        num_kv_heads=num_kv_heads,
        num_heads=teacher.num_heads // teacher.num_kv_heads * num_kv_heads,
    )


@torch.no_grad()
def build_student(teacher: Decoder, config: StudentConfig) -> Decoder:
    """A new decoder with copies of the kept weights of `teacher`, which stays as it is.

    Raises:
        ConfigError: as `plan_student` has it.
    """
    shape = plan_student(teacher.config, config)
    student = Decoder(shape).to(teacher.model.norm.weight)
    embedding = teacher.model.embed_tokens.get_parameter("weight")
    channels = _strongest(embedding.norm(dim=0), shape.hidden_size)
    student.model.embed_tokens.get_parameter("weight").copy_(embedding[:, channels])
    student.model.norm.weight.copy_(teacher.model.norm.weight[channels])
    if not shape.tie_embeddings:
        head = teacher.lm_head.get_parameter("weight")
        student.lm_head.get_parameter("weight").copy_(head[:, channels])
    layers = range(teacher.config.num_layers) if config.layers is None else config.layers
    for target, index in zip(student.model.layers, layers, strict=True):
        source = teacher.model.layers[index]
        assert isinstance(source, Block)
        assert isinstance(target, Block)
        _copy_block(source, target, channels)
    return student.eval()


def _copy_block(source: Block, target: Block, channels: Tensor) -> None:
    mlp = source.mlp
    strength = (
        mlp.gate_proj.weight.norm(dim=1)
        * mlp.up_proj.weight.norm(dim=1)
        * mlp.down_proj.weight.norm(dim=0)
    )
    neurons = _strongest(strength, target.mlp.gate_proj.out_features)
    groups = _strongest_groups(source.self_attn, target.self_attn.config.num_kv_heads)
    head_dim = source.self_attn.config.head_dim
    queries_per_group = source.self_attn.config.num_heads // source.self_attn.config.num_kv_heads
    keys = _expand(groups, head_dim)
    queries = _expand(groups, queries_per_group * head_dim)
    _copy(source.mlp.gate_proj, target.mlp.gate_proj, neurons, channels)
    _copy(source.mlp.up_proj, target.mlp.up_proj, neurons, channels)
    _copy(source.mlp.down_proj, target.mlp.down_proj, channels, neurons)
    _copy(source.self_attn.q_proj, target.self_attn.q_proj, queries, channels)
    _copy(source.self_attn.k_proj, target.self_attn.k_proj, keys, channels)
    _copy(source.self_attn.v_proj, target.self_attn.v_proj, keys, channels)
    _copy(source.self_attn.o_proj, target.self_attn.o_proj, channels, queries)
    if source.self_attn.config.qk_norm:
        target.self_attn.q_norm.weight.copy_(source.self_attn.q_norm.weight)
        target.self_attn.k_norm.weight.copy_(source.self_attn.k_norm.weight)
    target.input_layernorm.weight.copy_(source.input_layernorm.weight[channels])
    target.post_attention_layernorm.weight.copy_(source.post_attention_layernorm.weight[channels])


def _copy(source: nn.Linear, target: nn.Linear, rows: Tensor, columns: Tensor) -> None:
    target.weight.copy_(source.weight[rows][:, columns])
    if source.bias is not None:
        target.bias.copy_(source.bias[rows])


def _strongest(strength: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest, ascending."""
    return strength.topk(count).indices.sort().values


def _strongest_groups(attention: Attention, count: int) -> Tensor:
    written = attention.o_proj.weight  # [D, groups x queries of a group x H]
    per_group = written.view(written.shape[0], attention.config.num_kv_heads, -1)
    return _strongest(per_group.norm(dim=(0, 2)), count)


def _expand(groups: Tensor, size: int) -> Tensor:
    """Indices of the rows of these groups, `size` each."""
    return (groups[:, None] * size + torch.arange(size)).flatten()
