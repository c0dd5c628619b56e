"""Products of a few rows with packed weights: against the weights of bitsandbytes, bit by bit, and sums in float64."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import Tensor

pytest.importorskip("numba")

from qlora_fused import jit

if jit.threads() is None:
    pytest.skip("torch's threads are not to be had here", allow_module_level=True)

from qlora_fused import loops
from qlora_fused.fourbit import ROWS, Packed, gemv, unpacked
from qlora_fused.lora import Member

pytestmark = pytest.mark.filterwarnings("ignore")


def values(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def made(
    d_out: int,
    d_in: int,
    dtype: torch.dtype,
    *,
    seed: int = 0,
    bias: bool = False,
    kind: str = "nf4",
    nested: bool = True,
    blocksize: int = 64,
) -> Linear4bit:
    layer = Linear4bit(d_in, d_out, bias=bias, compute_dtype=dtype, quant_type=kind, compress_statistics=nested)
    weight = values(d_out, d_in, seed=seed, dtype=dtype)
    options: dict[str, Any] = {"quant_type": kind, "compress_statistics": nested, "blocksize": blocksize}
    layer.weight = Params4bit(weight, requires_grad=False, module=layer, **options)
    if bias:
        layer.bias.data = values(d_out, seed=seed + 1, dtype=dtype)
    layer.support_avx512bf16_for_cpu = False
    return layer.to("cpu")


def theirs(layer: Any) -> Tensor:
    return dequantize_4bit(layer.weight.data, layer.weight.quant_state)  # type: ignore[no-any-return]


def adapters(d_out: int, d_in: int, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    return values(rank, d_in, seed=seed) / d_in**0.5, values(d_out, rank, seed=seed + 1)


def products(*arguments: Any) -> list[Tensor]:
    ys = gemv(*arguments)
    assert ys is not None
    return ys


def taken(layer: Any, x: Tensor) -> bool:
    d_out, d_in = layer.weight.quant_state.shape
    return gemv(x, [layer], [torch.zeros(1, d_in), torch.zeros(d_out, 1)], [1.0]) is not None


def weights_by(layer: Any, d_out: int, d_in: int, dtype: torch.dtype) -> Tensor:
    """Return W (out, in) as products with the rows of the identity, a few at a time."""
    a, b = torch.zeros(1, d_in), torch.zeros(d_out, 1)
    identity = torch.eye(d_in, dtype=dtype)
    return torch.cat([products(rows, [layer], [a, b], [1.0])[0] for rows in identity.split(ROWS)]).T


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize(("nested", "blocksize"), [(True, 32), (True, 64), (True, 128), (False, 64), (False, 256)])
def test_weights_are_those_of_bitsandbytes_to_the_bit(dtype: torch.dtype, kind: str, nested: bool, blocksize: int) -> None:
    layer = made(320, 256, dtype, kind=kind, nested=nested, blocksize=blocksize)
    assert torch.equal(weights_by(layer, 320, 256, dtype), theirs(layer))
    found = unpacked(layer)
    assert found is not None
    assert found.dtype == dtype
    assert torch.equal(found, theirs(layer))


@pytest.mark.parametrize("shape", [(1, 64), (3, 128), (129, 576), (1536, 576)])
def test_all_of_a_weight_is_unpacked_whatever_its_size(shape: tuple[int, int]) -> None:
    layer = made(*shape, torch.bfloat16)
    found = unpacked(layer)
    assert found is not None
    assert torch.equal(found, theirs(layer))


def test_other_storage_is_read_as_the_octets_that_it_is() -> None:
    layer: Any = Linear4bit(128, 64, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", quant_storage=torch.bfloat16)
    layer.weight.data = values(64, 128, dtype=torch.bfloat16)
    layer.to("cpu")
    assert layer.weight.dtype == torch.bfloat16
    found = unpacked(layer)
    assert found is not None
    assert torch.equal(found, theirs(layer))


def test_adapters_in_bfloat16_and_rows_that_lie_apart_are_taken_as_they_are() -> None:
    layer = made(64, 128, torch.bfloat16)
    a, b = (part.bfloat16() for part in adapters(64, 128, 4, 3))
    x = values(3, 256, dtype=torch.bfloat16)[:, ::2]
    (y,) = products(x, [layer], [a, b], [2.0])
    (again,) = products(x.contiguous(), [layer], [a.float(), b.float()], [2.0])
    assert torch.equal(y, again)
    assert products(x[:0], [layer], [a, b], [2.0])[0].shape == (0, 64)


@pytest.mark.parametrize("odd", ["blocks that cross rows", "float16", "offset", "scales of scales"])
def test_what_is_stored_in_another_way_is_left_to_bitsandbytes(odd: str) -> None:
    layer: Any = made(40, 96 if odd == "blocks that cross rows" else 128, torch.float16 if odd == "float16" else torch.float32)
    state = layer.weight.quant_state
    if odd == "offset":
        state.offset = state.offset.bfloat16()
    elif odd == "scales of scales":
        state.state2.dtype = torch.bfloat16
    assert unpacked(layer) is None
    for dtype in (torch.bfloat16, torch.float32):
        assert torch.equal(Member(layer, 1.0, 0.0, loops).weight(dtype), theirs(layer).to(dtype))


@pytest.mark.parametrize(("dtype", "near"), [(torch.bfloat16, 2.0**-8), (torch.float32, 3e-7)])
@pytest.mark.parametrize("rows", [1, 3, ROWS])
def test_layers_that_share_x_are_computed_as_their_formula_and_rounded_once(dtype: torch.dtype, near: float, rows: int) -> None:
    sizes, ranks, scales = (192, 7, 65), (8, 1, 20), [2.0, 0.5, 1.5]
    layers = [made(d_out, 384, dtype, seed=d_out, bias=d_out != 192) for d_out in sizes]
    pairs = [adapters(d_out, 384, rank, d_out) for d_out, rank in zip(sizes, ranks, strict=True)]
    x = values(rows, 384, seed=5, dtype=dtype)
    ys = products(x, layers, [*(a for a, _ in pairs), *(b for _, b in pairs)], scales)
    for y, layer, (a, b), scale in zip(ys, layers, pairs, scales, strict=True):
        wide = x.double()
        wanted = wide @ theirs(layer).double().T + scale * (wide @ a.double().T) @ b.double().T
        wanted = wanted if layer.bias is None else wanted + layer.bias.double()
        # half a unit of the result itself, and beside it the rounding of sums
        assert y.dtype == dtype
        assert y.shape == wanted.shape
        assert bool(((y.double() - wanted).abs() <= near * wanted.abs() + 2e-6 * wanted.abs().max()).all())


def test_it_is_taken_for_a_few_rows_of_the_dtype_of_the_weight_and_blocks_that_do_not_cross_rows() -> None:
    layer = made(64, 128, torch.bfloat16)
    x = values(ROWS, 128, dtype=torch.bfloat16)
    assert taken(layer, x)
    assert taken(layer, x[:1])
    assert not taken(layer, values(ROWS + 1, 128, dtype=torch.bfloat16))
    assert not taken(layer, x.float())
    assert not taken(layer, x.to("meta"))
    assert not taken(layer, values(1, 256, dtype=torch.bfloat16))
    assert not taken(made(64, 96, torch.bfloat16), values(1, 96, dtype=torch.bfloat16))
    assert not taken(made(64, 128, torch.float16), values(1, 128, dtype=torch.float16))


@pytest.mark.skipif(not Linear4bit(64, 64).support_avx512bf16_for_cpu, reason="bitsandbytes packs weights again on AVX512-bf16")
def test_a_weight_that_bitsandbytes_packed_once_more_is_left_to_it() -> None:
    layer = made(64, 128, torch.bfloat16)
    x = values(1, 128, dtype=torch.bfloat16)
    assert taken(layer, x)
    layer.support_avx512bf16_for_cpu = True
    layer.eval()(x)
    assert not taken(layer, x)


def test_a_copy_and_a_changed_weight_are_read_where_they_lie() -> None:
    layer = made(64, 128, torch.float32)
    zeros = [torch.zeros(1, 128), torch.zeros(64, 1)]
    x = values(1, 128)
    (before,) = products(x, [layer], zeros, [1.0])
    twin = copy.deepcopy(layer)
    twin.weight.data.fill_(0x77)  # level 7 of nf4 is 0
    layer_again, zero = products(x, [layer], zeros, [1.0])[0], products(x, [twin], zeros, [1.0])[0]
    assert torch.equal(layer_again, before)
    assert not zero.any()
    assert Packed.of(layer) != Packed.of(twin)
    layer.weight.quant_state.offset = 2 * layer.weight.quant_state.offset
    found = unpacked(layer)
    assert found is not None
    assert torch.equal(found, theirs(layer))
    other = made(64, 128, torch.float32, seed=1)
    layer.weight.data, layer.weight.quant_state = other.weight.data, other.weight.quant_state
    assert torch.equal(products(x, [layer], zeros, [1.0])[0], products(x, [other], zeros, [1.0])[0])


OF_THIS_PROCESSOR = """
import torch
from numba.core.registry import cpu_target
from tests.plugins.test_fourbit import made, theirs, unpacked, weights_by
for dtype in (torch.bfloat16, torch.float32):
    layer = made(64, 128, dtype)
    assert torch.equal(weights_by(layer, 64, 128, dtype), theirs(layer))
    assert torch.equal(unpacked(layer), theirs(layer))
print(cpu_target.target_context.codegen().magic_tuple()[2])
"""


@pytest.mark.parametrize("features", ["+avx2,+avx,+fma", "+sse2"])
def test_processors_that_can_less_find_the_same_weights(tmp_path: Path, features: str) -> None:
    from numba.core.registry import cpu_target

    if "+avx2" in features and "+avx2" not in cpu_target.target_context.codegen().magic_tuple()[2]:
        pytest.skip("this processor has no AVX2")
    told = {"NUMBA_CPU_FEATURES": features, "NUMBA_CPU_NAME": "generic", "NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", OF_THIS_PROCESSOR]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root, env={**os.environ, **told})
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == [features]
