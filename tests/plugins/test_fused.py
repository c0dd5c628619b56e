"""Each part of the kernels `fused` against its formula: values and gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from qlora_fused import Fused, blockwise, mlp, norms, rotary
from qlora_fused.lora import fuse_group, fusible

EXACT = {"rtol": 1e-4, "atol": 1e-5}


class Three(nn.Module):
    """Three linear layers with one input, one of them with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(64, 48), nn.Linear(64, 32, bias=False), nn.Linear(64, 16, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.one(x), self.two(x), self.three(x)], dim=-1)


def adapted(module: nn.Module, targets: tuple[str, ...] = ("one", "two", "three"), **options: Any) -> Any:
    torch.manual_seed(0)
    made = get_peft_model(module.requires_grad_(False), LoraConfig(r=4, lora_alpha=12, target_modules=list(targets), **options))
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    return made


def layers_of(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def both(model: Any, x: torch.Tensor, seed: int = 3) -> list[dict[str, torch.Tensor]]:
    """Return output and gradients of *model*, as PEFT computes it, and with its layers fused as one group."""
    results = []
    for fuse in (False, True):
        mine = copy.deepcopy(model)
        if fuse:
            fuse_group(layers_of(mine))
        given = x.clone().requires_grad_()
        torch.manual_seed(seed)
        y = mine(given)
        y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape).sin())
        grads = {name: p.grad for name, p in mine.named_parameters() if p.requires_grad}
        results.append({"y": y.detach(), "x": given.grad, **grads})
    return results


def assert_alike(wanted: dict[str, torch.Tensor], got: dict[str, torch.Tensor]) -> None:
    assert wanted.keys() == got.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, **EXACT, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_group_computes_what_peft_does_and_drops_the_same(dropout: float) -> None:
    assert_alike(*both(adapted(Three(), lora_dropout=dropout), torch.randn(2, 5, 64)))


def test_packed_layers_compute_what_peft_does() -> None:
    three = Three()
    for name, layer in list(three.named_children()):
        packed = Linear4bit(64, layer.out_features, bias=layer.bias is not None, compute_dtype=torch.float32, quant_type="nf4")
        packed.load_state_dict(layer.state_dict())
        packed.support_avx512bf16_for_cpu = False
        setattr(three, name, packed.to("cpu"))
    assert all(layer.weight.quant_state is not None for layer in three.children())
    model = adapted(three)
    assert all(fusible(layer) for layer in layers_of(model))
    assert_alike(*both(model, torch.randn(3, 64)))


def test_what_is_computed_for_the_group_is_not_given_to_another_input() -> None:
    model = adapted(Three())
    layers = layers_of(model)
    x, other = torch.randn(2, 4, 64)
    wanted = layers[1](other)
    fuse_group(layers)
    layers[0](x)
    torch.testing.assert_close(layers[1](other), wanted, **EXACT)


@pytest.mark.parametrize("state", ["disabled", "merged", "two", "dora"])
def test_what_only_peft_can_compute_is_left_to_it(state: str) -> None:
    model = adapted(Three(), use_dora=state == "dora")
    x = torch.randn(4, 64)
    if state == "two":
        model.add_adapter("other", LoraConfig(r=2, target_modules=["one", "two", "three"], init_lora_weights=False))
        model.base_model.set_adapter(["default", "other"])
    if state == "merged":
        model.merge_adapter()
    fused = copy.deepcopy(model)
    fuse_group(layers_of(fused))
    if state == "disabled":
        with model.disable_adapter(), fused.disable_adapter():
            assert torch.equal(fused(x), model(x))
    else:
        assert torch.equal(fused(x), model(x))


def test_without_gradients_the_result_is_the_same() -> None:
    model = adapted(Three())
    x = torch.randn(1, 64)
    fused = copy.deepcopy(model)
    fuse_group(layers_of(fused))
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x), **EXACT)


def test_embeddings_and_layers_that_train_are_not_fusible() -> None:
    assert not fusible(layers_of(adapted(nn.Sequential(nn.Embedding(9, 8)), targets=("0",)))[0])
    assert not fusible(layers_of(adapted(Three(), bias="all"))[0])
    assert not fusible(nn.Linear(4, 4))


class Gated(nn.Module):
    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(24, 40), nn.Linear(24, 40, bias=False)
        self.down_proj, self.act_fn = nn.Linear(40, 24), act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


@pytest.mark.parametrize(("act", "name"), [(nn.SiLU(), "silu"), (nn.GELU(), "gelu"), (nn.GELU("tanh"), "gelu_tanh")])
def test_a_gated_mlp_computes_what_its_parts_do(act: nn.Module, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlp, "WORKED_ON", 40 * 3)  # rows in pieces of three
    assert mlp.activation_of(act) == name
    plain = adapted(Gated(act), targets=("gate_proj", "up_proj", "down_proj"))
    fused = copy.deepcopy(plain)
    mlp.fuse_mlp(fused.base_model.model, name)
    results = []
    for model in (plain, fused):
        x = torch.linspace(-2, 2, 7 * 24).sin_().view(1, 7, 24).requires_grad_()
        y = model(x)
        y.backward(torch.linspace(0, 1, y.numel()).view(y.shape))
        results.append({"y": y.detach(), "x": x.grad, **{n: p.grad for n, p in model.named_parameters() if p.requires_grad}})
    assert_alike(*results)


