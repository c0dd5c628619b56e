"""Blockwise NormalFloat quantisation: levels, packing, and the linear layer. Imported late.

Q(W) = levels[index] * scale, a scale per block of consecutive weights (row by row), the last block padded with zeros.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    import transformers


def normal_levels(bits: int) -> torch.Tensor:
    """Return the 2**bits levels of NormalFloat, (2**bits,) float64, ascending, with -1, 0 and 1 (QLoRA, eq. 4, appendix E).

    Quantiles of N(0, 1) at even distances: 2**(bits - 1) positive ones and, since only one zero is needed, one negative
    less, divided by the largest. `delta` is the paper's: the mean of 1/32 and 1/30 for 4 bits.
    """
    half = 2 ** (bits - 1)
    delta = (1 / (4 * half) + 1 / (4 * half - 2)) / 2
    quantiles = [torch.special.ndtri(torch.linspace(0.5, 1 - delta, n, dtype=torch.float64)) for n in (half, half + 1)]
    return torch.cat([-quantiles[0][1:].flip(0), quantiles[1]]) / quantiles[1][-1]


def pack(indices: torch.Tensor, bits: int) -> torch.Tensor:
    """Return *indices*, (n,) uint8, as planes of one bit each, (bits, ceil(n / 8)) uint8: the same for every width."""
    rows = F.pad(indices, (0, -indices.numel() % 8)).view(-1, 8)
    shifts = torch.arange(8, dtype=torch.uint8, device=indices.device)
    return torch.stack([(((rows >> bit) & 1) << shifts).sum(dim=1, dtype=torch.uint8) for bit in range(bits)])


def unpack(planes: torch.Tensor) -> torch.Tensor:
    """Return the indices that `pack` packed, (8 * planes.shape[1],) uint8: up to 7 zeros more than were given."""
    shifts = torch.arange(8, dtype=torch.uint8, device=planes.device)
    indices = torch.zeros(planes.shape[1], 8, dtype=torch.uint8, device=planes.device)
    for bit, plane in enumerate(planes):
        indices |= ((plane[:, None] >> shifts) & 1) << bit
    return indices.view(-1)


def dequantize(planes: torch.Tensor, scale: torch.Tensor, levels: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """Return Q(W), *shape* (out, in), float32; needs 9 bytes per weight while it works."""
    values = levels.index_select(0, unpack(planes).int())  # int: uint8 would be taken for a mask
    blocks = values.view(scale.numel(), -1) * scale[:, None]
    return blocks.view(-1)[: shape[0] * shape[1]].view(shape)


class _Product(torch.autograd.Function):
    """x Q(W)^T, in the dtype of x. Keeps the packed weight only and unpacks it again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, planes: Any, scale: Any, levels: Any, shape: tuple[int, int]) -> torch.Tensor:
        ctx.save_for_backward(planes, scale, levels)
        ctx.shape = shape
        return F.linear(x, dequantize(planes, scale, levels, shape).to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        return grad @ dequantize(*ctx.saved_tensors, ctx.shape).to(grad.dtype), None, None, None, None


class NFLinear(torch.nn.Linear):
    """weight: (bits, padded / 8) uint8; scale: (blocks,) float32; levels: (2**bits,) float32; all in the state dict."""

    def __init__(self, linear: torch.nn.Linear, bits: int, block_size: int) -> None:
        torch.nn.Module.__init__(self)  # not Linear's: it would allocate a second weight
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        flat = linear.weight.detach().float().view(-1)
        blocks = F.pad(flat, (0, -flat.numel() % block_size)).view(-1, block_size)
        levels = normal_levels(bits).to(flat.device, torch.float32)
        scale = blocks.abs().amax(dim=1)
        relative = blocks / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]  # a block of zeros stays one
        indices = torch.bucketize(relative, (levels[1:] + levels[:-1]) / 2).to(torch.uint8)  # the nearest level
        self.weight = torch.nn.Parameter(pack(indices.view(-1), bits), requires_grad=False)
        self.register_buffer("scale", scale)
        self.register_buffer("levels", levels)

    def dequantized(self) -> torch.Tensor:
        """Return Q(W), (out_features, in_features) float32."""
        return dequantize(self.weight, self.scale, self.levels, (self.out_features, self.in_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x Q(W)^T + b, in the dtype of *x*, under autocast in autocast's."""
        device = x.device.type
        if torch.is_autocast_enabled(device) and x.dtype != torch.float64:  # float64 is left alone, as by F.linear
            x = x.to(torch.get_autocast_dtype(device))
        y = _Product.apply(x, self.weight, self.scale, self.levels, (self.out_features, self.in_features))
        return y if self.bias is None else y + self.bias.to(y.dtype)


def target_names(model: transformers.PreTrainedModel) -> list[str]:
    """Return the names of the layers to pack. Subclasses of torch.nn.Linear are left alone: what they compute is not known."""
    head = model.get_output_embeddings()
    return [name for name, m in model.named_modules() if type(m) is torch.nn.Linear and m is not head]


def quantize(model: transformers.PreTrainedModel, bits: int, block_size: int) -> transformers.PreTrainedModel:
    """Return *model* with its linear layers packed; each plain weight is freed before the next one is packed."""
    for name in target_names(model):
        model.set_submodule(name, NFLinear(model.get_submodule(name), bits, block_size))
    return model
