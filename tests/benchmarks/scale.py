"""A Llama of 7 billion random parameters: written, quantised, given LoRA and trained for 3 steps, with its memory watched.

    python scale.py FOLDER [--parameters 7e9] [--steps 3] [--json build/scale.json]

The model is written shard by shard into FOLDER, 2 bytes per parameter, once; FOLDER also gets the run. Its weights are random,
so that the loss says nothing; the shapes, the memory and the seconds are those of a real model of that size.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import process
from machine import machine, parameters

HERE = Path(__file__).parent
VOCABULARY, SEQ, LIMIT = 32_000, 512, 9e9
TOKENS = 257  # of them that the tokenizer knows
ROWS = 8


def shape(wanted: float) -> dict[str, int]:
    """Return the sizes of a Llama with at least *wanted* parameters, in the proportions of Llama 7B (4,096 wide, 32 deep)."""
    width = next(width for width in itertools.count(128, 128) if count(sized(width + 128)) > wanted)
    return next(sizes for layers in itertools.count(width // 128) if count(sizes := sized(width, layers)) >= wanted)


def sized(width: int, layers: int | None = None) -> dict[str, int]:
    """Return the sizes of a model so wide, with heads of 128; by default as deep as Llama 7B is for its width."""
    heads = width // 128
    return {
        "hidden_size": width,
        "intermediate_size": width * 43 // 16,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "num_hidden_layers": layers or heads,
    }


def count(sizes: dict[str, int]) -> int:
    """Return the parameters of a model of these sizes, embeddings and head apart."""
    return sum(math.prod(size) for tensors in shards(sizes) for size in tensors.values())


def shards(sizes: dict[str, int]) -> Iterator[dict[str, tuple[int, ...]]]:
    """Yield the names and shapes of the tensors of each file: the embeddings, each layer, the end."""
    width, inner = sizes["hidden_size"], sizes["intermediate_size"]
    yield {"model.embed_tokens.weight": (VOCABULARY, width)}
    for number in range(sizes["num_hidden_layers"]):
        layer = f"model.layers.{number}"
        yield {
            **{f"{layer}.self_attn.{name}_proj.weight": (width, width) for name in "qkvo"},
            **{f"{layer}.mlp.{name}_proj.weight": (inner, width) for name in ("gate", "up")},
            f"{layer}.mlp.down_proj.weight": (width, inner),
            **{f"{layer}.{name}_layernorm.weight": (width,) for name in ("input", "post_attention")},
        }
    yield {"model.norm.weight": (width,), "lm_head.weight": (VOCABULARY, width)}


def write_model(folder: Path, sizes: dict[str, int]) -> None:
    """Write the model in bfloat16, a file at a time, with a tokenizer of bytes; the weights depend on their place alone."""
    import torch
    import transformers
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    index: dict[str, str] = {}
    files = list(shards(sizes))
    for number, tensors in enumerate(files):
        name = f"model-{number + 1:05}-of-{len(files):05}.safetensors"
        random = torch.Generator().manual_seed(number)
        made = {
            key: torch.ones(size, dtype=torch.bfloat16)
            if len(size) == 1
            else torch.empty(size, dtype=torch.bfloat16).normal_(0, 0.02, generator=random)
            for key, size in tensors.items()
        }
        save_file(made, folder / name, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, name)
    total = 2 * parameters(folder)
    written = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=1)
    (folder / "model.safetensors.index.json").write_text(written, encoding="utf-8")
    write_tokenizer(folder)
    config = transformers.LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=4096, dtype="bfloat16", **sizes)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)  # last: what has it is whole


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer whose tokens are the 256 bytes and an end of text."""
    import tokenizers
    import transformers

    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(["</s>", *letters])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="</s>").save_pretrained(folder)


def write_rows(file: Path) -> None:
    """Write rows of random tokens."""
    import random

    chance = random.Random(0)
    rows = [[chance.randrange(1, TOKENS) for _ in range(SEQ)] for _ in range(ROWS)]
    file.write_text("".join(json.dumps({"input_ids": row, "labels": row}) + "\n" for row in rows), encoding="utf-8")


def stages(reading: process.Reading) -> dict[str, dict[str, float]]:
    """Return the seconds and the peak bytes of each stage of the run."""
    report = reading.report
    begins, ends = report["begins"], report["ends"]
    marks = [("import, load, quantise, inject", reading.started, begins[0])]
    marks += [(f"step {index + 1}", begin, end) for index, (begin, end) in enumerate(zip(begins, ends, strict=True))]
    marks.append(("save", ends[-1], reading.started + reading.seconds))
    return {name: {"seconds": end - begin, "peak": reading.peak(begin, end)} for name, begin, end in marks}


def train(folder: Path, model: Path, steps: int, overrides: list[str]) -> process.Reading:
    """Return the reading of a run of ours on the model, one row of SEQ tokens per step, with gradient checkpointing."""
    rows = folder / "rows.jsonl"
    write_rows(rows)
    arguments = ["--model", str(model), "--rows", str(rows), "--output", str(folder / "run"), "--seq", str(SEQ), "--batch", "1"]
    sets = ["training.gradient_checkpointing=true", *overrides]
    command = [sys.executable, str(HERE / "ours.py"), "train", *arguments, "--steps", str(steps)]
    environment = {"HF_DATASETS_CACHE": str(folder / "datasets")}
    return process.run([*command, *(word for value in sets for word in ("--set", value))], environment)


def main() -> None:
    """Write, train, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--parameters", type=float, default=7e9)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--json", type=Path, default=Path("build/scale.json"))
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    sizes = shape(options.parameters)
    if options.write:
        write_model(options.write, sizes)
        return
    folder = options.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    model = folder / f"model-{options.parameters:.2g}"
    report: dict[str, Any] = {"machine": machine(), "sizes": sizes}
    if not (model / "config.json").is_file():
        needed, free = 2.6 * options.parameters, shutil.disk_usage(folder).free
        if free < needed:
            sys.exit(f"{folder}: {free / 1e9:.0f} GB are free, {needed / 1e9:.0f} are needed; name another folder")
        started = time.monotonic()
        process.call([sys.executable, __file__, str(folder), "--parameters", str(options.parameters), "--write", str(model)])
        report["write_seconds"] = time.monotonic() - started
        print(f"written in {report['write_seconds']:.0f} s: {model}")
    reading = train(folder, model, options.steps, options.overrides)
    report |= {"parameters": parameters(model), "peak": reading.peak(), "resident": reading.resident}
    report |= {"stages": stages(reading), "report": reading.report}
    print(f"{report['parameters'] / 1e9:.3f} billion parameters, {sizes}")
    for name, stage in report["stages"].items():
        print(f"{name:32} {stage['seconds']:8.1f} s   {stage['peak'] / 1e9:6.2f} GB")
    verdict = "met" if report["peak"] < LIMIT else "not met"
    peak, resident = report["peak"] / 1e9, report["resident"] / 1e9
    print(f"peak {peak:.2f} GB ({resident:.2f} GB resident), wanted below {LIMIT / 1e9:.0f}: {verdict}")
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
