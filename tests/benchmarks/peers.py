"""QLoRA as a user would run it today with each peer.

    python peers.py train    PEER --model DIR --rows FILE [--batch 2] [--steps 8] [--checkpointing] [--seed 0] [--in-order]
    python peers.py evaluate PEER --model DIR --rows FILE [--batch 2]
    python peers.py generate trainer --model DIR [--tokens 64]

PEER is `trainer` (transformers Trainer + PEFT + bitsandbytes, wired by hand as the QLoRA tutorials do) or `trl` (TRL's
SFTTrainer). Both use NF4 + double quantisation, LoRA r=16 alpha=32 on every linear layer, dropout 0, AdamW and a constant
learning rate of 2e-4, in bfloat16; on a processor that only emulates it, in float32, which is many times as fast there. Rows
(see workload.py) of one length make batches as they are; others are padded to the longest of their batch. Prints one JSON
object.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import workload
from clock import Clock
from datasets import Dataset
from machine import dtype
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)

PROMPT = "The import statement"
BF16 = torch.cuda.is_available() or dtype() == "bfloat16"
DTYPE = torch.bfloat16 if BF16 else torch.float32


def lora() -> LoraConfig:
    """Return the adapter's configuration."""
    return LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", bias="none", task_type="CAUSAL_LM")


def load(model: str) -> tuple[Any, Any]:
    """Return the model in 4 bits and its tokenizer."""
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=DTYPE,
    )
    return AutoModelForCausalLM.from_pretrained(model, dtype=DTYPE, quantization_config=quantization), tokenizer


def trainer_of(options: argparse.Namespace, clock: Clock, folder: str) -> Any:
    """Return the peer's trainer on the rows, made as its documentation says."""
    model, tokenizer = load(options.model)
    rows = workload.read(options.rows)
    ragged = len({len(row["input_ids"]) for row in rows}) > 1
    data = Dataset.from_list([{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows])
    common: dict[str, Any] = {
        "output_dir": folder,
        "max_steps": options.steps,
        "per_device_train_batch_size": options.batch,
        "per_device_eval_batch_size": options.batch,
        "prediction_loss_only": True,
        "learning_rate": 2e-4,
        "lr_scheduler_type": "constant",
        "bf16": BF16,
        "use_cpu": not torch.cuda.is_available(),
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "seed": options.seed,
        "train_sampling_strategy": "sequential" if options.in_order else "random",
        "disable_tqdm": True,
        "gradient_checkpointing": options.checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if options.checkpointing else None,
    }
    if options.peer == "trl":
        from trl import SFTConfig, SFTTrainer

        longest = max(len(row["input_ids"]) for row in rows)
        arguments = SFTConfig(max_length=longest, dataset_kwargs={"skip_prepare_dataset": True}, **common)
        return SFTTrainer(
            model=model,
            args=arguments,
            train_dataset=data,
            processing_class=tokenizer,
            callbacks=[clock],
            peft_config=lora(),
        )
    if options.work == "train":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=options.checkpointing)
    return Trainer(
        model=get_peft_model(model, lora()),
        args=TrainingArguments(**common),
        train_dataset=data,
        data_collator=DataCollatorForSeq2Seq(tokenizer) if ragged else None,
        callbacks=[clock],
    )


def evaluate(trainer: Any) -> dict[str, Any]:
    """Return the seconds of evaluating all rows, after a batch to warm up."""
    rows = trainer.train_dataset
    trainer.evaluate(rows.select(range(trainer.args.per_device_eval_batch_size)))
    started = time.monotonic()
    loss = trainer.evaluate(rows)["eval_loss"]
    return {"seconds": time.monotonic() - started, "tokens": sum(len(ids) for ids in rows["input_ids"]), "loss": loss}


def generate(model: str, tokens: int) -> dict[str, Any]:
    """Return the seconds of writing *tokens* greedily with the adapted model, after some to warm up."""
    base, tokenizer = load(model)
    adapted = get_peft_model(base, lora()).eval()
    inputs = tokenizer(PROMPT, return_tensors="pt")

    def write(count: int) -> int:
        with torch.no_grad():
            output = adapted.generate(**inputs, do_sample=False, max_new_tokens=count, pad_token_id=tokenizer.pad_token_id)
        return int(output.shape[1] - inputs["input_ids"].shape[1])

    write(4)
    started = time.monotonic()
    written = write(tokens)
    return {"seconds": time.monotonic() - started, "tokens": written}


def main() -> None:
    """Do the work and print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", choices=["train", "evaluate", "generate"])
    parser.add_argument("peer", choices=["trainer", "trl"])
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--seed", type=int, default=0, help="of the adapter and of the order of rows")
    parser.add_argument("--in-order", action="store_true", help="train on the rows in their order")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        if options.work == "generate":
            report = generate(options.model, options.tokens)
        elif options.work == "evaluate":
            report = evaluate(trainer_of(options, clock, folder))
        else:
            trainer_of(options, clock, folder).train()
            report = clock.report()
    print(json.dumps(report))


if __name__ == "__main__":
    main()
