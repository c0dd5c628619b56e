"""Products by tiles of bfloat16: what chains compute, and LoRA made of them, beside float64 and the usual products."""

from __future__ import annotations

import concurrent.futures
import functools
import importlib.util
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import Tensor

from qlora_fused.lora import FusedLinear, Member, forward, infer, matrices
from qlora_fused.mlp import FusedMLP

if importlib.util.find_spec("numba") is None:
    pytest.skip("numba is not installed", allow_module_level=True)
from qlora_fused import jit, loops, rewriting
from qlora_fused.fourbit import Packed
from qlora_fused.tiles import lora as tiled_lora
from qlora_fused.tiles.chains import PANELS, Chain, Right, in_blocks

if not jit.has_tiles():
    pytest.skip("the CPU has no units for tiles of bfloat16", allow_module_level=True)


def numbers(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed + sum(size)))


def halves(*size: int, seed: int = 0) -> Tensor:
    return numbers(*size, seed=seed).bfloat16()


def off(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


def rounded_once(got: Tensor, wanted: Tensor) -> bool:
    return off(got, wanted) <= 1.001 * off(wanted.bfloat16(), wanted)


def layer(columns: int, rows: int, *, bias: bool = False, kind: str = "nf4", nested: bool = True, blocksize: int = 64) -> Any:
    own = Linear4bit(columns, rows, bias=bias, compute_dtype=torch.bfloat16, quant_type=kind)
    value = halves(rows, columns, seed=5) / columns**0.5
    own.weight = Params4bit(value, requires_grad=False, quant_type=kind, compress_statistics=nested, blocksize=blocksize)
    if bias:
        own.bias.data = numbers(rows)
    return own.requires_grad_(False).to("cpu")


def weight_of(own: Any) -> Tensor:
    return dequantize_4bit(own.weight.data, own.weight.quant_state) if isinstance(own, Linear4bit) else own.weight


def packed(own: Any, *, transposed: bool = False) -> Right:
    known = Packed.of(own)
    assert known is not None
    return Right.packed(known, own.weight.quant_state.shape, transposed=transposed)


def blocks_of(matrix: Tensor) -> Tensor:
    """Return *matrix* in blocks."""
    rows, columns = matrix.shape
    return matrix.view(rows // 32, 32, columns // 32, 32).transpose(1, 2).contiguous()


# Chains


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize(("nested", "blocksize"), [(True, 64), (False, 64), (True, 128)])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_packed_weight_is_that_of_bitsandbytes_to_the_bit(kind: str, nested: bool, blocksize: int, transposed: bool) -> None:
    own = layer(256, 96, kind=kind, nested=nested, blocksize=blocksize)
    wanted = weight_of(own).t() if transposed else weight_of(own)
    out, chain = torch.empty(wanted.shape, dtype=torch.bfloat16), Chain()
    chain.product(out, (torch.eye(len(wanted), dtype=torch.bfloat16), packed(own, transposed=transposed)))
    chain.run()
    assert torch.equal(out, wanted)


@pytest.mark.parametrize(
    ("rows", "k", "columns"), [(32, 32, 32), (96, 64, 160), (1056, 576, 192), (16, 1024, 576), (48, 32, 32)]
)
@pytest.mark.parametrize("transposed", [False, True])
def test_a_product_is_a_sum_in_float32(rows: int, k: int, columns: int, transposed: bool) -> None:
    left, right = halves(rows, k), halves(columns, k) if transposed else halves(k, columns)
    out, single, chain = torch.empty(rows, columns, dtype=torch.bfloat16), torch.empty(rows, columns), Chain()
    for into in (out, single):
        chain.product(into, (left, Right.plain(right, transposed=transposed)))
    chain.run()
    wanted = left.double() @ (right.t() if transposed else right).double()
    assert off(single, wanted) < 1e-6
    assert torch.equal(out, single.bfloat16())


@pytest.mark.parametrize("k", [64, 4096, 9216])
def test_sums_of_any_length_with_what_is_added_are_rounded_once(k: int) -> None:
    own, x, more, other = layer(k, 64, bias=True), halves(64, k), halves(64, 32), halves(32, 64)
    addend, out = numbers(64, 64), torch.empty(64, 64, dtype=torch.bfloat16)
    turned, before = torch.empty(64, 64, dtype=torch.bfloat16), addend.clone()
    chain = Chain()
    summands = (x, packed(own, transposed=True)), (more, Right.plain(other))
    chain.product(out, *summands, addend=addend, bias=own.bias, turned=turned)
    chain.run()
    wanted = x.double() @ weight_of(own).double().t() + more.double() @ other.double() + before.double() + own.bias.double()
    assert rounded_once(out, wanted)
    assert torch.equal(turned, out.t())


def test_a_packed_weight_is_summed_over_its_rows_too_in_parts() -> None:
    own, x = layer(64, 9216), halves(32, 9216)
    out, chain = torch.empty(32, 64, dtype=torch.bfloat16), Chain()
    chain.product(out, (x, packed(own)))
    chain.run()
    assert rounded_once(out, x.double() @ weight_of(own).double())


@pytest.mark.parametrize("blocksize", [64, 128, 256, 4096])
@pytest.mark.parametrize("nested", [True, False])
def test_scales_are_found_wherever_a_sum_is_cut(blocksize: int, nested: bool) -> None:
    wide, tall = layer(8192, 32, nested=nested, blocksize=blocksize), layer(blocksize, 9216, nested=nested, blocksize=blocksize)
    for own, transposed in ((wide, True), (tall, False)):
        weight, right = weight_of(own), packed(own, transposed=transposed)
        x, h, b = halves(32, right.rows), halves(32, 96), halves(96, right.columns)
        out, chain = torch.empty(32, right.columns, dtype=torch.bfloat16), Chain()
        chain.product(out, (h, Right.plain(b)), (x, right))  # the first is of an odd number of steps
        chain.run()
        assert rounded_once(out, x.double() @ (weight.t() if transposed else weight).double() + h.double() @ b.double())


def test_products_of_one_size_that_are_cut_share_their_sums() -> None:
    x, rights, outs, chain = halves(64, 9216), [halves(9216, 32, seed=n) for n in range(3)], [], Chain()
    for right in rights:
        outs.append(chain.product(torch.empty(64, 32), (x, Right.plain(right))))
    assert len(chain.sums) == 1
    chain.run()
    for right, out in zip(rights, outs, strict=True):
        assert off(out, x.double() @ right.double()) < 1e-6


def test_matrices_that_have_no_product_are_refused() -> None:
    out = torch.empty(64, 64, dtype=torch.bfloat16)
    for left, right in (((64, 96), (64, 64)), ((64, 64), (64, 96)), ((32, 64), (64, 64))):
        with pytest.raises(ValueError, match="product"):
            Chain().product(out, (halves(*left), Right.plain(halves(*right))))


def test_matrices_in_blocks_are_the_same_matrices() -> None:
    x, right = halves(96, 64), halves(64, 160)
    out, blocks, back, chain = torch.empty(96, 160, dtype=torch.bfloat16), in_blocks(96, 160), torch.empty(160, 160), Chain()
    chain.product(out, (x, Right.plain(right)))
    chain.product(blocks, (blocks_of(x), Right.plain(blocks_of(right))))
    chain.then().product(back, (halves(160, 96), Right.plain(blocks)))
    chain.product(twice := in_blocks(96, 96), (blocks, Right.plain(blocks, transposed=True)))
    chain.run()
    assert torch.equal(blocks, blocks_of(out))
    assert off(back, halves(160, 96).double() @ out.double()) < 1e-6
    assert off(twice, blocks_of((out.double() @ out.double().t()).bfloat16())) < 1e-4


def test_the_transposed_of_a_product_takes_as_many_rows_as_it_has() -> None:
    left, right = halves(32, 96), halves(96, 64)
    for rows in (4, 16, 24):
        out = torch.full((64, rows), torch.nan)
        chain = Chain()
        chain.product_t(out, left, Right.plain(right), 0.5)
        chain.run()
        assert off(out, 0.5 * (left[:rows].double() @ right.double()).t()) < 1e-6


def test_copies_are_rounded_and_zero_elsewhere() -> None:
    matrix, out, chain = numbers(20, 6).t(), torch.full((10, 32), torch.nan).bfloat16(), Chain()
    chain.copy(out, matrix, 3.0, column=4)
    chain.run()
    wanted = torch.zeros(10, 32)
    wanted[:6, 4:24] = matrix * 3
    assert torch.equal(out, wanted.bfloat16())


# LoRA


def members(layers: Sequence[Any], tiles: Any, dropout: float = 0.0, scale: float = 1.5) -> tuple[Member, ...]:
    return tuple(Member(own, scale, dropout, loops, tiles) for own in layers)


def adapters(layers: Sequence[Any], rank: int) -> list[Tensor]:
    sizes = [weight_of(own).shape for own in layers]
    a = [numbers(rank, columns, seed=n) / columns**0.5 for n, (_, columns) in enumerate(sizes)]
    return [*a, *(numbers(rows, rank, seed=n + 9) / 4 for n, (rows, _) in enumerate(sizes))]


def computed(compute: Any, x: Tensor, ab: Sequence[Tensor], kind: torch.dtype | None = None) -> list[Tensor]:
    """Return the outputs of compute(x, *ab) and the gradients of x, A and B, for gradients of the outputs of our own."""
    inputs = [part.to(kind or part.dtype).requires_grad_() for part in (x.clone(), *(part.clone() for part in ab))]
    torch.manual_seed(3)
    ys = compute(*inputs)
    ys = [ys] if isinstance(ys, Tensor) else list(ys)
    torch.autograd.backward(ys, [halves(*y.shape, seed=n).to(y.dtype) for n, y in enumerate(ys)])
    return [*(y.detach() for y in ys), *(part.grad for part in inputs)]  # type: ignore[misc]


def exact(layers: Sequence[Any], x: Tensor, *ab: Tensor, kept: Tensor | None = None, scale: float = 1.5) -> list[Tensor]:
    parts = zip(layers, ab[: len(layers)], ab[len(layers) :], strict=True)
    seen = x if kept is None else x * kept
    biases = [0 if own.bias is None else own.bias.double() for own in layers]
    ys = [x @ weight_of(own).double().t() + scale * (seen @ a.t()) @ b.t() for own, a, b in parts]
    return [y + bias for y, bias in zip(ys, biases, strict=True)]


GROUPS = [
    ([(64, 64), (64, 32), (64, 32)], 4, 64),
    ([(576, 576), (576, 192), (576, 192)], 16, 256),
    ([(576, 1536), (576, 1536)], 16, 77),
    ([(64, 96)], 40, 45),
    ([(128, 64)], 8, 20),
]


@pytest.mark.parametrize(("sizes", "rank", "rows"), GROUPS)
@pytest.mark.parametrize("plain", [False, True])
def test_layers_are_as_close_to_float64_as_by_the_usual_products(
    sizes: list[tuple[int, int]], rank: int, rows: int, plain: bool
) -> None:
    layers: list[Any] = [layer(*size, bias=True) for size in sizes]
    if plain:
        layers = [torch.nn.Linear(*size).bfloat16().requires_grad_(False) for size in sizes]
    x, ab = halves(2, rows, sizes[0][0]), adapters(layers, rank)
    wanted = computed(functools.partial(exact, layers), x, ab, torch.float64)
    usual = computed(lambda x, *ab: FusedLinear.apply(x, members(layers, None), *ab), x, ab)
    got = computed(lambda x, *ab: FusedLinear.apply(x, members(layers, tiled_lora), *ab), x, ab)
    assert [part.shape for part in got] == [part.shape for part in usual]
    for ours, theirs, right in zip(got, usual, wanted, strict=True):
        assert off(ours, right) <= 1.02 * off(theirs, right)


@pytest.mark.parametrize("ranks", [(8, 24, 40), (1, 16, 20), (32, 16, 64)])
def test_layers_of_a_group_may_have_ranks_of_their_own(ranks: tuple[int, ...]) -> None:
    layers = [layer(64, rows) for rows in (64, 32, 96)]
    single = [adapters([own], rank) for own, rank in zip(layers, ranks, strict=True)]
    x, ab = halves(2, 40, 64), [*(a for a, _ in single), *(b for _, b in single)]
    wanted = computed(functools.partial(exact, layers), x, ab, torch.float64)
    usual = computed(lambda x, *ab: FusedLinear.apply(x, members(layers, None), *ab), x, ab)
    got = computed(lambda x, *ab: FusedLinear.apply(x, members(layers, tiled_lora), *ab), x, ab)
    for ours, theirs, right in zip(got, usual, wanted, strict=True):
        assert ours.shape == right.shape
        assert off(ours, right) <= 1.02 * off(theirs, right)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_an_input_that_needs_no_gradient_gets_none(dropout: float) -> None:
    layers = [layer(64, 96)]
    x, ab = halves(40, 64), [part.requires_grad_() for part in adapters(layers, 8)]
    results = []
    for given in (x, x.clone().requires_grad_()):
        torch.manual_seed(0)
        (y,) = FusedLinear.apply(given, members(layers, tiled_lora, dropout), *ab)
        results.append(torch.autograd.grad(y, ab, torch.ones(()).bfloat16().expand(y.shape)))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_inputs_may_lie_in_memory_as_they_like() -> None:
    layers = [layer(64, 64)]
    x, ab, known = halves(64, 40), adapters(layers, 8), members(layers, tiled_lora)
    wanted, got = (FusedLinear.apply(part, known, *ab)[0] for part in (x.t().contiguous(), x.t()))
    assert torch.equal(got, wanted)
    nothing = FusedLinear.apply(x.t()[:0], known, *ab)[0]
    assert nothing.shape == (0, 64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_adapters_and_plain_weights_may_be_of_any_dtype(dtype: torch.dtype) -> None:
    plain: Any = torch.nn.Linear(64, 96).to(dtype).requires_grad_(False)
    for own in (layer(64, 96), plain):
        x, ab = halves(40, 64), [part.to(dtype) for part in adapters([own], 8)]
        usual = computed(lambda x, *ab, own=own: FusedLinear.apply(x, members([own], None), *ab), x, ab)
        got = computed(lambda x, *ab, own=own: FusedLinear.apply(x, members([own], tiled_lora), *ab), x, ab)
        for ours, theirs in zip(got, usual, strict=True):
            assert ours.dtype == theirs.dtype
            assert off(ours, theirs) < 1e-2


def test_more_tokens_than_a_sum_has_steps_at_a_time() -> None:
    layers = [layer(64, 32)]
    x, ab = halves(1, 32 * 150 + 7, 64), adapters(layers, 16)
    wanted = computed(functools.partial(exact, layers), x, ab, torch.float64)
    got = computed(lambda x, *ab: FusedLinear.apply(x, members(layers, tiled_lora), *ab), x, ab)
    assert all(off(ours, right) < 5e-3 for ours, right in zip(got, wanted, strict=True))


def test_weights_that_are_exchanged_before_the_backward_pass_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [layer(64, 128), layer(64, 128), layer(128, 64)]
    x, ab = halves(40, 64).requires_grad_(), adapters(layers, 8)
    known = members(layers, tiled_lora)
    y, z = FusedMLP.apply(x, known, "silu", loops, *ab), FusedLinear.apply(x, known[:1], ab[0], ab[3])[0]
    monkeypatch.setattr(tiled_lora, "adapters_of", lambda *args: None)
    for out in (y, z):
        with pytest.raises(RuntimeError, match="exchanged"):
            out.sum().backward()


def test_several_threads_compute_at_a_time_what_one_does() -> None:
    layers = [layer(576, 576), layer(576, 192)]
    x, ab = halves(2, 96, 576), adapters(layers, 16)

    def compute(_: int) -> list[Tensor]:
        return computed(lambda x, *ab: FusedLinear.apply(x, members(layers, tiled_lora), *ab), x, ab)

    wanted = compute(0)
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        for got in pool.map(compute, range(6)):
            assert all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True))


@pytest.mark.parametrize(("rows", "columns"), [(64, 576), (45, 9216)])
def test_dropout_is_drawn_and_passed_on_as_ever(rows: int, columns: int) -> None:
    layers = [layer(columns, 96, bias=True)]
    x, ab = halves(1, rows, columns), adapters(layers, 16)
    torch.manual_seed(3)
    kept = torch.empty_like(x).bernoulli_(0.7).double() / 0.7
    wanted = computed(functools.partial(exact, layers, kept=kept), x, ab, torch.float64)
    usual = computed(lambda x, *ab: FusedLinear.apply(x, members(layers, None, 0.3), *ab), x, ab)
    got = computed(lambda x, *ab: FusedLinear.apply(x, members(layers, tiled_lora, 0.3), *ab), x, ab)
    for ours, theirs, right in zip(got, usual, wanted, strict=True):
        assert off(ours, right) <= 1.02 * off(theirs, right)


@pytest.mark.parametrize(("activation", "rows"), [("silu", 256), ("gelu_tanh", 77)])
@pytest.mark.parametrize("longest", [tiled_lora.LONGEST, 0])
def test_a_gated_mlp_is_as_close_to_float64_as_by_the_usual_products(
    activation: str, rows: int, longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiled_lora, "LONGEST", longest)  # up to which gates are computed between products
    layers = [layer(64, 192), layer(64, 192, bias=True), layer(192, 64)]
    x, ab = halves(2, rows, 64), adapters(layers, 16)
    act = {"silu": torch.nn.functional.silu, "gelu_tanh": functools.partial(torch.nn.functional.gelu, approximate="tanh")}

    def mlp(x: Tensor, *ab: Tensor) -> Tensor:
        gate, up = exact(layers[:2], x, *ab[:2], *ab[3:5])
        return exact(layers[2:], act[activation](gate) * up, ab[2], ab[5])[0]

    wanted = computed(mlp, x, ab, torch.float64)
    usual = computed(lambda x, *ab: FusedMLP.apply(x, members(layers, None), activation, loops, *ab), x, ab)
    got = computed(lambda x, *ab: FusedMLP.apply(x, members(layers, tiled_lora), activation, loops, *ab), x, ab)
    for ours, theirs, right in zip(got, usual, wanted, strict=True):
        assert off(ours, right) <= 1.03 * off(theirs, right)


@pytest.mark.parametrize("rows", [32, 128])
def test_an_mlp_may_have_more_or_fewer_outputs_than_inputs(rows: int) -> None:
    layers = [layer(64, 192), layer(64, 192), layer(192, rows)]
    x, ab = halves(2, 40, 64), adapters(layers, 8)
    usual = computed(lambda x, *ab: FusedMLP.apply(x, members(layers, None), "silu", loops, *ab), x, ab)
    got = computed(lambda x, *ab: FusedMLP.apply(x, members(layers, tiled_lora), "silu", loops, *ab), x, ab)
    for ours, theirs in zip(got, usual, strict=True):
        assert ours.shape == theirs.shape
        assert off(ours, theirs) < 2e-2


@pytest.mark.parametrize("activation", loops.GATES)
def test_gates_of_numbers_of_any_size_are_those_of_loops(activation: str) -> None:
    given = halves(64, 64) * 20
    given[0, :4] = torch.tensor([0.0, 1e30, -60.0, -80.0])
    eye, nothing, ones = torch.eye(64).bfloat16(), torch.zeros(64, 64).bfloat16(), torch.ones(64, 64).bfloat16()
    chain = Chain()
    right = [(Right.plain(given), Right.plain(nothing)), (Right.plain(ones), Right.plain(nothing))]
    gate, up, product = chain.gated(eye, eye, right, [None, None], activation)
    chain.run()
    assert torch.equal(gate, blocks_of(given))
    torch.testing.assert_close(product, loops.gated(gate, up, activation), rtol=2**-7, atol=1e-20)
    chain = Chain()
    got = chain.gated_backward(gate, up, (eye, Right.plain(given)), activation=activation)
    chain.run()
    wanted = loops.gated_backward(blocks_of(given), gate, up, activation)
    for ours, theirs in zip(got, wanted, strict=True):
        known = theirs.isfinite()  # (the square of 1e30 is not)
        assert int(known.sum()) >= theirs.numel() - 1
        torch.testing.assert_close(ours[known], theirs[known], rtol=2**-6, atol=1e-5)


def test_without_gradients_the_same_bits_come_out() -> None:
    layers = [layer(64, 96), layer(64, 32, bias=True)]
    x, ab = halves(50, 64), adapters(layers, 8)
    known = members(layers, tiled_lora)
    with_gradients = FusedLinear.apply(x.clone().requires_grad_(), known, *ab)
    for ours, wanted in zip(infer(x, known, ab), with_gradients, strict=True):
        assert torch.equal(ours, wanted)


def test_what_tiles_do_not_take_is_computed_by_the_usual_products() -> None:
    for own, dtype in ((layer(64, 48), torch.bfloat16), (layer(64, 64), torch.float32), (layer(64, 64), torch.float16)):
        x, ab = halves(40, own.in_features).to(dtype), adapters([own], 4)
        known = members([own], tiled_lora)
        assert tiled_lora.adapters_of(x, known, ab[:1], ab[1:]) is None
        assert torch.equal(infer(x, known, ab)[0], forward(x, known, *matrices(ab, known, dtype))[0][0])


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_bits_are_the_same_whatever_the_threads(threads: None) -> None:
    layers = [layer(576, 576), layer(576, 192), layer(576, 192)]
    x, ab = halves(2, 128, 576), adapters(layers, 16)
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append(computed(lambda x, *ab: FusedLinear.apply(x, members(layers, tiled_lora), *ab), x, ab))
    for others in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(results[0], others, strict=True))


