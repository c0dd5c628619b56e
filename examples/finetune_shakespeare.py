"""Fine-tune a 4-bit model on a text such as tiny_shakespeare, watch the loss fall, and generate.

    python examples/finetune_shakespeare.py --text tiny_shakespeare.txt

Without --text it writes a text of its own from Python's documentation, so that it runs anywhere.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from qlora_bitsandbytes import NF4
from qlora_console import Progress
from qlora_core import Finished, finetune, generate
from qlora_core.demo_model import demo_model
from qlora_peft import LoRA
from qlora_text import TextFile


def main(
    model: str | None = None,
    text: str | None = None,
    steps: int = 40,
    output: str = "runs/shakespeare",
    sequence_length: int = 256,
    learning_rate: float = 1e-3,
) -> Finished:
    finished = finetune(
        model=model or demo_model().path,
        quantizer=NF4(double_quant=True),
        adapter=LoRA(r=16, alpha=32, target_modules="all-linear"),
        dataset=TextFile(path=text or str(some_text(Path(output).parent))),
        data={"sequence_length": sequence_length, "eval_fraction": 0.1},
        training={
            "max_steps": steps,
            "batch_size": 2,
            "learning_rate": learning_rate,
            "warmup": 0.1,  # below 1 it is a share of the steps
            "eval_at_start": True,  # so that there is a "before"
            "logging_steps": 2,
        },
        callbacks=[Progress()],
        output=output,
        overwrite=True,
    )
    lines = finished.run.read_metrics()
    losses = [line["loss"] for line in lines if "loss" in line]
    perplexities = [line["perplexity"] for line in lines if "perplexity" in line]
    print(f"training loss {losses[0]:.3f} -> {losses[-1]:.3f} nats per token")
    print(f"held-out perplexity {perplexities[0]:.2f} -> {perplexities[-1]:.2f}")

    prompt = "To be, or not to be"
    print(prompt + generate(finished.model, finished.tokenizer, prompt, max_new_tokens=32))
    return finished


def some_text(folder: Path) -> Path:
    """Write the documentation of Python's language topics into *folder*, and return the file."""
    from pydoc_data.topics import topics

    path = folder / "python_topics.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(topics[name] for name in sorted(topics)), encoding="utf-8")
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder or a hub id; by default the model of `qlora demo`")
    parser.add_argument("--text", help="a text file; by default one made from Python's documentation")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps")
    parser.add_argument("--output", default="runs/shakespeare", help="the run's folder; an earlier run in it is replaced")
    main(**vars(parser.parse_args()))
