"""What our pipeline computes is what bitsandbytes and peft compute when they are wired by hand, and what the paper says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes.functional
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from qlora_bitsandbytes import NF4
from qlora_core import Finished, ModelConfig, inject_adapter, load_model
from qlora_peft import LoRA

IDS = torch.arange(3, 43).view(2, 20)


def by_hand(folder: Path) -> Any:
    """Return the model in *folder* in NF4 as the tutorials load it."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.bfloat16,
        quantization_config=transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
    )


def with_lora(model: Any) -> Any:
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=32, target_modules="all-linear", lora_dropout=0.0)
    return peft.get_peft_model(model, config)


def fill(model: torch.nn.Module) -> None:
    """Give every trained parameter a value that depends on its name only, B included."""
    with torch.no_grad():
        for index, (_, parameter) in enumerate(sorted((n, p) for n, p in model.named_parameters() if p.requires_grad)):
            generator = torch.Generator().manual_seed(index)
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))


def ours(folder: Path, **model: Any) -> torch.nn.Module:
    base = load_model(ModelConfig(path=str(folder), dtype="bfloat16", **model), NF4())
    return inject_adapter(base, LoRA(r=4))


def test_logits_equal_those_of_the_model_wired_by_hand_bit_for_bit(tiny_model: Path) -> None:
    mine, theirs = ours(tiny_model), with_lora(by_hand(tiny_model))
    fill(mine)
    fill(theirs)
    # in train mode: in eval mode bitsandbytes would repack the layers of the hand-wired model on some CPUs
    assert torch.equal(mine.train()(IDS).logits, theirs.train()(IDS).logits)


def test_logits_of_the_real_model_equal_those_wired_by_hand_bit_for_bit(demo_folder: Path) -> None:
    mine, theirs = ours(demo_folder), with_lora(by_hand(demo_folder))
    fill(mine)
    fill(theirs)
    with torch.no_grad():
        assert torch.equal(mine.train()(IDS).logits, theirs.train()(IDS).logits)


def test_upcast_gives_what_prepare_model_for_kbit_training_does(tiny_model: Path) -> None:
    mine = ours(tiny_model, upcast=True)
    theirs = with_lora(peft.prepare_model_for_kbit_training(by_hand(tiny_model), use_gradient_checkpointing=False))
    fill(mine)
    fill(theirs)
    dtypes = {name: parameter.dtype for name, parameter in mine.named_parameters()}
    assert dtypes == {name: parameter.dtype for name, parameter in theirs.named_parameters()}
    assert dtypes["base_model.model.model.embed_tokens.weight"] == torch.float32
    assert torch.equal(mine.train()(IDS).logits, theirs.train()(IDS).logits)


def test_frozen_weights_stay_in_the_load_dtype_and_adapters_are_float32(tiny_model: Path) -> None:
    model = ours(tiny_model)
    trained = {p.dtype for p in model.parameters() if p.requires_grad}
    frozen = {p.dtype for p in model.parameters() if not p.requires_grad}
    assert trained == {torch.float32}
    assert frozen == {torch.bfloat16, torch.uint8}


@pytest.mark.parametrize("double_quant", [True, False])
def test_packed_weights_equal_quantize_4bit_byte_for_byte(tiny_model: Path, double_quant: bool) -> None:
    model = load_model(str(tiny_model), NF4(double_quant=double_quant))
    originals = load_file(tiny_model / "model.safetensors")
    checked = 0
    for name, module in model.named_modules():
        if NF4().is_quantized(module):
            packed, state = bitsandbytes.functional.quantize_4bit(
                originals[f"{name}.weight"], blocksize=64, quant_type="nf4", compress_statistics=double_quant
            )
            assert torch.equal(packed, module.weight.data)
            assert torch.equal(state.absmax, module.weight.quant_state.absmax)
            checked += 1
    assert checked == 14


