"""The size of a model and what has an adapter, against sums done by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_bitsandbytes import NF4
from qlora_core.footprint import Coverage, Footprint, LinearWeights
from qlora_core.model import inject_adapter, load_model
from qlora_core.providers import Quantizer
from qlora_peft import LoRA
from qlora_plain import NoQuantizer


class PackedLinear(torch.nn.Linear):
    """A linear layer whose weight is stored as bytes of two weights each, with scales beside it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=True)
        self.weight = torch.nn.Parameter(torch.zeros(inputs * outputs // 2, 1, dtype=torch.uint8), requires_grad=False)
        self.scales = [torch.zeros(outputs)]  # no parameter and no buffer, as in the libraries


class Halves(Quantizer):
    name = "halves"

    def load_kwargs(self, skeleton: Any) -> dict[str, Any]:
        return {}

    def is_quantized(self, module: torch.nn.Module) -> bool:
        return isinstance(module, PackedLinear)

    def dequantize(self, module: torch.nn.Module) -> torch.Tensor:
        raise NotImplementedError

    def constants(self, module: Any) -> list[torch.Tensor]:
        return module.scales

    def stored_bytes(self, shape: tuple[int, int]) -> int:
        return shape[0] * shape[1] // 2 + 4 * shape[0]


class Small(torch.nn.Module):
    """An embedding of 10 x 8 tied to the head, a packed 8 -> 6, a plain 6 -> 4, a norm, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(10, 8)
        self.packed = PackedLinear(8, 6)
        self.plain = torch.nn.Linear(6, 4, bias=False)
        self.norm = torch.nn.LayerNorm(6)
        self.head = torch.nn.Linear(8, 10, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("positions", torch.zeros(16))

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.head


def test_the_footprint_counts_packed_weights_with_their_constants_and_tied_ones_once() -> None:
    size = Footprint.of(Small(), Halves())
    embedding, packed, bias, plain, norm, buffer = 80, 48, 6, 24, 12, 16
    assert size.parameters == embedding + packed + bias + plain + norm
    assert size.quantized_parameters == packed
    assert size.quantized_bytes == packed // 2 + 4 * 6
    assert size.bytes == packed // 2 + 4 * 6 + 4 * (embedding + bias + plain + norm + buffer)
    assert size.left_out == (("embedding.weight", 80), ("plain.weight", 24))


def test_shares_and_bits_follow_from_the_counts() -> None:
    size = Footprint(parameters=1000, bytes=700, quantized_parameters=800, quantized_bytes=450, left_out=())
    assert size.bits_per_parameter == 5.6
    assert size.quantized_bits == 4.5
    assert size.quantized_share == 0.8


def test_a_model_that_is_not_quantised_has_no_bits_per_quantised_parameter() -> None:
    size = Footprint.of(Small(), NoQuantizer())
    assert size.quantized_parameters == 0
    assert size.quantized_bits == 0.0
    assert size.quantized_share == 0.0


def test_two_tensors_of_one_storage_take_its_bytes_once() -> None:
    model = torch.nn.Module()
    storage = torch.zeros(4, 6)
    model.first = torch.nn.Parameter(storage[:2])
    model.second = torch.nn.Parameter(storage[2:])
    size = Footprint.of(model, NoQuantizer())
    assert size.parameters == 24
    assert size.bytes == 96


@pytest.mark.parametrize("double_quant", [True, False])
def test_a_4_bit_model_takes_what_the_quantizer_says_for_each_of_its_weights(tiny_model: Path, double_quant: bool) -> None:
    quantizer = NF4(double_quant=double_quant)
    model = load_model(str(tiny_model), quantizer)
    size = Footprint.of(model, quantizer)
    # two layers of q 64x64, k and v 32x64, o 64x64, gate and up 128x64, down 64x128
    shapes = [(64, 64), (32, 64), (32, 64), (64, 64), (128, 64), (128, 64), (64, 128)] * 2
    assert size.quantized_parameters == sum(rows * columns for rows, columns in shapes)
    assert size.quantized_bytes == sum(quantizer.stored_bytes(shape) for shape in shapes)
    assert {name.rpartition(".")[0].rpartition(".")[2] for name, _ in size.left_out} <= {"embed_tokens", "lm_head"}


def test_coverage_counts_linear_weights_but_the_head(tiny_model: Path) -> None:
    quantizer = NF4()
    model = load_model(str(tiny_model), quantizer)
    weights = LinearWeights(model, quantizer)
    total = 2 * (64 * 64 * 2 + 32 * 64 * 2 + 128 * 64 * 3)
    assert weights.covered_by(model) == Coverage(total, 0, weights.covered_by(model).left_out)
    assert len(weights.covered_by(model).left_out) == 14
    coverage = weights.covered_by(inject_adapter(model, LoRA(r=2)))
    assert (coverage.weights, coverage.adapted, coverage.share, coverage.left_out) == (total, total, 1.0, ())


def test_coverage_of_some_layers_names_the_others_largest_first(tiny_model: Path) -> None:
    quantizer = NoQuantizer()
    model = load_model(str(tiny_model), quantizer)
    weights = LinearWeights(model, quantizer)
    coverage = weights.covered_by(inject_adapter(model, LoRA(r=2, target_modules=("q_proj", "v_proj"))))
    assert coverage.adapted == 2 * (64 * 64 + 32 * 64)
    assert coverage.share == coverage.adapted / coverage.weights
    sizes = [size for _, size in coverage.left_out]
    assert sizes == sorted(sizes, reverse=True)
    assert {name.split(".")[-2] for name, _ in coverage.left_out} == {"k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_experts_held_as_three_dimensional_parameters_count_as_linear_weights() -> None:
    model = Small()
    model.mlp = torch.nn.Module()
    model.mlp.experts = torch.nn.Parameter(torch.zeros(3, 4, 5))
    model.convolution = torch.nn.Conv1d(2, 2, 3)
    coverage = LinearWeights(model, Halves()).covered_by(model.requires_grad_(False))
    assert dict(coverage.left_out) == {"mlp.experts": 60, "packed.weight": 48, "plain.weight": 24}


def test_coverage_of_a_model_without_linear_weights_is_zero() -> None:
    assert Coverage(0, 0, ()).share == 0.0
