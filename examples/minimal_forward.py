"""The smallest thing that is QLoRA: a model in 4 bits, LoRA on top, one forward pass.

python examples/minimal_forward.py --model HuggingFaceTB/SmolLM2-135M-Instruct
"""

from __future__ import annotations

import argparse

import torch

from qlora_bitsandbytes import NF4
from qlora_core import Footprint, inject_adapter, load_model, load_tokenizer
from qlora_core.demo_model import demo_model
from qlora_peft import LoRA


def main(model: str | None = None) -> torch.Size:
    path = model or demo_model().path
    quantizer = NF4(double_quant=True)
    base = load_model(path, quantizer)  # frozen; linear layers in NF4, the rest in the load dtype
    size = Footprint.of(base, quantizer)
    print(f"{size.parameters:,} parameters in {size.bytes / 1e6:,.1f} MB, {size.bits_per_parameter:.2f} bits each")

    adapted = inject_adapter(base, LoRA(r=8, alpha=16))
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    print(f"{trained:,} parameters to train, {100 * trained / size.parameters:.2f} %")

    inputs = load_tokenizer(path)("Four bits are enough to", return_tensors="pt")
    with torch.no_grad():
        logits = adapted(input_ids=inputs["input_ids"]).logits  # (B, T, V)
    print(f"logits {tuple(logits.shape)} {logits.dtype}")
    return logits.shape


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder or a hub id; by default the model of `qlora demo`")
    main(parser.parse_args().model)