def test_adapted_layer_computes_w_plus_scaled_b_a(tiny_model: Path) -> None:
    """W_eff = Q(W) + (alpha / r) * B @ A (QLoRA, eq. 5-6), against float64 from dequantize_4bit."""
    model = ours(tiny_model)
    fill(model)
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    weight = bitsandbytes.functional.dequantize_4bit(layer.base_layer.weight.data, layer.base_layer.weight.quant_state)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    exact = x.double() @ (weight.double() + 32 / 4 * b.double() @ a.double()).T
    computed = layer(x).double()
    scale = x.double().abs() @ (weight.double().abs() + 32 / 4 * b.double().abs() @ a.double().abs()).T
    # two roundings of the output to bfloat16 (8 significant bits), and its sums in at least float32
    assert ((computed - exact).abs() <= 2 * 2**-8 * scale).all()
    assert (computed - exact).abs().mean() < 2**-8 * exact.abs().mean()


def test_training_changes_only_a_and_b(run: Callable[..., Finished], tiny_model: Path) -> None:
    before = load_model(str(tiny_model), NF4()).state_dict()
    finished = run()
    changed = []
    state = finished.model.state_dict()
    for name, tensor in before.items():
        prefix, _, rest = name.partition(".weight")
        wrapped = f"base_model.model.{prefix}.base_layer.weight{rest}"
        after = state.get(wrapped, state.get(f"base_model.model.{name}"))
        assert after is not None
        if not torch.equal(tensor, after):
            changed.append(name)
    assert changed == []
    trained = {name for name, p in finished.model.named_parameters() if p.requires_grad}
    assert {name.split(".")[-3] for name in trained} == {"lora_A", "lora_B"}
    assert all((state[name] != 0).any() for name in trained if "lora_B" in name)  # B begins at zero


def test_saved_adapter_loads_with_plain_peft_and_gives_our_logits(run: Callable[..., Finished], tiny_model: Path) -> None:
    finished = run(model=ModelConfig(path=str(tiny_model), dtype="bfloat16"))
    plain = peft.PeftModel.from_pretrained(by_hand(tiny_model), str(finished.run.adapter))
    assert torch.equal(finished.model.train()(IDS).logits, plain.train()(IDS).logits)


@pytest.mark.parametrize("supervised", [(32, 32, 32, 32), (31, 9, 20, 2)])
def test_gradients_do_not_depend_on_how_a_batch_is_accumulated(
    tiny_model: Path, tmp_path: Path, supervised: tuple[int, ...]
) -> None:
    """Batch 4 x 1 and 1 x 4 give the same loss and gradients, with different numbers of supervised tokens too."""
    import datasets

    from qlora_core.config import RunConfig
    from qlora_core.data.blocks import Blocks
    from qlora_core.data.encode import Encoded
    from qlora_core.run import Run
    from qlora_core.training.arguments import training_arguments
    from qlora_core.training.trainer import QLoRATrainer

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 380, (4, 32), generator=generator).tolist()
    labels = [[-100] * (32 - n) + row[32 - n :] for row, n in zip(ids, supervised, strict=True)]
    blocks = Blocks(datasets.Dataset.from_dict({"input_ids": ids, "labels": labels}))

    class Gradients(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, model: Any, **kwargs: Any) -> None:
            self.found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    def step(batch: int, accumulation: int) -> tuple[float, dict[str, torch.Tensor]]:
        config = RunConfig.parse(
            {
                "model": str(tiny_model),
                "dataset": "text",
                "output": str(tmp_path / f"{batch}x{accumulation}"),
                "training": {
                    "batch_size": batch,
                    "gradient_accumulation": accumulation,
                    "max_steps": 1,
                    "logging_steps": 1,
                    "max_grad_norm": 0,
                    "mixed_precision": "none",
                },
            }
        )
        run = Run(Path(config.output), config)
        run.create()
        model = inject_adapter(load_model(ModelConfig(path=str(tiny_model), dtype="float32"), NF4()), LoRA(r=4))
        fill(model)
        seen = Gradients()
        tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
        arguments = training_arguments(config.training, output=run.folder, evaluates=False)
        QLoRATrainer(model, tokenizer, Encoded(blocks, None, ""), arguments, run, [seen]).train()
        return run.read_metrics()[0]["loss"], seen.found

    whole_loss, whole = step(4, 1)
    split_loss, split = step(1, 4)
    assert split_loss == pytest.approx(whole_loss, rel=1e-5)
    for name, gradient in whole.items():
        torch.testing.assert_close(split[name], gradient, rtol=1e-4, atol=1e-6)
