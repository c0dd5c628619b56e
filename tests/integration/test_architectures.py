"""Llama, OPT, GPT-NeoX, GPT-2 (Conv1D), Qwen, Gemma and Phi: load, train, save, reload."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qlora_bitsandbytes import NF4
from qlora_core import Finished, Footprint, load_model
from qlora_core.footprint import LinearWeights
from qlora_peft import LoRA

LAYERS = {"llama": 14, "opt": 12, "gpt_neox": 8, "gpt2": 8, "qwen2": 14, "qwen3": 14, "gemma": 14, "phi": 12}


@pytest.mark.parametrize("architecture", LAYERS)
def test_trains_saves_and_reloads_to_the_same_logits(
    make_model: Callable[..., Path], run: Callable[..., Finished], architecture: str
) -> None:
    folder = make_model(architecture)
    finished = run(model=str(folder), training={"max_steps": 8})
    losses = [line["loss"] for line in finished.run.read_metrics() if "loss" in line]
    assert losses[-1] < losses[0]
    reloaded = LoRA().load(load_model(str(folder), NF4()), finished.run.adapter)
    ids = torch.arange(2, 42).view(2, 20)
    with torch.no_grad():
        assert torch.equal(finished.model.eval()(ids).logits, reloaded.eval()(ids).logits)


@pytest.mark.parametrize("architecture", LAYERS)
def test_every_linear_layer_but_the_head_is_quantised_and_adapted(make_model: Callable[..., Path], architecture: str) -> None:
    model = load_model(str(make_model(architecture)), NF4())
    assert sum(NF4().is_quantized(module) for module in model.modules()) == LAYERS[architecture]
    linears = LinearWeights(model, NF4())
    assert linears.covered_by(model).share == 0
    assert linears.covered_by(LoRA(r=4).inject(model)).share == 1


def test_experts_held_as_3d_parameters_are_named_as_left_out(make_model: Callable[..., Path]) -> None:
    """Mixture models hold their experts in 3-D parameters, which quantizers and adapters for linear layers skip."""
    folder = make_model("mixtral", num_local_experts=4, num_experts_per_tok=2)
    model = load_model(str(folder), NF4())
    size = Footprint.of(model, NF4())
    assert size.quantized_share < 0.2
    assert any("experts" in name for name, _ in size.left_out[:2])
    attention = LoRA(r=4, target_modules=("q_proj", "k_proj", "v_proj", "o_proj"))
    coverage = LinearWeights(model, NF4()).covered_by(attention.inject(model))
    assert coverage.share < 0.2
    assert all("experts" in name for name, _ in coverage.left_out[:4])
