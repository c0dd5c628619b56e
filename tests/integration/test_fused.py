"""The kernels `fused` on whole models: what is replaced in each architecture, and that it computes the same."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

from qlora_bitsandbytes import NF4
from qlora_core import ModelConfig, inject_adapter, load_model, load_tokenizer
from qlora_core.attention import base_of
from qlora_core.packed import prepare_packed
from qlora_core.training.head import Head
from qlora_core.training.loss import causal_lm_loss
from qlora_fused import Fused
from qlora_peft import LoRA

# LoRA layers, gated MLPs, norms and rotary embeddings that are replaced, in models of two layers
PARTS = {
    "llama": (14, 2, 5, 2),
    "opt": (12, 0, 5, 0),
    "gpt_neox": (8, 0, 5, 2),
    "gpt2": (8, 0, 5, 0),
    "qwen2": (14, 2, 5, 2),
    "qwen3": (14, 2, 9, 2),
    "gemma": (14, 2, 5, 2),
    "phi": (12, 0, 3, 2),
}


def build(folder: Path, *, dtype: str = "float32", fused: bool) -> Any:
    torch.manual_seed(0)
    model = inject_adapter(load_model(ModelConfig(path=str(folder), dtype=dtype), NF4()), LoRA(r=8, alpha=16))
    randomise(model)
    return Fused().apply(model) if fused else model


def randomise(model: torch.nn.Module) -> None:
    """Give A and B, which the usual way of setting up and ours name alike, the same values."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name:
            scale = parameter.shape[1] ** -0.5 if "lora_A" in name else 0.02
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def gradients(model: Any, ids: torch.Tensor, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(7)  # some models drop out values of their own
    loss = causal_lm_loss(model(input_ids=ids, use_cache=False, **inputs), ids)
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters() if p.requires_grad}}


def apart(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Return the distance of all gradients together, relative to the size of *wanted*."""
    names = [name for name in wanted if name != "loss"]
    assert {*got} >= {*names}
    off = sum(float((got[name].double() - wanted[name].double()).square().sum()) for name in names)
    return (off / sum(float(wanted[name].double().square().sum()) for name in names)) ** 0.5


@pytest.mark.parametrize("architecture", PARTS)
def test_logits_and_gradients_are_those_without_kernels(make_model: Callable[..., Path], architecture: str) -> None:
    folder = make_model(architecture)
    plain, fused = (build(folder, fused=fused) for fused in (False, True))
    ids = torch.randint(2, 300, (2, 48), generator=torch.Generator().manual_seed(2))
    packed = {"position_ids": torch.cat([torch.arange(20), torch.arange(28)]).expand(2, -1).clone()}
    for model in (plain, fused):
        prepare_packed(model)
    for inputs in ({}, packed):
        wanted, got = (gradients(model.train(), ids, **inputs) for model in (plain, fused))
        assert float(got["loss"]) == pytest.approx(float(wanted["loss"]), rel=1e-5)
        assert apart(got, wanted) < 1e-4
        with torch.no_grad():
            wanted, got = (model.eval()(input_ids=ids, use_cache=False, **inputs).logits for model in (plain, fused))
        assert float((got - wanted).norm() / wanted.norm()) < 1e-4


@pytest.mark.parametrize("architecture", PARTS)
def test_every_part_that_applies_is_replaced(
    make_model: Callable[..., Path], architecture: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "qlora_core"):
        model = build(make_model(architecture), fused=True)
    found = Counter(dict(zip(("LoRA layers", "MLPs", "norms", "rotary embeddings"), PARTS[architecture], strict=True)))
    for what, count in found.items():
        assert (f"{count} {what}" in caplog.text) == bool(count), (what, caplog.text)
    assert base_of(model).config._attn_implementation == "blockwise"


def test_generation_gives_the_same_tokens(tiny_model: Path) -> None:
    ids = torch.arange(2, 30)[None]
    texts = []
    for fused in (False, True):
        model = build(tiny_model, fused=fused).eval()
        mask = torch.ones_like(ids)
        texts.append(model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0))
    assert torch.equal(*texts)


def test_checkpointing_and_dropout_give_the_same_bits(tiny_model: Path) -> None:
    model: Any = inject_adapter(load_model(ModelConfig(path=str(tiny_model)), NF4()), LoRA(r=8, dropout=0.2))
    randomise(model)
    Fused().apply(model).train()
    ids = torch.arange(2, 130).view(2, 64)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found.append({name: value.clone() for name, value in gradients(model, ids).items()})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def exact(folder: Path) -> Any:
    """Return the model wired by hand in float64, with the very weights that NF4 stores."""
    model = by_hand(folder)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Linear4bit):
                linear = torch.nn.Linear(child.in_features, child.out_features, bias=False, device="meta")
                weight = dequantize_4bit(child.weight.data, child.weight.quant_state).double()
                linear.weight = torch.nn.Parameter(weight, requires_grad=False)
                setattr(module, name, linear)
    return model.double()


def by_hand(folder: Path) -> Any:
    """Return the model as tutorials wire it: what ours is compared with."""
    base = prepare_model_for_kbit_training(load_model(str(folder), NF4()), use_gradient_checkpointing=False)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    randomise(model)
    return model.train()


def test_on_a_real_model_gradients_are_as_near_to_float64_as_those_of_the_usual_wiring(demo_folder: Path, text: str) -> None:
    ids = load_tokenizer(str(demo_folder))(text[:9000])["input_ids"]
    rows = torch.tensor(ids[: 8 * 96]).view(8, 1, 96)
    model = exact(demo_folder)
    wanted = [{name: grad.clone() for name, grad in gradients(model, row).items()} for row in rows]
    del model
    errors = {}
    for name, model in (("usual", by_hand(demo_folder)), ("fused", build(demo_folder, dtype="auto", fused=True).train())):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            head = Head.of(model) if name == "fused" else Head()
            assert name == "usual" or head.module is not None
            errors[name] = [apart(gradients(model, row), right) for row, right in zip(rows, wanted, strict=True)]
    usual, fused = (statistics.median(errors[name]) for name in ("usual", "fused"))
    assert 1e-3 < usual < 0.2
    assert fused <= 1.05 * usual