def test_an_unknown_activation_is_none_of_ours() -> None:
    assert mlp.activation_of(nn.ReLU()) is None


class Norm(nn.Module):
    def __init__(self, plus: int) -> None:
        super().__init__()
        self.weight, self.eps, self.plus = nn.Parameter(torch.linspace(0.5, 2, 32), requires_grad=False), 1e-5, plus

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (32,), self.weight + self.plus, self.eps)


def gradient(module: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    given = x.clone().requires_grad_()
    y = module(given)
    (grad,) = torch.autograd.grad(y, given, torch.linspace(-1, 2, y.numel()).view(y.shape).to(y.dtype))
    return y.detach(), grad


@pytest.mark.parametrize("plus", [0, 1])
def test_an_rms_norm_is_known_by_what_it_computes_and_computes_the_same(plus: int) -> None:
    module, x = Norm(plus), torch.randn(2, 3, 32) * 3
    wanted = gradient(module, x)
    assert norms.rms_norm_of(module) == (1e-5, plus)
    norms.fuse_rms_norm(module, 1e-5, plus, lambda x: x.dtype)
    for one, other in zip(gradient(module, x), wanted, strict=True):
        torch.testing.assert_close(one, other, **EXACT)


def test_a_norm_with_a_weight_of_zero_is_left_alone_for_its_input_is_lost() -> None:
    module = Norm(0)
    module.weight[3] = 0
    assert norms.rms_norm_of(module) is None
    assert norms.rms_norm_of(nn.LayerNorm(8, bias=False).requires_grad_(False)) is None


def test_a_layer_norm_computes_in_float32() -> None:
    module, x = nn.LayerNorm(32).requires_grad_(False), torch.randn(4, 32)
    wanted = gradient(module, x)
    norms.fuse_layer_norm(module.bfloat16(), lambda x: torch.bfloat16)
    y, grad = gradient(module, x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), wanted[0], rtol=5e-3, atol=5e-3)
    torch.testing.assert_close(grad, wanted[1], rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("dim", [1, 2])
def test_rotary_positions_are_those_of_transformers(dim: int) -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8)
    q, k = (t if dim == 1 else t.transpose(1, 2) for t in (q, k))
    cos, sin = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    for index in (0, 1):
        results = []
        for turn in (apply_rotary_pos_emb, rotary.apply_rotary_pos_emb):
            given = [q, k]

            def rotated(
                x: torch.Tensor, turn: Any = turn, given: list[torch.Tensor] = given, index: int = index
            ) -> torch.Tensor:
                pair = [x if at == index else other for at, other in enumerate(given)]
                return turn(*pair, cos, sin, dim)[index]

            results.append(gradient(rotated, given[index]))
        for wanted, got in zip(*results, strict=True):
            torch.testing.assert_close(got, wanted, **EXACT)


def test_rotary_positions_of_a_part_of_each_head_are_those_of_gpt_neox() -> None:
    from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb

    q, k, cos, sin = torch.randn(2, 3, 5, 16), torch.randn(2, 3, 5, 16), torch.randn(2, 5, 4), torch.randn(2, 5, 4)
    wanted, got = (
        gradient(lambda x, f=f: f(x, k, cos, sin)[0], q) for f in (apply_rotary_pos_emb, rotary.apply_rotary_pos_emb)
    )
    for one, other in zip(wanted, got, strict=True):
        torch.testing.assert_close(other, one, **EXACT)


@pytest.mark.parametrize("saved", [0, blockwise.SAVED])
@pytest.mark.parametrize(
    ("heads", "shared", "length", "value"), [(4, 4, 150, 16), (6, 2, 256, 16), (3, 1, 300, 24), (2, 2, 7, 16)]
)
def test_attention_in_blocks_is_causal_attention(
    heads: int, shared: int, length: int, value: int, saved: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blockwise, "SAVED", saved)
    torch.manual_seed(0)
    q, k = torch.randn(2, heads, length, 16), torch.randn(2, shared, length, 16)
    v = torch.randn(2, shared, length, value)

    def reference(*tensors: torch.Tensor) -> torch.Tensor:
        one, two, three = (t.double() for t in tensors)
        two, three = (t.repeat_interleave(heads // shared, dim=1) for t in (two, three))
        scores = (one @ two.transpose(-1, -2) * 0.3).masked_fill(~torch.ones(length, length).tril().bool(), float("-inf"))
        return (scores.softmax(-1) @ three).transpose(1, 2)

    results = []
    for attend in (reference, lambda *t: blockwise.Blockwise.apply(*t, 0.3)):
        given = [t.clone().requires_grad_() for t in (q, k, v)]
        out = attend(*given)
        out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape).sin())
        results.append([out.detach().float(), *(t.grad for t in given)])
    for wanted, got in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, **EXACT)


def test_scores_are_not_rounded_in_autocast() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 4, 200, 64).mul(2).bfloat16() for _ in range(3))
    wanted = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True).transpose(1, 2)
    theirs = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, _ = blockwise.attention(nn.Module(), q.float(), k.float(), v.float(), None)
    assert (ours - wanted).norm() <= 1.4 * (theirs - wanted).norm()


@pytest.mark.parametrize("part", ["linear", "mlp", "norm", "rotary", "attention", "keep_pages"])
def test_each_part_can_be_left_out(part: str) -> None:
    options = Fused(**{part: False}).options
    assert not getattr(options, part)
    assert sum(options.model_dump().values()) == 5
