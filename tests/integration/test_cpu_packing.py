"""bitsandbytes 0.50 repacks Linear4bit on AVX512-bf16 CPUs in eval mode and so ruins training; ours must not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes.functional
import pytest
import torch
import transformers

from qlora_bitsandbytes import FP4, NF4
from qlora_core import evaluate, generate, inject_adapter, load_model
from qlora_core.data.blocks import Blocks
from qlora_core.data.collate import Collator
from qlora_core.training.loss import causal_lm_loss
from qlora_peft import LoRA

pytestmark = pytest.mark.filterwarnings("ignore")


def trained(folder: Path, between: Callable[[Any], None], quantizer: Any) -> dict[str, torch.Tensor]:
    """Return the adapter after two steps with *between* in the middle."""
    torch.manual_seed(0)
    model = inject_adapter(load_model(str(folder), quantizer), LoRA(r=4))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    batch = Collator()([{"input_ids": list(range(2, 34))}, {"input_ids": list(range(50, 82))}])
    labels = batch.pop("labels")
    for step in range(3):
        model.train()
        causal_lm_loss(model(**batch), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 0:
            between(model)
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("quantizer", [NF4(), NF4(double_quant=False), FP4()], ids=["nf4", "nf4-single", "fp4"])
def test_evaluating_generating_and_saving_in_between_changes_no_bit(tiny_model: Path, tmp_path: Path, quantizer: Any) -> None:
    import datasets

    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    blocks = Blocks(datasets.Dataset.from_dict({"input_ids": [list(range(10, 42))]}))

    def disturb(model: Any) -> None:
        evaluate(model, blocks)
        generate(model, tokenizer, "The import statement", max_new_tokens=4)
        model.eval()
        with torch.no_grad():
            model(torch.arange(8)[None])
        model.state_dict()
        LoRA(r=4).save(model, tmp_path / "adapter")

    plain = trained(tiny_model, lambda model: None, quantizer)
    disturbed = trained(tiny_model, disturb, quantizer)
    assert all(torch.equal(plain[name], disturbed[name]) for name in plain)


@pytest.mark.parametrize("intermediate", [100, 129])
def test_layers_of_odd_shapes_train_and_evaluate(make_model: Callable[..., Path], intermediate: int) -> None:
    """bitsandbytes' repacking crashes where out_features is no multiple of 32."""
    import datasets

    folder = make_model("llama", intermediate_size=intermediate)
    model = inject_adapter(load_model(str(folder), NF4()), LoRA(r=4))
    blocks = Blocks(datasets.Dataset.from_dict({"input_ids": [list(range(10, 42))]}))
    score = evaluate(model, blocks, mixed_precision="none")
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, module in model.named_modules():
        if NF4().is_quantized(module):
            target = reference.get_submodule(name.removeprefix("base_model.model.").removesuffix(".base_layer"))
            target.weight.data = NF4().dequantize(module).float()
    ids = torch.arange(10, 42)[None]
    assert score.loss == pytest.approx(float(reference(ids, labels=ids).loss), rel=5e-3)


def test_no_layer_is_left_with_the_switch_on(tiny_model: Path) -> None:
    model = load_model(str(tiny_model), NF4())
    layers = [module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    assert len(layers) == 14
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)


@pytest.mark.skipif(not bitsandbytes.functional.has_avx512bf16(), reason="this CPU has no AVX512-bf16, so nothing is repacked")
def test_the_trap_is_real_where_the_switch_is_left_on(tiny_model: Path) -> None:
    """If this fails, bitsandbytes has mended it and `keep_packing` can go."""
    model = load_model(str(tiny_model), NF4())
    layer = model.model.layers[0].mlp.up_proj
    layer.support_avx512bf16_for_cpu = True
    before = layer.weight.data.clone(), NF4().dequantize(layer).clone()
    with torch.no_grad():
        model.eval()(torch.arange(8)[None])
    layer.state_dict()  # repacks back, lossily
    assert not torch.equal(before[1], NF4().dequantize(layer))
