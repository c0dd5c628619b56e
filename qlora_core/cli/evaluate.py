"""`qlora eval`: the perplexity of a run on a text or on rows, base and adapted model side by side."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from qlora_core.cli.generate import open_run
from qlora_core.cli.options import Disable, Json, Modules, Quiet, Trace, Verbose, say_on_stderr, stdout
from qlora_core.cli.train import source_of
from qlora_core.config import ProviderConfig, RunConfig
from qlora_core.errors import DataError
from qlora_core.parts import build

__all__ = ["evaluate"]


def evaluate(
    source: Annotated[str, typer.Argument(metavar="RUN", help="A run's folder.")],
    data: Annotated[str, typer.Option(help="A file, glob or folder of text or rows (JSONL, CSV, ...) to score.")],
    batch_size: Annotated[int, typer.Option(min=1, help="Blocks per forward pass.")] = 2,
    modules: Modules = None,
    disable: Disable = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    trace: Trace = False,
) -> None:
    """Score data with the base and the adapted model: perplexity over the tokens that the run would supervise.

    [bold]Example[/bold]

      qlora eval runs/corpus --data held-out.txt
    """
    say_on_stderr(quiet=quiet, verbose=verbose)
    saved, registry = open_run(source, modules, disable)
    chosen = _as_trained(ProviderConfig(**source_of(data)), saved.run.config)
    _, rows_or_text = build(registry, "dataset", chosen, "--data")
    run, model, tokenizer = saved.run, saved.load_base(), saved.load_tokenizer()
    from qlora_core.data.encode import encode_split
    from qlora_core.evaluation import evaluate as score

    changes: dict[str, Any] = {"train_on": "auto"} if chosen.name == "text" else {}  # of a text every token counts
    if run.config.data.template != "none":
        changes["template"] = None  # the tokenizer that the run saved has it
    settings = run.config.data.model_copy(update=changes)
    blocks = encode_split(rows_or_text, "train", tokenizer, settings)
    if blocks is None:
        raise DataError(f"--data {data}: no rows")
    precision = run.config.training.mixed_precision
    base = score(model, blocks, batch_size=batch_size, mixed_precision=precision)
    adapted = score(saved.add_adapter(model), blocks, batch_size=batch_size, mixed_precision=precision)
    rows = {"base": base, "adapted": adapted}
    if as_json:
        report = {n: {"loss": s.loss, "perplexity": s.perplexity, "tokens": s.tokens} for n, s in rows.items()}
        print(json.dumps({"run": str(run.folder), "data": data, **report}))
        return
    from rich.table import Table

    table = Table("model", "perplexity", "loss (nats/token)", "tokens scored")
    for name, result in rows.items():
        table.add_row(name, f"{result.perplexity:.3f}", f"{result.loss:.4f}", f"{result.tokens:,}")
    stdout().print(table)


def _as_trained(chosen: ProviderConfig, config: RunConfig) -> ProviderConfig:
    """Return *chosen* with the options of the run's own dataset of that name: its columns, its encoding, its separator."""
    for source in config.sources:
        if source.name.rpartition(":")[2] == chosen.name:
            options = {**source.provider_options, "eval_path": None, **chosen.provider_options}
            return ProviderConfig(name=chosen.name, **options)
    return chosen
