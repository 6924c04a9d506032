"""Low-rank adapters: a linear layer's weight W stays, and s·B·A beside it is trained.

1. `attach_adapters` gives every linear layer in the blocks an A, random, and a B of zeros: the
   model computes what it did. All other parameters are frozen.
2. `merge_adapters` adds s·B·A to W and takes the adapters away: a plain model.

Adapters of an unfinished training lie beside the weights, in `adapters.safetensors`, as gates do.

Price: rank · (in + out) trained parameters a layer, and as many products a token.

Source: Hu et al. 2021, arXiv:2106.09685.

Shape legend: O outputs, I inputs, R rank.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from r1ray.errors import ArtifactError
from r1ray.models.decoder import Decoder
from r1ray.models.quantization import list_linears

__all__ = [
    "ADAPTERS_NAME",
    "LoraLinear",
    "attach_adapters",
    "is_adapter",
    "load_adapters",
    "merge_adapters",
    "save_adapters",
]

ADAPTERS_NAME = "adapters.safetensors"
_PARTS = (".lora_a", ".lora_b")
_SCALE = "scale"


class LoraLinear(nn.Linear):
    """A linear layer with an adapter; weight and bias are those of the layer in whose place it is.

    Args:
        scale: of the change B·A.
    """

    def __init__(self, linear: nn.Linear, rank: int, scale: float) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would allocate another weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.scale = scale
        a_RI = torch.randn(rank, linear.in_features) * linear.in_features**-0.5
        self.lora_a = nn.Parameter(a_RI.to(linear.weight))
        self.lora_b = nn.Parameter(linear.weight.new_zeros(linear.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        change = F.linear(F.linear(x, self.lora_a), self.lora_b)
        return F.linear(x, self.weight, self.bias) + self.scale * change

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The plain layer that computes the same; the weight is changed in place."""
        change_OI = self.lora_b.float() @ self.lora_a.float()
        self.weight.add_(change_OI.to(self.weight.dtype), alpha=self.scale)
        has_bias = self.bias is not None
        linear = nn.Linear(self.in_features, self.out_features, bias=has_bias, device="meta")
        linear.weight, linear.bias = self.weight, self.bias
        return linear


def attach_adapters(model: Decoder, *, rank: int, alpha: float) -> None:
    """Give every linear layer of the blocks an adapter; nothing else is trained any more.

    A is drawn from torch's global generator.
    """
    model.requires_grad_(False)
    for module, name, linear in list(list_linears(model)):
        setattr(module, name, LoraLinear(linear, rank, alpha / rank))


def merge_adapters(model: Decoder) -> None:
    """Add every adapter's change to its layer's weight, in place; all parameters train again."""
    for module, name, linear in list(list_linears(model)):
        if isinstance(linear, LoraLinear):
            setattr(module, name, linear.merged())
    model.requires_grad_(True)


def is_adapter(name: str) -> bool:
    """Whether `name`, of a state dict, is of an adapter."""
    return name.endswith(_PARTS)


def save_adapters(model: Decoder, path: Path) -> None:
    """Write the adapters of `model` into the model directory `path`; none are there if it has none.

    `load_adapters` reads them.
    """
    tensors = {
        name: tensor.detach().contiguous()
        for name, tensor in model.state_dict().items()
        if is_adapter(name)
    }
    if not tensors:
        (path / ADAPTERS_NAME).unlink(missing_ok=True)
        return
    scales = {item.scale for item in model.modules() if isinstance(item, LoraLinear)}
    [scale] = scales
    save_file(tensors, path / ADAPTERS_NAME, metadata={"format": "pt", _SCALE: repr(scale)})


def load_adapters(model: Decoder, path: Path) -> None:
    """Attach the adapters that lie in the model directory `path`, if any do.

    Raises:
        ArtifactError: they are damaged, or do not fit the model.
    """
    file = path / ADAPTERS_NAME
    if not file.is_file():
        return
    try:
        with safe_open(file, framework="pt") as stream:
            scale = float((stream.metadata() or {})[_SCALE])
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ArtifactError(f"{file}: no readable adapters ({error})") from error
    ranks = {tensor.shape[0] for name, tensor in tensors.items() if name.endswith(_PARTS[0])}
    if len(ranks) != 1:
        raise ArtifactError(f"{file}: adapters of ranks {sorted(ranks)}, where there is to be one")
    [rank] = ranks
    attach_adapters(model, rank=rank, alpha=scale * rank)
    expected = {name: tensor for name, tensor in model.state_dict().items() if is_adapter(name)}
    for name in sorted(expected.keys() | tensors.keys()):
        found, wanted = (
            tuple(of[name].shape) if name in of else None for of in (tensors, expected)
        )
        if found != wanted:
            raise ArtifactError(
                f"{file}: {name} has the shape {found}, and the model's has {wanted}; remove it"
            )
    model.load_state_dict(tensors, strict=False)
