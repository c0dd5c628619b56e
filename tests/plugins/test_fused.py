"""The parts of the kernels `fused` against formulas written out in float64, and what they must leave to PEFT."""

from __future__ import annotations

import copy
import importlib.util
import logging
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
import transformers
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from qlora_bitsandbytes import NF4
from qlora_core import inject_adapter, load_model
from qlora_core.attention import Documents, base_of
from qlora_core.attention import _attention as attention_of_documents
from qlora_core.testing.tiny import tiny_config, tiny_ids
from qlora_fused import Fused, blockwise, rewriting
from qlora_fused.lora import fuse_group, fusible
from qlora_fused.mlp import activation_of, fuse_mlp
from qlora_fused.norms import fuse_layer_norm, fuse_rms_norm, rms_norm_of
from qlora_fused.rotary import apply_rotary_pos_emb
from qlora_peft import LoRA

pytestmark = pytest.mark.filterwarnings("ignore")

SCALE = 1.5  # alpha / r
NEAR = 2e-6  # float32 arithmetic, relative to the whole tensor


def error(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


def values(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def gradients(y: Tensor, inputs: Iterable[Tensor], seed: int = 9) -> list[Tensor]:
    """Return the gradients of a random linear function of y, the same for every dtype."""
    return list(torch.autograd.grad(y, list(inputs), values(*y.shape, seed=seed).to(y.dtype)))


# LoRA


class Three(nn.Module):
    """Layers with one input, with and without bias."""

    names = ("one", "two", "three")

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(64, 48), nn.Linear(64, 32, bias=False), nn.Linear(64, 128)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.two(x), self.three(x)], dim=-1)


class Gated(nn.Module):
    names = ("gate_proj", "up_proj", "down_proj")

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(64, 128), nn.Linear(64, 128, bias=False)
        self.down_proj, self.act_fn = nn.Linear(128, 64), act

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def adapted(module: Any, *, packed: bool = False, rank: int = 4, **options: Any) -> Any:
    """Return *module* with LoRA on its layers, all matrices and biases random."""
    for index, (name, layer) in enumerate((name, getattr(module, name)) for name in module.names):
        layer.weight.data = values(*layer.weight.shape, seed=index) / layer.in_features**0.5
        if layer.bias is not None:
            layer.bias.data = values(layer.out_features, seed=10 + index)
        if packed:
            made = Linear4bit(
                layer.in_features,
                layer.out_features,
                bias=layer.bias is not None,
                compute_dtype=torch.float32,
                quant_type="nf4",
            )
            made.load_state_dict(layer.state_dict())
            made.support_avx512bf16_for_cpu = False  # which would pack the weights once more
            setattr(module, name, made.to("cpu"))
    module.is_loaded_in_4bit = packed
    config = LoraConfig(r=rank, lora_alpha=rank * SCALE, target_modules=list(module.names), **options)
    model = get_peft_model(module.requires_grad_(False), config)
    for index, layer in enumerate(layers_of(model)):
        layer.lora_A["default"].weight.data = values(*layer.lora_A["default"].weight.shape, seed=20 + index) / 8
        layer.lora_B["default"].weight.data = values(*layer.lora_B["default"].weight.shape, seed=30 + index) / 2
    return model


