"""The gates of a decoder's block-sparse attention: attached to its layers, and in their own file.

A model directory with gates stays one that others can read: they lie beside its weights, in
`gates.safetensors`, in float32 whatever the weights are.
"""

from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from r1ray.config.serving import AttentionKind
from r1ray.errors import ArtifactError, ConfigError
from r1ray.models.decoder import Attention, Decoder
from r1ray.ops.block_gate import BlockGate, BoundsGate
from r1ray.ops.block_selection import BLOCK

__all__ = [
    "GATES_NAME",
    "attach_gates",
    "detach_gates",
    "is_gate",
    "list_attentions",
    "load_gates",
    "save_gates",
    "set_attention",
]

GATES_NAME = "gates.safetensors"
_PART = ".self_attn.gate."


def attach_gates(model: Decoder) -> None:
    """Give every layer a gate, untrained, where it has none."""
    config = model.config
    for attention in list_attentions(model):
        if attention.gate is None:
            gate = BlockGate(config.num_heads, config.num_kv_heads, config.head_dim)
            attention.gate = gate.to(model.model.norm.weight.device)


def set_attention(model: Decoder, kind: AttentionKind) -> None:
    """Make `model` attend densely over its cache, or to chosen blocks.

    Args:
        kind: auto is sparse where there are gates; sparse takes bounds where there are none.
    Raises:
        ConfigError: it is to be sparse, but its rotary positions depend on the length.
    """
    if kind == "dense":
        detach_gates(model)
    if kind != "sparse":
        return
    if model.config.rope.depends_on_length:
        raise ConfigError(
            f"serve.attention: sparse does not go with rotary positions of type "
            f"{model.config.rope.type!r}, which turn with a sequence's length; use dense"
        )
    for attention in list_attentions(model):
        if attention.gate is None:
            attention.gate = BoundsGate(model.config.head_dim)


def detach_gates(model: Decoder) -> bool:
    """Take the gates away; returns whether there were any."""
    attentions = list_attentions(model)
    had_gates = any(attention.gate is not None for attention in attentions)
    for attention in attentions:
        attention.gate = None
    return had_gates


def list_attentions(model: Decoder) -> list[Attention]:
    """The attention of every layer, in their order."""
    found = [block.self_attn for block in model.model.layers]
    assert all(isinstance(item, Attention) for item in found)
    return found  # type: ignore[return-value]


def is_gate(name: str) -> bool:
    """Whether `name`, of a state dict, is of a gate."""
    return _PART in name


def save_gates(model: Decoder, path: Path) -> None:
    """Write the gates of `model` into the model directory `path`; none are there if it has none."""
    tensors = {
        name: tensor.detach().contiguous()
        for name, tensor in model.state_dict().items()
        if is_gate(name)
    }
    if tensors:
        save_file(tensors, path / GATES_NAME, metadata={"format": "pt", "block": str(BLOCK)})
    else:
        (path / GATES_NAME).unlink(missing_ok=True)


def load_gates(model: Decoder, path: Path) -> None:
    """Attach the gates that lie in the model directory `path`, if any do.

    Raises:
        ArtifactError: they are damaged, of blocks of another size, or do not fit the model.
    """
    file = path / GATES_NAME
    if not file.is_file():
        return
    try:
        with safe_open(file, framework="pt") as stream:
            block = (stream.metadata() or {}).get("block")
            tensors: dict[str, Tensor] = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{file}: cannot be read as safetensors ({error})") from error
    if block != str(BLOCK):
        raise ArtifactError(f"{file}: gates are of blocks of {block} tokens, not {BLOCK}")
    attach_gates(model)
    expected = {name: tensor for name, tensor in model.state_dict().items() if is_gate(name)}
    for name in sorted(expected.keys() | tensors.keys()):
        found, wanted = (
            f"{of[name].dtype} of shape {tuple(of[name].shape)}" if name in of else "missing"
            for of in (tensors, expected)
        )
        if found != wanted:
            raise ArtifactError(
                f"{file}: {name} is {found}, and the model's is {wanted}; train gates for this "
                "model again"
            )
    model.load_state_dict(tensors, strict=False, assign=True)
