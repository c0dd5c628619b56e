"""Packing into 4 bits on the CPU gives the bits of bitsandbytes, in a process where that can be asked before ours is there."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from qlora_bitsandbytes.packing import BINS, CHUNK, install_packing, pack_4bit
from qlora_core.libraries import import_libraries

IDENTITY = """
import itertools

from qlora_core.libraries import import_libraries

import_libraries()
import torch
from bitsandbytes.functional import get_4bit_type, quantize_4bit

from qlora_bitsandbytes.packing import CHUNK, install_packing

torch.manual_seed(0)
OPERATOR = torch.ops.bitsandbytes.quantize_4bit


def borders(kind):
    code = get_4bit_type(kind, device="cpu").sort().values
    return (code[:-1] + code[1:]) / 2


def weights(dtype):
    finfo = torch.finfo(dtype)
    for shape in ((64, 64), (7, 9), (1, 63), (1, 1), (65,), (4099, 321), (3, 130), (5, CHUNK // 4)):
        yield (torch.randn(shape) * 0.02).to(dtype)
    zeros = torch.randn(64, 256)
    zeros[:16], zeros[20, ::3], zeros[21] = 0, 0, -0.0
    yield zeros.to(dtype)
    yield (torch.randn(64, 256) * torch.logspace(-42, 4 if dtype == torch.float16 else 37, 64)[:, None]).to(dtype)
    yield (torch.randint(-50, 50, (64, 64)) * (finfo.smallest_normal / 16)).to(dtype)
    yield (torch.rand(64, 64) * 2 - 1).mul(finfo.max).to(dtype)
    yield torch.tensor([finfo.max, -finfo.max] * 64, dtype=dtype)
    yield (torch.rand(2**20) * 2 - 1).to(dtype)
    for kind in ("nf4", "fp4"):
        at = borders(kind)
        up, down = (torch.nextafter(at, torch.full_like(at, end)) for end in (2.0, -2.0))
        ties = torch.zeros(64, 64)
        ties[:, 0], ties[:, 1:46] = 1, torch.cat([at, up, down])
        yield from ((ties * scale).to(dtype) for scale in (1.0, 0.02, 1e-30, torch.rand(64, 1)))
    broken = torch.randn(256, 64)
    broken[3, 3], broken[5, 5] = float("nan"), float("inf")
    yield broken.to(dtype)


def packed(weight, kind, storage, size):
    try:
        return OPERATOR(weight, size, kind, storage)
    except RuntimeError as error:
        return str(error)  # an odd number of bytes is no bfloat16, for either


def nested(weight):
    packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    return packed, state.absmax, state.offset, state.state2.absmax


def same(one, other):
    if isinstance(one, str) or isinstance(other, str):
        return type(one) is type(other)
    pairs = zip(one, other, strict=True)
    return all(a.shape == b.shape and a.dtype == b.dtype and a.bits == b.bits for a, b in pairs)


class Bits:
    def __init__(self, tensor):
        self.shape, self.dtype = tensor.shape, tensor.dtype
        tensor = torch.where(tensor.isnan(), 0.5, tensor) if tensor.is_floating_point() else tensor  # NaNs differ in their bits
        self.bits = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def bits(answer):
    return answer if isinstance(answer, str) else [Bits(tensor) for tensor in answer]


given = [weight for dtype in (torch.bfloat16, torch.float16, torch.float32) for weight in weights(dtype)]
ways = list(itertools.product(("nf4", "fp4"), (torch.uint8, torch.bfloat16, torch.float32), (64, 128)))
theirs = [[bits(packed(weight, *way)) for way in ways] + [bits(nested(weight))] for weight in given]
copies = [Bits(weight) for weight in given]
install_packing()
install_packing()  # once is enough
assert torch._C._dispatch_has_kernel_for_dispatch_key("bitsandbytes::quantize_4bit", "CPU")
ours = [[bits(packed(weight, *way)) for way in ways] + [bits(nested(weight))] for weight in given]
wrong = [
    (tuple(weight.shape), weight.dtype, (*ways, "nested")[index])
    for weight, left, right in zip(given, theirs, ours, strict=True)
    for index, (one, other) in enumerate(zip(left, right, strict=True))
    if not same(one, other)
]
assert not wrong, wrong
assert same(copies, [Bits(weight) for weight in given]), "a weight was changed"
print("compared", len(given) * (len(ways) + 1))
"""


def test_the_bits_are_those_of_bitsandbytes() -> None:
    """nf4 and fp4, three dtypes: zeros, extremes, subnormals, every border and its neighbours, sizes off the block, NaN."""
    done = subprocess.run([sys.executable, "-c", IDENTITY], capture_output=True, text=True, check=False, env={**os.environ})
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) > 800


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_the_table_is_right_for_every_weight_of_16_bits(kind: str) -> None:
    """Against the nearest level by distance in float64: bfloat16 has 32,000 values from -1 to 1, no two alike."""
    import_libraries()
    from bitsandbytes.functional import get_4bit_type

    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    values = every[every.abs() <= 1]
    blocks = torch.cat([torch.ones(len(values), 1, dtype=torch.bfloat16), values[:, None].expand(-1, 63)], dim=1)
    packed, scales = pack_4bit(blocks, 64, kind, torch.uint8)
    levels = get_4bit_type(kind, device="cpu").double()
    chosen = levels[(packed.view(-1, 32)[:, 1] >> 4).long()]
    best = (values.double()[:, None] - levels).abs().amin(dim=1)
    assert torch.equal(scales, torch.ones(len(values)))
    assert ((chosen - values.double()).abs() - best).max() <= 1e-7  # the midpoints are float32


def test_chunks_and_bins_suit_every_block_size() -> None:
    assert CHUNK % 4096 == 0
    assert 2 * BINS + 1 < 2**24  # so that 1 + w, in float32, tells neighbouring bins apart


def test_a_kernel_that_is_there_already_is_left_alone() -> None:
    import_libraries()
    install_packing()
    install_packing()
    assert torch._C._dispatch_has_kernel_for_dispatch_key("bitsandbytes::quantize_4bit", "CPU")