def layers_of(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def adapters_of(layer: Any) -> list[Tensor]:
    return [layer.lora_A["default"].weight, layer.lora_B["default"].weight]


def parts_of(layer: Any) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Return Q(W), b, A and B in float64; A and B are leaves."""
    base = layer.get_base_layer()
    weight = dequantize_4bit(base.weight.data, base.weight.quant_state) if isinstance(base, Linear4bit) else base.weight
    bias = None if base.bias is None else base.bias.detach().double()
    a, b = (part.detach().double().requires_grad_() for part in adapters_of(layer))
    return weight.detach().double(), bias, a, b


def low_rank(x: Tensor, parts: Sequence[Any], mask: Tensor | float = 1.0) -> Tensor:
    """Return x W^T + b + s ((x * mask) A^T) B^T."""
    weight, bias, a, b = parts
    return x @ weight.T + (0 if bias is None else bias) + SCALE * ((x * mask) @ a.T) @ b.T


def assert_near(got: Sequence[Tensor], wanted: Sequence[Tensor], limit: float = NEAR) -> None:
    errors = [error(one, other) for one, other in zip(got, wanted, strict=True)]
    assert max(errors) < limit, errors


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("shape", [(64,), (2, 5, 64)])
def test_lora_is_its_formula_in_values_and_gradients(packed: bool, grouped: bool, shape: tuple[int, ...]) -> None:
    model = adapted(Three(), packed=packed)
    layers = layers_of(model)
    assert all(fusible(layer) for layer in layers)
    assert all(isinstance(layer.get_base_layer(), Linear4bit) == packed for layer in layers)
    parts = [parts_of(layer) for layer in layers]
    for group in [layers] if grouped else [[layer] for layer in layers]:
        fuse_group(group)
    x = values(*shape, seed=5).requires_grad_()
    reference = x.detach().double().requires_grad_()
    y, wanted = model(x), torch.cat([low_rank(reference, part) for part in parts], dim=-1)
    ours = gradients(y, [x, *(matrix for layer in layers for matrix in adapters_of(layer))])
    theirs = gradients(wanted, [reference, *(matrix for part in parts for matrix in part[2:])])
    assert_near([y, *ours], [wanted, *theirs])


def test_the_packed_weights_above_are_rounded_ones() -> None:
    layer = layers_of(adapted(Three(), packed=True))[0]
    plain = adapted(Three()).base_model.model.one.get_base_layer()
    assert 0.02 < error(parts_of(layer)[0], plain.weight) < 0.2  # so the formulas are of Q(W), not of W


@pytest.mark.parametrize("packed", [False, True])
def test_an_input_without_gradient_gets_none_and_the_adapters_get_theirs(packed: bool) -> None:
    model = adapted(Three(), packed=packed)
    layers = layers_of(model)
    parts = [parts_of(layer) for layer in layers]
    fuse_group(layers)
    x = values(6, 64, seed=5)
    wanted = torch.cat([low_rank(x.double(), part) for part in parts], dim=-1)
    y = model(x)
    y.backward(values(*y.shape, seed=9))
    assert x.grad is None
    theirs = gradients(wanted, [matrix for part in parts for matrix in part[2:]])
    assert_near([matrix.grad for layer in layers for matrix in adapters_of(layer)], theirs)


@pytest.mark.parametrize("packed", [False, True])
def test_dropout_draws_what_peft_draws_and_follows_the_formula(packed: bool) -> None:
    rate = 0.4
    model = adapted(Three(), packed=packed, lora_dropout=rate)
    layers = layers_of(model)
    parts = [parts_of(layer) for layer in layers]
    x = values(3, 7, 64, seed=5).requires_grad_()
    torch.manual_seed(11)
    masks = [torch.empty(3, 7, 64).bernoulli_(1 - rate).double() / (1 - rate) for _ in layers]
    torch.manual_seed(11)
    by_peft = model(x).detach()
    fuse_group(layers)
    torch.manual_seed(11)
    y = model(x)
    reference = x.detach().double().requires_grad_()
    wanted = torch.cat([low_rank(reference, part, mask) for part, mask in zip(parts, masks, strict=True)], dim=-1)
    ours = gradients(y, [x, *(matrix for layer in layers for matrix in adapters_of(layer))])
    theirs = gradients(wanted, [reference, *(matrix for part in parts for matrix in part[2:])])
    assert_near([by_peft, y, *ours], [wanted, wanted, *theirs])
    assert_near([model.eval()(x)], [torch.cat([low_rank(reference, part) for part in parts], dim=-1)])


def test_dropout_draws_the_same_in_autocast() -> None:
    model = adapted(Three(), lora_dropout=0.4)
    x = values(3, 7, 64, seed=5)
    found = []
    for fuse in (False, True):
        if fuse:
            fuse_group(layers_of(model))
        torch.manual_seed(11)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found.append(model(x).float())
    torch.manual_seed(12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        other = model(x).float()
    assert error(found[1], found[0]) < 0.01
    assert error(other, found[0]) > 0.1


def test_in_autocast_sums_are_rounded_once() -> None:
    model = adapted(Three())
    parts = [parts_of(layer) for layer in layers_of(model)]
    x = values(40, 64, seed=5).bfloat16()
    wanted = torch.cat([low_rank(x.double(), part) for part in parts], dim=-1)
    errors = []
    for fuse in (False, True):
        if fuse:
            fuse_group(layers_of(model))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = model(x)
        assert y.dtype == torch.bfloat16
        errors.append(error(y, wanted))
    assert errors[1] < 1.02 * errors[0] < 0.01


def test_a_layer_called_alone_or_again_uses_the_adapter_as_it_is_now() -> None:
    model = adapted(Three())
    layers = layers_of(model)
    fuse_group(layers)
    x = values(4, 64, seed=5)
    model(x)
    adapters_of(layers[1])[1].data.mul_(3)
    assert_near([layers[1](x)], [low_rank(x.double(), parts_of(layers[1]))])
    assert_near([model(x)], [torch.cat([low_rank(x.double(), parts_of(layer)) for layer in layers], dim=-1)])


# Gated MLPs

FORMULAS: dict[str, tuple[nn.Module, Callable[[Tensor], Tensor]]] = {
    "silu": (nn.SiLU(), lambda x: x / (1 + (-x).exp())),
    "gelu": (nn.GELU(), lambda x: x * (1 + torch.special.erf(x / 2**0.5)) / 2),
    "gelu_tanh": (nn.GELU("tanh"), lambda x: x * (1 + ((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)).tanh()) / 2),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", FORMULAS)
def test_a_gated_mlp_is_its_formula_in_values_and_gradients(name: str, packed: bool) -> None:
    act, formula = FORMULAS[name]
    assert activation_of(act) == name
    model = adapted(Gated(act), packed=packed)
    layers = layers_of(model)
    gate, up, down = parts = [parts_of(layer) for layer in layers]
    fuse_mlp(model.base_model.model, name)
    x = values(2, 5, 64, seed=5).requires_grad_()
    reference = x.detach().double().requires_grad_()
    y, wanted = model(x), low_rank(formula(low_rank(reference, gate)) * low_rank(reference, up), down)
    ours = gradients(y, [x, *(matrix for layer in layers for matrix in adapters_of(layer))])
    theirs = gradients(wanted, [reference, *(matrix for part in parts for matrix in part[2:])])
    assert_near([y, *ours], [wanted, *theirs])


def test_a_gated_mlp_with_dropout_draws_what_peft_draws() -> None:
    model = adapted(Gated(nn.SiLU()), lora_dropout=0.3)
    x = values(2, 5, 64, seed=5)
    torch.manual_seed(3)
    wanted = model(x)
    fuse_group(layers_of(model)[:2])
    fuse_group(layers_of(model)[2:])
    fuse_mlp(model.base_model.model, "silu")
    torch.manual_seed(3)
    assert_near([model(x)], [wanted])


class Other(Gated):
    """What takes the same parts, and is no gated MLP by its *way*."""

    def __init__(self, way: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__(nn.SiLU())
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        return self.way(self, x)


def sized(mlp: Any, x: Tensor) -> Tensor:
    assert x.shape[-1] == 64
    return Gated.forward(mlp, x)


def sparse(mlp: Any, x: Tensor) -> Tensor:
    gate = mlp.gate_proj(x)
    return mlp.down_proj(mlp.act_fn(torch.relu(gate - gate.mean(-1, keepdim=True))) * mlp.up_proj(x))


OTHERS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "residual": lambda mlp, x: x + Gated.forward(mlp, x),
    "exchanged": lambda mlp, x: mlp.down_proj(mlp.act_fn(mlp.up_proj(x)) * mlp.gate_proj(x)),
    "ungated": lambda mlp, x: mlp.down_proj(mlp.act_fn(mlp.gate_proj(x))),
    "clamped": lambda mlp, x: mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)).clamp(max=100) * mlp.up_proj(x)),
    "clamped gate": lambda mlp, x: mlp.down_proj(mlp.act_fn(mlp.gate_proj(x).clamp(max=7)) * mlp.up_proj(x)),
    "clamped up": lambda mlp, x: mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x).clamp(-1000, 1000)),
    "with an assertion": sized,
    "sparse": sparse,
    "by its weights": lambda mlp, x: mlp.down_proj(mlp.act_fn(x @ mlp.gate_proj.weight.T) * mlp.up_proj(x)),
    "two inputs": lambda mlp, x, y: x + y,
}


@pytest.mark.parametrize("way", OTHERS)
def test_what_only_looks_like_a_gated_mlp_is_left_alone(way: str) -> None:
    found = [adapted(module, packed=True).base_model.model for module in (Gated(nn.SiLU()), Other(OTHERS[way]))]
    children = [dict(module.named_children()) for module in found]
    assert [rewriting._mlps(module, None) for module in found] == [1, 0]
    assert [dict(module.named_children()) for module in found] == children


# What PEFT must compute


def left_to_peft(state: str, module: Any) -> tuple[Any, Any]:
    """Return a model in a *state* that only PEFT knows, and a copy with every part fused."""
    model = adapted(module, use_dora=state == "dora", lora_bias=state == "bias of the adapter")
    if state == "two active":
        model.add_adapter("other", LoraConfig(r=2, target_modules=list(module.names), init_lora_weights=False))
        model.base_model.set_adapter(["default", "other"])
    fused = copy.deepcopy(model)
    fuse_group(layers_of(fused)[:2])
    fuse_group(layers_of(fused)[2:])
    if isinstance(module, Gated):
        fuse_mlp(fused.base_model.model, "silu")
    if state == "merged":
        model.merge_adapter()
        fused.merge_adapter()
    return model, fused


@pytest.mark.parametrize("state", ["merged", "two active", "dora", "bias of the adapter"])
@pytest.mark.parametrize("module", [Three(), Gated(nn.SiLU())], ids=["layers", "mlp"])
def test_what_only_peft_can_compute_is_what_peft_computes(module: nn.Module, state: str) -> None:
    model, fused = left_to_peft(state, copy.deepcopy(module))
    x = values(2, 5, 64, seed=5)
    assert torch.equal(fused(x), model(x))


@pytest.mark.parametrize("module", [Three(), Gated(nn.SiLU())], ids=["layers", "mlp"])
def test_a_disabled_adapter_is_out_and_back_again_afterwards(module: nn.Module) -> None:
    model, fused = left_to_peft("enabled", copy.deepcopy(module))
    x = values(2, 5, 64, seed=5)
    with model.disable_adapter(), fused.disable_adapter():
        off = model(x)
        assert torch.equal(fused(x), off)
    assert error(model(x), off) > 0.1
    assert_near([fused(x)], [model(x)])


@pytest.mark.parametrize("module", [Three(), Gated(nn.SiLU())], ids=["layers", "mlp"])
def test_a_chosen_adapter_is_the_one_that_is_computed(module: nn.Module) -> None:
    model, fused = left_to_peft("two active", copy.deepcopy(module))
    x = values(2, 5, 64, seed=5)
    for name in ("other", "default"):
        for one in (model, fused):
            one.set_adapter(name)
        assert_near([fused(x)], [model(x)])


@pytest.mark.parametrize("module", [Three(), Gated(nn.SiLU())], ids=["layers", "mlp"])
def test_the_model_that_an_adapter_is_merged_into_computes_without_it(module: nn.Module) -> None:
    model, fused = left_to_peft("enabled", copy.deepcopy(module))
    x = values(2, 5, 64, seed=5)
    wanted = model(x)
    assert_near([fused.merge_and_unload()(x)], [wanted])


@pytest.mark.parametrize("module", [Three(), Gated(nn.SiLU())], ids=["layers", "mlp"])
def test_a_batch_with_an_adapter_for_each_row_is_left_to_peft(module: nn.Module) -> None:
    model, fused = left_to_peft("two active", copy.deepcopy(module))
    for one in (model, fused):
        one.set_adapter("default")
    x = values(3, 5, 64, seed=5)
    names = ["default", "other", "__base__"]
    results = [one.eval()(x, adapter_names=names) for one in (model, fused)]
    assert torch.equal(*results)


@pytest.mark.parametrize("module", [Three(), Gated(nn.SiLU())], ids=["layers", "mlp"])
def test_a_copy_computes_with_its_own_adapter(module: nn.Module) -> None:
    _, fused = left_to_peft("enabled", copy.deepcopy(module))
    copied = copy.deepcopy(fused)
    x = values(2, 5, 64, seed=5)
    before = fused(x)
    for layer in layers_of(copied):
        adapters_of(layer)[1].data.zero_()
    with fused.disable_adapter():
        off = fused(x)
    assert_near([copied(x), fused(x)], [off, before])


def test_layers_of_other_kinds_are_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    config = transformers.AutoConfig.for_model("gpt2", vocab_size=64, n_embd=32, n_head=2, n_layer=1, n_positions=32)
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_config(config)
    model: Any = get_peft_model(base, LoraConfig(r=2, target_modules=["c_attn", "c_fc", "wte"], init_lora_weights=False))
    model.eval()
    ids = torch.arange(20)[None]
    wanted = model(ids).logits
    with caplog.at_level(logging.DEBUG, "qlora_core"):
        rewriting.rewrite(model, Fused(keep_pages=False, attention=False, loss=False).options)
    assert len(layers_of(model)) == 3
    assert not any(fusible(layer) or "forward" in vars(layer) for layer in layers_of(model))
    assert torch.equal(model(ids).logits, wanted)
    assert "nothing here applies" in caplog.text
    for name in ("transformer.h.0.attn.c_attn (Conv1D)", "transformer.h.0.mlp.c_fc (Conv1D)", "transformer.wte (Embedding)"):
        assert f"{name} is left alone" in caplog.text


def test_layers_that_are_left_alone_are_named_beside_those_that_are_replaced(caplog: pytest.LogCaptureFixture) -> None:
    base = load_model(tiny_config(), NF4())
    model: Any = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], init_lora_weights=False))
    ids = tiny_ids(model)
    with torch.no_grad():
        wanted = model.eval()(ids, use_cache=False).logits
        with caplog.at_level(logging.DEBUG, "qlora_core"):
            Fused(keep_pages=False).apply(model)
        assert error(model(ids, use_cache=False).logits, wanted) < 1e-5
    said = [record.getMessage() for record in caplog.records if "is left alone" in record.getMessage()]
    assert [line.partition(": ")[2].split(" ")[0] for line in said] == ["model.embed_tokens"]
    assert "2 LoRA layers" in caplog.text
    assert "no MLPs of the kind that is replaced" in caplog.text


def test_weights_packed_in_a_tensor_of_their_own_class_are_left_to_it() -> None:
    pytest.importorskip("torchao")
    from qlora_torchao import AOInt8

    model: Any = inject_adapter(load_model(tiny_config(), AOInt8()), LoRA(r=4))
    ids = tiny_ids(model)
    with torch.no_grad():
        wanted = model(ids, use_cache=False).logits
        assert not any(fusible(layer) for layer in layers_of(model))
        assert error(Fused(keep_pages=False).apply(model)(ids, use_cache=False).logits, wanted) < 1e-5
    assert model.train()(ids, use_cache=False).logits.requires_grad


def test_layers_whose_base_trains_are_not_fusible() -> None:
    layers = layers_of(adapted(Three()))
    assert all(fusible(layer) for layer in layers)
    layers[0].get_base_layer().bias.requires_grad_()
    assert [fusible(layer) for layer in layers] == [False, True, True]


# Norms


class Norm(nn.Module):
    """RMSNorm with a scale of weight + plus."""

    def __init__(self, plus: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(values(48, seed=3) * 0.3 + 1 - plus, requires_grad=False)
        self.variance_epsilon, self.plus = eps, plus

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight + self.plus, self.variance_epsilon)


@pytest.mark.parametrize("plus", [0, 1])
@pytest.mark.parametrize("eps", [1e-6, 1e-3])
def test_an_rms_norm_is_its_formula_also_where_eps_counts(plus: int, eps: float) -> None:
    module = Norm(plus, eps)
    assert rms_norm_of(module) == (eps, plus)
    fuse_rms_norm(module, eps, plus, lambda x: x.dtype)
    x = (values(2, 7, 48, seed=5) * 0.03).requires_grad_()  # mean of squares: 1e-3
    wide = x.detach().double().requires_grad_()
    wanted = wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * (module.weight.double() + plus)
    y = module(x)
    assert_near([y, *gradients(y, [x])], [wanted, *gradients(wanted, [wide])])


@pytest.mark.parametrize("plus", [0, 1])
def test_an_rms_norm_of_a_float32_stream_is_rounded_once_to_bfloat16(plus: int) -> None:
    module = Norm(plus, 1e-6)
    fuse_rms_norm(module, 1e-6, plus, lambda x: torch.bfloat16)
    x = values(5, 48, seed=5).requires_grad_()
    wide = x.detach().double().requires_grad_()
    wanted = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (module.weight.double() + plus)
    y = module(x)
    assert y.dtype == torch.bfloat16
    assert bool(((y.double() - wanted).abs() <= 1.001 * 2**-8 * wanted.abs()).all())
    (grad,) = gradients(y, [x])
    assert grad.dtype == torch.float32
    assert error(grad, gradients(wanted, [wide])[0]) < 0.004


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_norm_is_its_formula(bias: bool) -> None:
    module = nn.LayerNorm(48, eps=1e-3, bias=bias).requires_grad_(False)
    module.weight.data = values(48, seed=3)
    if bias:
        module.bias.data = values(48, seed=4)
    x = (values(2, 7, 48, seed=5) * 0.03 + 0.5).requires_grad_()
    wide = x.detach().double().requires_grad_()
    off = wide - wide.mean(-1, keepdim=True)
    wanted = off / (off.square().mean(-1, keepdim=True) + 1e-3).sqrt() * module.weight.double()
    wanted = wanted + (module.bias.double() if bias else 0)
    fuse_layer_norm(module, lambda x: x.dtype)
    y = module(x)
    assert_near([y, *gradients(y, [x])], [wanted, *gradients(wanted, [wide])], 1e-5)
    fuse_layer_norm(module, lambda x: torch.bfloat16)
    rounded = module(x)
    assert rounded.dtype == torch.bfloat16
    assert torch.equal(rounded, y.bfloat16())


# Rotary positions


@pytest.mark.parametrize("width", [16, 12, 4])
@pytest.mark.parametrize("dim", [1, 2])
def test_rotary_positions_are_a_complex_rotation(width: int, dim: int) -> None:
    """Value j of the first half and of the second are the real and imaginary part of what is turned by position * angle j."""
    angles = torch.arange(7.0, dtype=torch.float64)[None, :, None] * values(width // 2, seed=1, dtype=torch.float64)
    cos, sin = (torch.cat([part, part], dim=-1).float() for part in (angles.cos(), angles.sin()))
    turn = torch.polar(torch.ones_like(angles), angles).unsqueeze(dim)

    def rotated(x: Tensor) -> Tensor:
        z = torch.complex(x[..., : width // 2], x[..., width // 2 : width]) * turn
        return torch.cat([z.real, z.imag, x[..., width:]], dim=-1)

    given = [values(2, heads, 7, 16, seed=heads).requires_grad_() for heads in (4, 2)]
    given = [x if dim == 1 else x.detach().transpose(1, 2).requires_grad_() for x in given]
    wide = [x.detach().double().requires_grad_() for x in given]
    got, wanted = apply_rotary_pos_emb(*given, cos, sin, unsqueeze_dim=dim), [rotated(x) for x in wide]
    ours = [gradients(y, [x])[0] for y, x in zip(got, given, strict=True)]
    theirs = [gradients(y, [x])[0] for y, x in zip(wanted, wide, strict=True)]
    assert_near([*got, *ours], [*wanted, *theirs])


def test_rotary_positions_of_bfloat16_are_rounded_once() -> None:
    x, cos, sin = values(1, 2, 9, 16).bfloat16(), values(1, 9, 16, seed=1), values(1, 9, 16, seed=2)
    got, _ = apply_rotary_pos_emb(x, x, cos, sin)
    half = torch.cat([-x[..., 8:], x[..., :8]], dim=-1).float()
    assert got.dtype == torch.bfloat16
    wanted = (x.float() * cos[:, None] + half * sin[:, None]).bfloat16()
    assert float((got != wanted).float().mean()) < 0.01  # float32 sums may differ in their last bit


# Attention


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None = None) -> Tensor:
    """Return (B, T, H, dv) in float64, head by head as the formula has it."""
    length, share = q.shape[2], q.shape[1] // k.shape[1]
    back = torch.arange(length)[:, None] - torch.arange(length)  # how far a key lies before a query
    seen = (back >= 0) & (back < (length if window is None else window))
    heads = []
    for head in range(q.shape[1]):
        scores = scale * q[:, head].double() @ k[:, head // share].double().transpose(1, 2)
        weights = torch.where(seen, (scores - scores.amax(-1, keepdim=True)).exp(), 0.0)
        heads.append(weights / weights.sum(-1, keepdim=True) @ v[:, head // share].double())
    return torch.stack(heads, dim=2)


def attended(given: Sequence[Tensor], scale: float | None) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in given]
    y, weights = blockwise.attention(nn.Module(), *leaves, None, scaling=scale)
    assert weights is None
    assert y.is_contiguous()  # as transformers' own gives it: some models view it
    return [y, *gradients(y, leaves)]


@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize(
    ("heads", "shared", "length", "value"),
    [(4, 4, 100, 16), (6, 2, 128, 16), (4, 1, 129, 24), (4, 2, 300, 8), (2, 2, 1, 16), (3, 3, 2, 16)],
)
def test_attention_is_its_formula_in_values_and_gradients(
    heads: int, shared: int, length: int, value: int, scale: float | None
) -> None:
    given = values(2, heads, length, 16), values(2, shared, length, 16, seed=1), values(2, shared, length, value, seed=2)
    wide = [x.double().requires_grad_() for x in given]
    wanted = softmax_attention(*wide, scale=0.25 if scale is None else scale)
    assert wanted.shape == (2, length, heads, value)
    got = attended(given, scale)
    if length > 1:
        assert_near(got, [wanted, *gradients(wanted, wide)], 1e-5)
    else:  # one token sees itself alone: no gradient reaches its scores
        assert_near([got[0], got[3]], [wanted, gradients(wanted, wide)[2]], 1e-5)
        subtracted = float(given[2].abs().max()) * given[2].shape[-1]  # what torch's own gradient rounds, in float32
        assert all(float(grad.abs().max()) < 1e-7 * subtracted for grad in got[1:3])


def test_what_attention_saves_grows_with_the_length_and_not_with_its_square() -> None:
    sizes = []
    for length in (200, 400):
        given = values(1, 4, length, 16), values(1, 2, length, 16, seed=1), values(1, 2, length, 16, seed=2)
        sizes.append(0)

        def count(x: Tensor) -> Tensor:
            sizes[-1] += x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            attended(given, None)
    one = 4 * 16 + 2 * 16 + 2 * 16  # q, k and v of a token
    assert sizes == [200 * one, 400 * one]


@pytest.mark.parametrize(("heads", "shared"), [(4, 4), (6, 2)])
def test_in_autocast_scores_are_not_rounded(heads: int, shared: int) -> None:
    given = values(1, heads, 200, 64) * 3, values(1, shared, 200, 64, seed=1), values(1, shared, 200, 64, seed=2)
    half = [x.bfloat16() for x in given]
    wide = [x.double().requires_grad_() for x in half]
    wanted = softmax_attention(*wide, scale=0.125)
    exact = [wanted, *gradients(wanted, wide)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = attended([x.float() for x in half], None)
    leaves = [x.requires_grad_() for x in half]
    y = F.scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=heads != shared).transpose(1, 2)
    theirs = [y, *gradients(y, leaves)]
    rounded = (leaves[0] * 0.125).float() @ leaves[1].repeat_interleave(heads // shared, 1).float().transpose(2, 3)
    rounded = rounded.bfloat16().float().masked_fill(torch.ones(200, 200).triu(1).bool(), float("-inf")).softmax(-1)
    coarse = (rounded @ leaves[2].repeat_interleave(heads // shared, 1).float()).transpose(1, 2)
    assert ours[0].dtype == torch.bfloat16
    ratios = [error(one, right) / error(other, right) for one, other, right in zip(ours, theirs, exact, strict=True)]
    assert max(ratios) <= 1.3, ratios
    assert error(coarse, exact[0]) > 1.3 * error(theirs[0], exact[0])  # so that rounded scores would be noticed


@pytest.mark.parametrize("case", ["mask", "cache", "not causal"])
def test_attention_that_is_not_causal_over_one_square_goes_to_sdpa(case: str) -> None:
    q, k, v = (values(1, 2, 10, 16, seed=seed) for seed in range(3))
    mask = torch.rand(1, 1, 10, 10, generator=torch.Generator().manual_seed(4)) < 0.7 if case == "mask" else None
    q = q[:, :, 7:] if case == "cache" else q
    if case == "mask":
        mask |= torch.eye(10, dtype=torch.bool)
    causal = {"is_causal": False} if case != "mask" else {}
    got, _ = blockwise.attention(nn.Module(), q, k, v, mask, **causal)
    wanted = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), mask).transpose(1, 2)
    assert_near([got], [wanted])


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize(("heads", "shared"), [(4, 4), (6, 2)])
def test_documents_of_a_packed_batch_attend_to_themselves_only(heads: int, shared: int, window: int | None) -> None:
    given = [values(2, count, 150, 16, seed=seed) for seed, count in enumerate((heads, shared, shared))]
    rows = (((0, 70), (70, 71), (71, 150)), ((0, 21), (21, 150)))
    leaves = [x.clone().requires_grad_() for x in given]
    module = nn.Module()
    module.num_key_value_groups = heads // shared  # type: ignore[assignment]
    y, _ = attention_of_documents(blockwise.attention, module, *leaves, Documents(rows, window), scaling=0.3)
    wide = [x.double().requires_grad_() for x in given]
    wanted = torch.cat(
        [
            torch.cat([softmax_attention(*(x[index : index + 1, :, a:b] for x in wide), 0.3, window) for a, b in row], dim=1)
            for index, row in enumerate(rows)
        ]
    )
    assert y.shape == wanted.shape == (2, 150, heads, 16)
    assert_near([y, *gradients(y, leaves)], [wanted, *gradients(wanted, wide)], 1e-5)


# Options

PARTS = {"linear": 14, "mlp": 2, "norm": 5, "rotary": 2, "attention": 1, "keep_pages": 1}


def replaced(model: Any) -> dict[str, int]:
    """Return how many modules of each kind have a forward of their own."""
    own = [module for module in model.modules() if "forward" in vars(module)]
    found = {
        "linear": sum(isinstance(module, LoraLayer) for module in own),
        "mlp": sum(hasattr(module, "down_proj") for module in own),
        "norm": sum(isinstance(vars(module)["_parameters"].get("weight"), nn.Parameter) for module in own),
        "rotary": sum(hasattr(module, "q_proj") for module in own),
        "attention": int(base_of(model).config._attn_implementation in (blockwise.COMPILED, blockwise.TILED)),
    }
    assert sum(found.values()) - found["attention"] == len(own), [type(module) for module in own]
    return found


@pytest.mark.parametrize("left_out", [None, *PARTS])
def test_each_option_switches_off_its_part_and_no_other(left_out: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[bool] = []
    monkeypatch.setattr(rewriting, "keep_pages", lambda largest: kept.append(largest == 64 * 128 * 4))
    torch.manual_seed(0)
    model: Any = inject_adapter(load_model(tiny_config(), NF4()), LoRA(r=4)).eval()
    ids = tiny_ids(model)
    with torch.no_grad():
        wanted = model(ids, use_cache=False).logits
    assert Fused(**({} if left_out is None else {left_out: False})).apply(model) is model
    found = {**replaced(model), "keep_pages": sum(kept)}
    assert found == {part: 0 if part == left_out else count for part, count in PARTS.items()}
    with torch.no_grad():
        assert error(model(ids, use_cache=False).logits, wanted) < 1e-5


PAGES = """
import re, sys
from qlora_fused.pages import keep_pages

def anonymous():  # MiB
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

assert keep_pages(int(sys.argv[1]))
for size in (16, 64):
    block = bytearray(size * 2**20)
    before = anonymous()
    del block
    print(round(before - anonymous()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is read from /proc")
@pytest.mark.parametrize(("largest", "given_back"), [(2**25 - 1, [0, 0]), (2**25, [0, 64])])
def test_freed_pages_are_kept_but_those_of_large_weights_where_there_are_some(largest: int, given_back: list[int]) -> None:
    done = subprocess.run([sys.executable, "-c", PAGES, str(largest)], capture_output=True, text=True, timeout=60)
    assert list(map(int, done.stdout.split())) == given_back, done.stderr


# liger-kernel


@pytest.mark.parametrize("installed", [True, False])
def test_on_cuda_auto_takes_these_kernels_where_liger_kernel_is(monkeypatch: pytest.MonkeyPatch, installed: bool) -> None:
    found = importlib.util.find_spec
    there = {"liger_kernel": found("torch") if installed else None}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: there.get(name, found(name, *rest)))
    assert [Fused().suits(device) for device in ("cpu", "cuda", "xpu")] == [2, 2 if installed else 0, 0]


def test_liger_kernel_is_bound_to_one_model_and_to_no_other() -> None:
    """What it computes is not run here: its kernels need a GPU."""
    pytest.importorskip("triton")
    pytest.importorskip("liger_kernel")
    from liger_kernel.transformers.rms_norm import LigerRMSNorm
    from liger_kernel.transformers.swiglu import LigerSwiGLUMLP

    from qlora_fused.liger import use_liger

    model: Any = inject_adapter(load_model(tiny_config(), NF4()), LoRA(r=4))
    module = sys.modules[type(base_of(model)).__module__]
    before = dict(vars(module))
    assert use_liger(base_of(model)) == PARTS["norm"] + PARTS["mlp"] + PARTS["rotary"]
    layer = base_of(model).model.layers[0]
    assert layer.input_layernorm.forward.__func__ is LigerRMSNorm.forward
    assert layer.mlp.forward.__func__ is LigerSwiGLUMLP.forward
    assert "liger" in layer.self_attn.forward.__func__.__globals__["apply_rotary_pos_emb"].__module__
    assert vars(module) == before
    other = inject_adapter(load_model(tiny_config(), NF4()), LoRA(r=4))
    assert bool(other(tiny_ids(other), use_cache=False).logits.isfinite().all())


def test_an_architecture_that_liger_kernel_does_not_know_is_left_alone() -> None:
    pytest.importorskip("triton")
    pytest.importorskip("liger_kernel")
    from qlora_fused.liger import use_liger

    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 64}
    model = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**sizes))
    assert use_liger(model) == 0
    assert not any("forward" in vars(module) for module in model.modules())
