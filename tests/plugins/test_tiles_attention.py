"""Causal attention in tiles: as exact as torch's, the same bits with any threads, and no look at what comes later."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

if importlib.util.find_spec("numba") is None:
    pytest.skip("numba is not installed", allow_module_level=True)

from qlora_fused import blockwise, jit, loops
from qlora_fused.tiles import attention as tiled_attention
from qlora_fused.tiles.attention import attend, attend_backward

pytestmark = pytest.mark.skipif(not jit.has_tiles(), reason="this CPU has no tiles of bfloat16")

ROOM = 1.05  # times today's error: what a few numbers less or more than half a unit away make
SHAPES = [  # batch, heads, heads of keys, length, width
    (1, 1, 1, 32, 64),
    (2, 3, 1, 96, 32),
    (1, 6, 2, 160, 128),
    (2, 9, 3, 512, 64),
    (1, 1, 1, 512, 32),
    (1, 2, 2, 1056, 64),
    (1, 5, 1, 288, 256),
]

Given = tuple[Tensor, Tensor, Tensor, Tensor]


def given(batch: int, heads: int, shared: int, length: int, width: int, scale: float = 1.0, seed: int = 0) -> Given:
    """Return q, k, v (B, heads, T, d), which are views of (B, T, heads, d), and do (B, T, H, d)."""
    random = torch.Generator().manual_seed(seed)
    q, k, v, do = (torch.randn(batch, length, n, width, generator=random) for n in (heads, shared, shared, heads))
    q, k, v = (x.bfloat16().transpose(1, 2) for x in (q * scale**0.5, k * scale**0.5, v))
    return q, k, v, do.bfloat16()


def tiled(q: Tensor, k: Tensor, v: Tensor, do: Tensor, scale: float) -> tuple[Tensor, ...]:
    found = attend(q, k, v, scale)
    assert found is not None
    grads = attend_backward(do, q, k, v, scale, found[1])
    assert grads is not None
    return found[0], *grads


def exact(q: Tensor, k: Tensor, v: Tensor, do: Tensor, scale: float) -> tuple[Tensor, ...]:
    """Return the output and the gradients of q, k and v, float64."""
    inputs = [x.detach().double().requires_grad_() for x in (q, k, v)]
    keys, values = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in inputs[1:])
    later = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
    out = ((scale * inputs[0] @ keys.mT).masked_fill(later, -torch.inf).softmax(-1) @ values).transpose(1, 2)
    return out.detach(), *torch.autograd.grad(out, inputs, do.double())


def today(q: Tensor, k: Tensor, v: Tensor, do: Tensor, scale: float) -> tuple[Tensor, ...]:
    """Return what torch's attention and matrix products in blocks of rows make of it."""

    class Context:
        saved_tensors = (q, k, v)

        def __init__(self) -> None:
            self.scale, self.loops = scale, loops

    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True).transpose(1, 2)
    return out, *blockwise.Blockwise.backward(Context(), do)[:3]


def error(x: Tensor, wanted: Tensor) -> float:
    assert x.shape == wanted.shape
    return float((x.double() - wanted).norm() / wanted.norm())


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("large", [1.0, 30.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradients_are_as_exact_as_those_of_torch(shape: tuple[int, ...], large: float) -> None:
    inputs, scale = given(*shape, scale=large), shape[-1] ** -0.5
    found, before, wanted = (function(*inputs, scale) for function in (tiled, today, exact))
    for name, x, other, right in zip(("out", "dq", "dk", "dv"), found, before, wanted, strict=True):
        assert x.dtype == torch.bfloat16, name
        assert x.is_contiguous(), name
        assert error(x, right) <= ROOM * error(other, right), name


def test_sums_of_powers_are_returned_as_logarithms() -> None:
    q, k, v, _ = given(1, 2, 1, 160, 64, scale=5.0)
    scores = (0.125 * q.double() @ k.double().mT).masked_fill(torch.ones(160, 160, dtype=torch.bool).triu(1), -torch.inf)
    found = attend(q, k, v, 0.125)
    assert found is not None
    wanted = scores.logsumexp(-1) / torch.tensor(2.0, dtype=torch.float64).log()
    torch.testing.assert_close(found[1].double(), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 3, 1, 160, 64), (1, 2, 2, 544, 32), (1, 8, 4, 320, 64)])
