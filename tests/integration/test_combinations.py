"""Quantizers and adapter options that go together train, save and load again; those that don't are refused early."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from qlora_bitsandbytes import FP4, NF4, Int8
from qlora_core import ConfigError, Finished, Footprint, load_model
from qlora_peft import LoRA
from qlora_plain import NoAdapter, NoQuantizer

IDS = torch.arange(2, 42).view(2, 20)
QUANTIZERS = {
    "nf4": NF4(),
    "nf4-single": NF4(double_quant=False),
    "nf4-bf16-storage": NF4(storage_dtype="bfloat16"),
    "nf4-skipping": NF4(skip_modules=("down_proj",)),
    "fp4": FP4(),
    "int8": Int8(),
    "none": NoQuantizer(),
}
ADAPTERS = {
    "dora": LoRA(r=4, use_dora=True),
    "rslora-gaussian-dropout": LoRA(r=4, use_rslora=True, init="gaussian", dropout=0.1),
    "names": LoRA(r=4, target_modules=("q_proj", "v_proj")),
    "pattern": LoRA(r=4, target_modules=r".*layers\.1\..*_proj"),
    "modules_to_save": LoRA(r=4, modules_to_save=("lm_head",)),
}


def check(finished: Finished, folder: Path, quantizer: Any, adapter: Any) -> None:
    reloaded = adapter.load(load_model(str(folder), quantizer), finished.run.adapter)
    with torch.no_grad():
        ours, theirs = finished.model.eval()(IDS).logits, reloaded.eval()(IDS).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_every_quantizer_trains_saves_and_loads(run: Callable[..., Finished], tiny_model: Path, name: str) -> None:
    quantizer = QUANTIZERS[name]
    finished = run(quantizer=quantizer)
    check(finished, tiny_model, quantizer, LoRA())


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_adapter_option_trains_saves_and_loads(run: Callable[..., Finished], tiny_model: Path, name: str) -> None:
    adapter = ADAPTERS[name]
    finished = run(adapter=adapter)
    check(finished, tiny_model, NF4(), adapter)


def test_biases_are_trained_where_asked_for_and_saved(run: Callable[..., Finished], make_model: Callable[..., Path]) -> None:
    folder, adapter = make_model("phi"), LoRA(r=4, bias="lora_only")
    finished = run(model=str(folder), adapter=adapter)
    trained = [name for name, p in finished.model.named_parameters() if p.requires_grad and name.endswith("bias")]
    assert len(trained) == 12
    check(finished, folder, NF4(), adapter)


def test_pissa_is_saved_so_that_it_loads_on_the_plain_base(run: Callable[..., Finished], tiny_model: Path) -> None:
    finished = run(model=str(tiny_model), quantizer=NoQuantizer(), adapter=LoRA(r=4, init="pissa"))
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    plain = peft.PeftModel.from_pretrained(base, str(finished.run.adapter))
    assert plain.peft_config["default"].r == 8  # B A - B0 A0
    with torch.no_grad():
        ours, theirs = finished.model.eval()(IDS).logits, plain.eval()(IDS).logits
        untrained = transformers.AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)(IDS).logits
    # the base was rounded to bfloat16 with B A taken out, so the two differ by that rounding
    assert (ours - theirs).abs().max() < 0.02
    assert (ours - untrained).abs().max() > 0.05


@pytest.mark.parametrize(
    ("quantizer", "adapter", "message"),
    [
        (NF4(), LoRA(init="pissa"), "adapter.init: pissa subtracts B A from the base weights, and nf4 has packed them"),
        (Int8(), LoRA(init="pissa"), "adapter.init: pissa subtracts"),
        (NoQuantizer(), LoRA(init="pissa", use_dora=True), "adapter.use_dora: pissa can't be combined with it"),
        (Int8(), LoRA(use_dora=True), "adapter.use_dora: PEFT loses the scales of int8 layers"),
        (NF4(), NoAdapter(), "adapter: the adapter 'none' leaves nothing to train"),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_is_loaded(
    run: Callable[..., Finished], tmp_path: Path, quantizer: Any, adapter: Any, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        run(quantizer=quantizer, adapter=adapter, model="/no/such/model")
    assert str(caught.value).startswith(message)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 33}, "adapter.r: 33 is larger than the layer model.layers.0.self_attn.k_proj (32 x 64) can have; at most 32"),
        ({"target_modules": ("query",)}, "adapter.target_modules: ('query',) matches nothing; the model's linear layers are"),
        ({"target_modules": ("q_proj", "query")}, "adapter.target_modules: 'query' matches nothing"),
        ({"target_modules": "layers.query"}, "adapter.target_modules: 'layers.query' matches nothing"),
        ({"modules_to_save": ("head",)}, "adapter.modules_to_save: 'head' matches nothing; the model has"),
    ],
)
def test_adapter_options_that_do_not_fit_the_model_are_refused(
    run: Callable[..., Finished], tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        run(adapter=LoRA(**{"r": 4, **options}))
    assert str(caught.value).startswith(message)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["nf4", "nf4-single", "fp4", "int8", "none"])
def test_footprint_counts_packed_weights_and_constants(tiny_model: Path, name: str) -> None:
    """Against the bytes of every tensor that the layers really hold; `stored_bytes` predicts them."""
    quantizer = QUANTIZERS[name]
    model = load_model(str(tiny_model), quantizer)
    size = Footprint.of(model, quantizer)
    assert size.parameters == sum(p.numel() for p in unquantised(tiny_model).parameters())
    held = sum(p.nbytes for p in model.parameters()) + sum(b.nbytes for b in model.buffers())
    predicted = 0
    for module in model.modules():
        if quantizer.is_quantized(module):
            constants = sum(tensor.nbytes for tensor in quantizer.constants(module))
            held += constants
            predicted += quantizer.stored_bytes((module.out_features, module.in_features))
            assert quantizer.stored_bytes((module.out_features, module.in_features)) == module.weight.nbytes + constants
    assert size.bytes == held
    assert size.quantized_bytes == predicted
    if quantizer.quantizes:
        assert size.bytes > model.get_memory_footprint()  # which leaves out the constants


def unquantised(folder: Path) -> torch.nn.Module:
    return load_model(str(folder), NoQuantizer())


def test_int8_dequantises_to_what_the_forward_pass_multiplies_by(tiny_model: Path) -> None:
    model, quantizer = load_model(str(tiny_model), Int8(threshold=0)), Int8()
    layer = model.model.layers[0].mlp.up_proj
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    before = quantizer.dequantize(layer)
    output = layer(x)
    assert torch.equal(before, quantizer.dequantize(layer))  # the first forward pass moves the scales
    exact = x.double() @ before.double().T
    assert (output.double() - exact).abs().max() < 0.03 * exact.abs().max()
