"""`qlora demo`: fine-tune a real small model on Python's documentation, and show what changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlora_core.cli.options import Json, Quiet, Verbose, make_registry, say_on_stderr, stdout
from qlora_core.cli.train import run
from qlora_core.config import RunConfig
from qlora_core.parts import resolve

if TYPE_CHECKING:
    import transformers

__all__ = ["demo"]

OUTPUT = "runs/demo"
PROMPT = "The import statement"
SAMPLE_TOKENS = 48


def demo(
    output: Annotated[str, typer.Option(help="The run's folder; by default an earlier demo is replaced.")] = OUTPUT,
    steps: Annotated[int, typer.Option(min=2, help="Optimizer steps of 1,024 tokens.")] = 36,
    model: Annotated[str | None, typer.Option(help="Another model than SmolLM2-135M-Instruct: a folder or a hub id.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Fine-tune SmolLM2-135M in 4 bits on Python's documentation, in a few minutes on a CPU.

    Shows the configuration, trains with a live display, and prints the perplexity on the held-out tenth and a sample,
    before and after.

    [bold]Example[/bold]

      qlora demo
    """
    from qlora_core.demo_model import DemoModel, demo_model, demo_text
    from qlora_core.provenance import fingerprint_model

    say_on_stderr(quiet=quiet, verbose=verbose)
    source = demo_model() if model is None else DemoModel(model, "your own", fingerprint_model(model))
    resolved, parts = resolve(_configuration(source.path, demo_text(), output, steps), make_registry())
    console = stdout()
    if not as_json:
        console.print("Model", style="bold")
        console.print(f"{source.path}\nfrom {source.origin}\nfingerprint {source.fingerprint}\n", markup=False)
        console.print("Configuration", style="bold")
        console.print(resolved.to_yaml(), markup=False)
    samples = _samples()
    finished = run(resolved, parts, plain_callbacks=[samples], overwrite=output == OUTPUT, quiet=quiet or as_json)
    lines = [line for line in finished.run.read_metrics() if "eval_loss" in line]
    before, after = lines[0], lines[-1]
    report = {
        "run": str(finished.run.folder),
        "perplexity": {"before": before["perplexity"], "after": after["perplexity"]},
        "tokens_scored": after["eval_tokens"],
        "training_seconds": samples.seconds,
        "sample": {"prompt": PROMPT, "before": samples.before, "after": samples.after},
    }
    if as_json:
        print(json.dumps(report))
        return
    _show(console, report)


def _configuration(model: str, text: Path, output: str, steps: int) -> RunConfig:
    return RunConfig.parse(
        {
            "model": model,
            "quantizer": {"name": "nf4", "double_quant": True},
            "adapter": {"name": "lora", "r": 16, "alpha": 32, "target_modules": "all-linear"},
            "dataset": {"name": "text", "path": str(text)},
            "data": {"sequence_length": 512, "eval_fraction": 0.1},
            "training": {
                "max_steps": steps,
                "batch_size": 2,
                "learning_rate": 1e-3,
                "warmup": 0.1,
                "scheduler": "linear",
                "eval_at_start": True,
                "logging_steps": 2,
            },
            "output": output,
        }
    )


def _samples() -> Any:
    """Return a callback that keeps what the model writes before and after training, and how long training took."""
    import time

    from qlora_core.libraries import import_libraries

    import_libraries()
    import transformers

    from qlora_core.generation import generate

    class Samples(transformers.TrainerCallback):
        before = after = ""
        seconds = 0.0
        _started = 0.0

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.before = self._sample(**kwargs)

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self._started = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.seconds += time.perf_counter() - self._started

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.after = self._sample(**kwargs)

        def _sample(self, model: Any, processing_class: transformers.PreTrainedTokenizerBase, **_: Any) -> str:
            return generate(model, processing_class, PROMPT, max_new_tokens=SAMPLE_TOKENS)

    return Samples()


def _show(console: Any, report: dict[str, Any]) -> None:
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    perplexity = report["perplexity"]
    change = 100 * (perplexity["after"] / perplexity["before"] - 1)
    table = Table("", "before", "after", "change")
    table.add_row("perplexity, held-out tenth", f"{perplexity['before']:.2f}", f"{perplexity['after']:.2f}", f"{change:+.0f} %")
    console.print(table)
    for when in ("before", "after"):
        text = Text(PROMPT, style="bold") + Text(report["sample"][when], style="not bold")
        console.print(Panel(text, title=f"{when}: the same prompt, greedy", title_align="left", width=min(console.width, 100)))
    console.print(
        f"{report['training_seconds']:.0f} s of training; {report['tokens_scored']:,} held-out tokens scored. "
        f'The run is in {report["run"]}; go on with:\n  qlora generate {report["run"]} "{PROMPT}"',
        markup=False,
    )