def test_layout_in_memory_does_not_matter(shape: tuple[int, ...]) -> None:
    q, k, v, do = given(*shape)
    packed = torch.cat([x.transpose(1, 2).flatten(2) for x in (q, k, v)], -1)  # as one product of all three gives them
    sizes = [x.shape[1] * x.shape[3] for x in (q, k, v)]
    views = [x.unflatten(-1, (-1, shape[-1])).transpose(1, 2) for x in packed.split(sizes, -1)]
    turned = do.transpose(1, 2).contiguous().transpose(1, 2)
    for x, other in zip(tiled(q, k, v, do, 0.1), tiled(*views, turned, 0.1), strict=True):
        assert torch.equal(x, other)
    for x, other in zip(tiled(q, k, v, do, 0.1), tiled(q.contiguous(), k.contiguous(), v.contiguous(), do, 0.1), strict=True):
        assert torch.equal(x, other)


@pytest.mark.parametrize("shape", [(2, 6, 2, 512, 64), (1, 3, 1, 544, 64), (1, 9, 9, 96, 32)])
def test_bits_are_the_same_with_any_number_of_threads(shape: tuple[int, ...], threads: None) -> None:
    inputs = given(*shape)
    torch.set_num_threads(1)
    alone = tiled(*inputs, 0.125)
    for number in (2, 3):
        torch.set_num_threads(number)
        for x, other in zip(alone, tiled(*inputs, 0.125), strict=True):
            assert torch.equal(x, other)


@pytest.mark.parametrize("first", [1, 31, 33, 100, 160, 319])
def test_queries_see_no_later_keys(first: int) -> None:
    q, k, v, do = given(1, 3, 1, 320, 64)
    out, dq, _, _ = tiled(q, k, v, do, 0.125)
    other_k, other_v = k.clone(), v.clone()
    other_k[:, :, first:], other_v[:, :, first:] = 7 * k[:, :, first:] + 3, 100 - v[:, :, first:]
    other_out, other_dq, _, _ = tiled(q, other_k, other_v, do, 0.125)
    assert torch.equal(out[:, :first], other_out[:, :first])
    assert torch.equal(dq[:, :, :first], other_dq[:, :, :first])
    assert not torch.equal(out[:, first:], other_out[:, first:])


@pytest.mark.parametrize("last", [1, 32, 100, 288])
def test_keys_get_nothing_from_earlier_queries(last: int) -> None:
    q, k, v, do = given(1, 3, 1, 320, 64)
    _, _, dk, dv = tiled(q, k, v, do, 0.125)
    other_q, other_do = q.clone(), do.clone()
    other_q[:, :, :last], other_do[:, :last] = 5 * q[:, :, :last] - 1, -do[:, :last]
    _, _, other_dk, other_dv = tiled(other_q, k, v, other_do, 0.125)
    assert torch.equal(dk[:, :, last:], other_dk[:, :, last:])
    assert torch.equal(dv[:, :, last:], other_dv[:, :, last:])
    assert not torch.equal(dv[:, :, :last], other_dv[:, :, :last])


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_stays_where_it_has_influence(number: float) -> None:
    q, k, v, do = given(2, 2, 2, 96, 64)
    whole = tiled(q, k, v, do, 0.125)
    q = q.clone()
    q[0, 1, 70, 5] = number
    out, dq, dk, dv = tiled(q, k, v, do, 0.125)
    assert bool(out[0, 70, 1].isnan().any())
    for x, other in zip((out[1], dq[1], dk[1], dv[1]), (x[1] for x in whole), strict=True):
        assert torch.equal(x, other)
    assert torch.equal(out[0, :70], whole[0][0, :70])
    assert torch.equal(dq[0, 1, :64], whole[1][0, 1, :64])


def test_what_it_is_not_for_is_left_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, do = given(1, 2, 1, 64, 64)
    lse = torch.zeros(1, 2, 64)
    assert attend(q, k, v, 0.125) is not None
    others = [
        (q.float(), k.float(), v.float(), 0.125),
        (q[:, :, :33], k[:, :, :33], v[:, :, :33], 0.125),
        (q[..., :48], k[..., :48], v[..., :48], 0.125),
        (q, k, v[..., :32], 0.125),
        (q[:, :, 32:], k, v, 0.125),
        (q, k, v, 0.0),
        (q, k, v, float("nan")),
        (q.mT.contiguous().mT, k, v, 0.125),
        (q.repeat(1, 3, 1, 1)[:, :5], k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1), 0.125),
        (q[:0], k[:0], v[:0], 0.125),
        (*(x.to("meta") for x in (q, k, v)), 0.125),
    ]
    for other in others:
        assert attend(*other) is None
        assert attend_backward(do, *other, lse) is None
    assert attend_backward(do.float(), q, k, v, 0.125, lse) is None
    monkeypatch.setattr(tiled_attention, "has_tiles", lambda: False)
    assert attend(q, k, v, 0.125) is None