def test_a_weight_is_never_written_as_a_matrix() -> None:
    own = layer(4096, 2048)
    x, ab, known = halves(32, 4096), adapters([own], 8), members([own], tiled_lora)
    with torch.profiler.profile(profile_memory=True) as profile:
        computed(lambda x, *ab: FusedLinear.apply(x, known, *ab), x, ab)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest < 2048 * 4096  # bytes; Q(W) would be twice as many
    assert PANELS < 2048 * 4096


def test_with_a_compiler_that_is_too_old_a_model_is_computed_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert rewriting._tiles() is tiled_lora
    monkeypatch.setattr(jit, "has_tiles", lambda: False)
    with caplog.at_level("INFO", logger="qlora_core"):
        assert rewriting._tiles() is None
    assert "pip install -U numba" in caplog.text
    monkeypatch.setattr(rewriting, "has_amx", lambda: False)
    caplog.clear()
    assert rewriting._tiles() is None
    assert not caplog.text


def test_a_model_that_was_loaded_where_there_are_no_tiles_is_computed_without(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [layer(64, 64)]
    x, ab, known = halves(40, 64), adapters(layers, 4), members(layers, tiled_lora)
    monkeypatch.setattr(tiled_lora, "has_tiles", lambda: False)
    assert torch.equal(infer(x, known, ab)[0], forward(x, known, *matrices(ab, known, x.dtype))[0][0])
