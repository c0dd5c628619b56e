"""The compiled loops of the kernels `fused`: formulas in float64, rounding, NaN, threads, and doing without them."""

from __future__ import annotations

import importlib.util
import logging
import math
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from qlora_bitsandbytes import NF4
from qlora_core import inject_adapter, load_model
from qlora_core.attention import base_of
from qlora_core.testing.tiny import tiny_config, tiny_ids, tiny_model
from qlora_core.training.cross_entropy import mean_cross_entropy
from qlora_core.training.head import Head
from qlora_fused import Fused, blockwise, jit, loops
from qlora_peft import LoRA

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(jit.threads() is None, reason="torch's threads are not to be had here"),
]

ULP = {torch.bfloat16: 2.0**-7, torch.float32: 2.0**-23}  # relative, at most
HALF, SINGLE = torch.bfloat16, torch.float32
both = pytest.mark.parametrize("dtype", [HALF, SINGLE])
GATES = {"silu": F.silu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


def values(*shape: int, seed: int = 0, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


def assert_rounded(got: Tensor, wanted: Tensor, room: float = 1e-6) -> None:
    """Assert that *got* is *wanted*, float64, rounded; but for *room*, relative, that float32 arithmetic takes."""
    assert got.shape == wanted.shape
    off = (got.double() - wanted).abs()
    assert bool((off <= wanted.abs() * (ULP[got.dtype] / 2 + room) + room * float(wanted.abs().max())).all())


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# Numbers


@both
def test_rounding_is_that_of_torch_for_every_kind_of_number(dtype: torch.dtype) -> None:
    bits = torch.randint(-(2**31), 2**31, (200_000,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    special = [0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, 3.3895e38, 1.00390625, 1.01171875]
    x = torch.cat([bits.view(torch.float32), torch.tensor(special)])
    got = torch.empty(len(x), dtype=dtype)
    rounding(dtype, 1, x, got, len(x))
    wanted = x.to(dtype)
    number = ~x.isnan()
    bits_of = torch.int16 if dtype == HALF else torch.int32
    assert torch.equal(got[number].view(bits_of), wanted[number].view(bits_of))
    assert bool(got[~number].isnan().all())
    back = torch.empty(len(x))
    widening(dtype, 1, got, back, len(x))
    assert torch.equal(back[number].view(torch.int32), got.float()[number].view(torch.int32))
    assert bool(back[~number].isnan().all())


@jit.Loop
def rounding(a: Any) -> None:
    at = jit.numbers(a)
    x, y, n = jit.floats(at[2]), jit.elements(a, at[3]), at[4]
    while jit.take(a) < at[1]:
        for i in range(n):
            jit.put(y, i, x[i])


@jit.Loop
def widening(a: Any) -> None:
    at = jit.numbers(a)
    x, y, n = jit.elements(a, at[2]), jit.floats(at[3]), at[4]
    while jit.take(a) < at[1]:
        for i in range(n):
            y[i] = jit.get(x, i)


@jit.Loop
def exponentials(a: Any) -> None:
    at = jit.numbers(a)
    x, y, n = jit.floats(at[2]), jit.floats(at[3]), at[4]
    while jit.take(a) < at[1]:
        for i in range(n):
            y[i] = jit.exp(x[i])


@jit.Loop
def highest_of(a: Any) -> None:
    at = jit.numbers(a)
    x, highest, n = jit.floats(at[2]), jit.floats(at[3]), at[4]
    while jit.take(a) < at[1]:
        order = jit.to_order(x[0])
        for i in range(1, n):
            order = max(order, jit.to_order(x[i]))
        highest[0] = jit.from_order(order)


def test_exp_is_right_to_three_units_in_the_last_place() -> None:
    x = torch.linspace(-87, 88, 1_000_001)
    got = torch.empty_like(x)
    exponentials(SINGLE, 1, x, got, len(x))
    wanted = x.double().exp()
    assert float(((got.double() - wanted) / wanted).abs().max()) < 3 * 2.0**-23
    ends = torch.tensor([-1000.0, -math.inf, math.nan])
    exponentials(SINGLE, 1, ends, got, 3)
    assert 0 <= float(got[0]) == float(got[1]) < 1.7e-38
    assert math.isnan(float(got[2]))


@pytest.mark.parametrize("x", [[-3.0, -1.5, -2.0], [0.0, -0.0, -7.0], [-math.inf, 5.0, 4.0, 2.0**100], [math.inf, 1.0]])
def test_the_highest_is_found_among_numbers_of_both_signs(x: list[float]) -> None:
    given, got = torch.tensor(x), torch.empty(1)
    highest_of(SINGLE, 1, given, got, len(x))
    assert float(got) == max(x)


@jit.Loop
def counting(a: Any) -> None:
    at = jit.numbers(a)
    seen = jit.floats(at[2])
    block = jit.take(a)
    while block < at[1]:
        seen[block] += jit.ONE
        block = jit.take(a)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_each_block_is_taken_once_whatever_the_threads(threads: None, count: int) -> None:
    torch.set_num_threads(count)
    seen = torch.zeros(1000)
    counting(SINGLE, 900, seen)
    assert torch.equal(seen, (torch.arange(1000) < 900).float())


# Gates


@both
@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 30_011)])
def test_gates_and_their_gradients_are_formulas_rounded_once(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    gate, up, grad = (values(*shape, seed=seed, scale=3.0, dtype=dtype) for seed in range(3))
    wide = [x.double().requires_grad_() for x in (gate, up)]
    wanted = GATES[name](wide[0]) * wide[1]
    d_gate, d_up = torch.autograd.grad(wanted, wide, grad.double())
    got = (loops.gated(gate, up, name), *loops.gated_backward(grad.clone(), gate, up, name))
    assert {one.dtype for one in got} == {dtype}
    for one, right in zip(got, (wanted.detach(), wanted.detach(), d_gate, d_up), strict=True):
        assert_rounded(one, right)


@both
@pytest.mark.parametrize("name", GATES)
def test_gates_of_extreme_numbers_are_those_of_torch(name: str, dtype: torch.dtype) -> None:
    gate = torch.tensor([-200.0, 200.0, -1e30, 1e30, 0.0, math.nan], dtype=dtype)
    one = torch.ones_like(gate)
    wanted = GATES[name](gate.double())
    got = loops.gated(gate, one, name).double()
    assert torch.allclose(got, wanted, rtol=ULP[dtype], atol=1e-6 * 200, equal_nan=True)
    _, d_gate, d_up = loops.gated_backward(one.clone(), gate, one, name)
    assert name != "silu" or d_gate[:4].tolist() == pytest.approx([0, 1, 0, 1], abs=1e-6)
    assert bool(d_gate[[0, 1, 4]].isfinite().all() and d_up[:5].isfinite().all())
    assert bool(d_gate[5].isnan() and d_up[5].isnan())


# Norms


@both
@pytest.mark.parametrize("shape", [(1, 5), (2, 3, 64), (700, 577)])
def test_norms_and_their_gradients_are_formulas(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, dy = values(*shape, dtype=torch.float32, scale=4.0), values(*shape, seed=1, dtype=dtype)
    scale = 1 + values(shape[-1], seed=2, dtype=torch.float32, scale=0.3)
    wide = x.double().requires_grad_()
    wanted = F.rms_norm(wide, shape[-1:], scale.double(), 1e-5)
    y, inverse = loops.rms_norm(x, scale, 1e-5, dtype)
    assert y.dtype == dtype
    assert_rounded(y, wanted.detach())
    assert torch.allclose(inverse.double(), (x.double().square().mean(-1, keepdim=True) + 1e-5).rsqrt(), rtol=1e-6)
    (right,) = torch.autograd.grad(wanted, wide, dy.double())
    dx = loops.rms_norm_backward(dy, y, inverse, scale)
    assert dx.dtype == torch.float32
    # x is made again from y, which is rounded
    assert float((dx.double() - right).norm() / right.norm()) < (2e-3 if dtype == HALF else 1e-6)


@both
def test_what_is_not_a_number_stays_in_its_row(dtype: torch.dtype) -> None:
    x = values(4, 64, dtype=torch.float32)
    x[1, 3] = math.nan
    y, inverse = loops.rms_norm(x, torch.ones(64), 1e-6, dtype)
    assert y.isnan().all(1).tolist() == inverse.isnan()[:, 0].tolist() == [False, True, False, False]
    dx = loops.rms_norm_backward(y, y, inverse, torch.ones(64))
    assert dx.isnan().all(1).tolist() == [False, True, False, False]


# Rotary positions


@both
@pytest.mark.parametrize("width", [16, 6])
@pytest.mark.parametrize("angles", [1, 2])
def test_turning_is_its_formula_and_turning_back_its_inverse(width: int, angles: int, dtype: torch.dtype) -> None:
    x = values(2, 9, 3, 16, dtype=dtype).transpose(1, 2)  # heads beside each other, as layers give them
    angle = values(angles, 1, 9, width // 2, seed=1, dtype=torch.float64, scale=3.0).repeat(1, 1, 1, 2)
    cos, sin = angle.cos().float().contiguous(), angle.sin().float().contiguous()
    got = loops.rotated(x, cos, sin, torch.empty(x.shape, dtype=x.dtype), 1)
    wide = x.double()
    half = torch.cat([-wide[..., width // 2 : width], wide[..., : width // 2]], -1)
    wanted = torch.cat([wide[..., :width] * cos.double() + half * sin.double(), wide[..., width:]], -1)
    assert_rounded(got, wanted)
    back = loops.rotated(got, cos, sin, torch.empty(2, 9, 3, 16, dtype=x.dtype).transpose(1, 2), -1)
    assert torch.equal(back[..., width:], x[..., width:])
    assert float((back.double() - wide).norm() / wide.norm()) < ULP[dtype]


# Probabilities


BLOCKS = pytest.mark.parametrize(("start", "queries", "share"), [(0, 5, 1), (0, 128, 3), (128, 72, 2), (7, 1, 1)])


@both
@BLOCKS
@pytest.mark.parametrize(("size", "scale"), [(3.0, 1.0), (40.0, 0.125), (1e4, 1.0), (2.0, -0.5)])
def test_probabilities_and_gradients_of_scores_are_those_of_what_a_query_sees(
    start: int, queries: int, share: int, size: float, scale: float, dtype: torch.dtype
) -> None:
    scores = values(3, share * queries, start + queries, dtype=torch.float32, scale=size)
    dp = values(*scores.shape, seed=1, dtype=dtype)
    wide = (scores.double() * scale).requires_grad_()
    unseen = torch.arange(start + queries) > start + torch.arange(share * queries)[:, None] % queries
    wanted = wide.masked_fill(unseen, -math.inf).softmax(-1)
    p, ds = loops.softmax_backward(scores.clone(), dp.clone(), start, scale)
    assert p.dtype == ds.dtype == dtype
    assert_rounded(p, wanted.detach(), 3e-6)
    (gradient,) = torch.autograd.grad(wanted, wide, dp.double())
    subtracted = (wanted.detach() * dp.double()).norm()  # whose float32 rounding stays where a query sees one key alone
    allowed = (ULP[dtype] + 1e-6) * gradient.norm() + (1e-6 * subtracted if size > 100 else 0)
    assert float((ds.double() - scale * gradient).norm()) <= abs(scale) * float(allowed)
    assert not bool(p[:, unseen].any() or ds[:, unseen].any())


@both
def test_what_is_not_a_number_counts_where_it_is_seen(dtype: torch.dtype) -> None:
    for odd in (math.nan, math.inf):
        scores = torch.zeros(1, 3, 3)
        scores[0, :, 1] = odd
        p, ds = loops.softmax_backward(scores, torch.ones(1, 3, 3, dtype=dtype), 0, 1.0)
        assert p[0].isnan().any(1).tolist() == ds[0].isnan().any(1).tolist() == [False, True, True]


# Models


def gradients_of(precision: torch.dtype = HALF, **options: Any) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    model: Any = inject_adapter(load_model(tiny_config(), NF4()), LoRA(r=4))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    Fused(keep_pages=False, **options).apply(model).train()
    ids = tiny_ids(model)
    with torch.autocast("cpu", dtype=HALF, enabled=precision == HALF):
        logits = model(ids, use_cache=False).logits.float()
    F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    return model, torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize(("precision", "off"), [(HALF, 2e-2), (SINGLE, 1e-5)])
def test_a_model_computes_with_loops_what_it_computes_without(precision: torch.dtype, off: float) -> None:
    # (products by tiles are rounded elsewhere; what they compute is in test_tiles.py)
    (plain, wanted), (compiled, got) = gradients_of(precision, compiled=False), gradients_of(precision, tiles=False)
    assert base_of(plain).config._attn_implementation == blockwise.BLOCKWISE
    assert base_of(compiled).config._attn_implementation == blockwise.COMPILED
    assert float((got - wanted).norm() / wanted.norm()) < off


def test_a_model_computes_the_same_bits_whatever_the_threads(threads: None) -> None:
    torch.set_num_threads(1)
    _, wanted = gradients_of()
    torch.set_num_threads(3)
    _, got = gradients_of()
    assert torch.equal(got, wanted)


def test_without_numba_torch_computes_and_the_log_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "numba" else found(name, *rest))
    with caplog.at_level(logging.INFO, logger="qlora_core"):
        model, got = gradients_of()
    assert base_of(model).config._attn_implementation == blockwise.BLOCKWISE
    assert torch.equal(got, gradients_of(compiled=False)[1])
    assert "pip install 'qlora-core[cpu]'" in caplog.text


def test_numba_that_does_not_load_is_a_warning_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import qlora_fused

    monkeypatch.delattr(qlora_fused, "loops")
    monkeypatch.setitem(sys.modules, "qlora_fused.loops", None)
    model, _ = gradients_of()
    assert base_of(model).config._attn_implementation == blockwise.BLOCKWISE
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert any("loops are not compiled" in text and "qlora_fused" in text for text in warned)


def test_where_torch_has_other_threads_loops_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jit, "threads", lambda: None)
    model, _ = gradients_of()
    assert base_of(model).config._attn_implementation == blockwise.BLOCKWISE


def test_numba_is_not_imported_before_a_run_needs_it() -> None:
    code = "import sys, qlora_fused; print('numba' in sys.modules, 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False False\n"


# Losses


def losses(logits: Tensor, targets: Tensor, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return cross-entropies and the gradient of their sum times *factor*, in float64."""
    leaf = logits.double().requires_grad_()
    nats = F.cross_entropy(leaf, targets, reduction="none")
    return nats.detach(), torch.autograd.grad(factor * nats.sum(), leaf)[0]


@both
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 7), (70, 1000), (9, 50_257)])
@pytest.mark.parametrize("own_memory", [False, True])
def test_losses_and_their_gradients_are_formulas_rounded_once(
    dtype: torch.dtype, rows: int, width: int, own_memory: bool
) -> None:
    logits = values(rows + 2, width, scale=4, dtype=dtype)
    targets = torch.randint(width, (rows,), generator=torch.Generator().manual_seed(1))
    nats, wanted = losses(logits[:rows], targets, 0.25)
    given = logits.clone()
    gradient = torch.full_like(logits, 7.0) if own_memory else given
    got = loops.cross_entropies(given, targets, gradient, torch.tensor(0.25))
    assert got is not None
    assert got.tolist() == pytest.approx(nats.tolist(), rel=1e-6, abs=1e-6)
    assert_rounded(gradient[:rows], wanted)
    assert not gradient[rows:].any()
    assert own_memory == torch.equal(given, logits)
    alone = loops.cross_entropies(logits, targets)
    assert alone is not None
    assert torch.equal(alone, got)


@both
@pytest.mark.parametrize("offset", [-2e4, 0.0, 2e4])
def test_losses_of_logits_far_apart_and_far_from_0_are_no_trouble(dtype: torch.dtype, offset: float) -> None:
    logits = (torch.tensor([[0.0, 512.0, -512.0], [-8192, 8192, 0.0], [7.0, 7.0, 7.0]]) + offset).to(dtype)
    targets = torch.tensor([2, 0, 1])
    got = loops.cross_entropies(logits, targets)
    assert got is not None
    assert got.tolist() == pytest.approx(losses(logits, targets)[0].tolist(), rel=1e-6)


def test_a_row_with_nan_or_infinity_has_no_loss_and_leaves_the_others_theirs() -> None:
    logits, targets = values(4, 100, dtype=SINGLE), torch.tensor([1, 2, 3, 4])
    nats, gradient = losses(logits, targets)
    logits[1, 50], logits[2, 3] = math.nan, math.inf
    got = loops.cross_entropies(logits, targets, logits)
    assert got is not None
    assert got[[0, 3]].tolist() == pytest.approx(nats[[0, 3]].tolist(), rel=1e-6)
    assert bool(got[1:3].isnan().all())
    assert_rounded(logits[::3], gradient[::3])
    assert bool(logits[1:3].isnan().any(1).all())


def test_what_the_loop_does_not_know_is_left_to_torch_and_no_target_reads_beyond_the_row() -> None:
    logits, targets = values(4, 100), torch.tensor([1, 2, 3, 4])
    assert loops.cross_entropies(logits.half(), targets) is None
    assert loops.cross_entropies(logits[:, ::2], targets) is None
    assert loops.cross_entropies(logits.to("meta"), targets) is None
    assert loops.cross_entropies(logits, targets.int()) is None
    assert loops.cross_entropies(logits, targets, logits.float()) is None
    assert loops.cross_entropies(logits, targets, torch.empty(100, 4, dtype=HALF).t()) is None
    for wrong in (-1, 100):
        with pytest.raises(IndexError, match="targets must lie in 0 to 99"):
            loops.cross_entropies(logits, torch.tensor([1, 2, 3, wrong]))
    empty = loops.cross_entropies(logits, targets[:0], logits)
    assert empty is not None
    assert empty.shape == (0,)
    assert not logits.any()


def test_the_head_computes_losses_with_the_loop_unless_the_option_says_no() -> None:
    def head(**options: Any) -> Head:
        model = inject_adapter(load_model(str(tiny_model()), NF4()), LoRA(r=4))
        return Head.of(Fused(keep_pages=False, **options).apply(model))

    assert head().losses_of is loops.cross_entropies
    assert head(loss=False).losses_of is None
    assert head(compiled=False).losses_of is None


@both
def test_a_mean_loss_by_the_loop_is_as_near_to_float64_as_by_torch(dtype: torch.dtype) -> None:
    rows, weight = values(300, 64, dtype=dtype), values(1000, 64, seed=1, scale=0.3, dtype=dtype)
    targets = torch.randint(1000, (300,), generator=torch.Generator().manual_seed(2))
    wide = rows.double().requires_grad_()
    wanted = F.cross_entropy(wide @ weight.double().T, targets)
    (into_rows,) = torch.autograd.grad(wanted, wide)
    errors = []
    for losses_of in (None, loops.cross_entropies):
        leaf = rows.clone().requires_grad_()
        loss = mean_cross_entropy(lambda chunk: F.linear(chunk, weight), leaf, targets, 300, losses_of)
        (gradient,) = torch.autograd.grad(loss, leaf)
        assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-6 if dtype == SINGLE else 1e-3)
        errors.append(float((gradient.double() - into_rows).norm() / into_rows.norm()))
    assert errors[1] <= 1.02 * errors[0]


@pytest.mark.parametrize("last", [torch.tanh, lambda z: z])
def test_autograd_notices_that_logits_were_written_over(last: Any) -> None:
    """A head may need its own output for its gradient; then gradients get memory of their own, and are right."""
    rows, weight = values(300, 16, dtype=SINGLE).requires_grad_(), values(101, 16, seed=1, dtype=SINGLE)
    targets = torch.randint(101, (300,), generator=torch.Generator().manual_seed(2))

    def head(chunk: Tensor) -> Tensor:
        return last(F.linear(chunk, weight))  # type: ignore[no-any-return]

    loss, whole = mean_cross_entropy(head, rows, targets, 300, loops.cross_entropies), F.cross_entropy(head(rows), targets)
    torch.testing.assert_close(loss, whole)
    torch.testing.assert_close(torch.autograd.grad(loss, rows), torch.autograd.grad(whole, rows))
