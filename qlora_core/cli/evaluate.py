"""`qlora eval`: the perplexity of a run on a text or on rows, base and adapted model side by side."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from qlora_core.cli.generate import open_run
from qlora_core.cli.options import Disable, Json, Modules, Quiet, Set, Trace, Trust, Verbose, say_on_stderr, stdout
from qlora_core.cli.train import source_of
from qlora_core.config import ProviderConfig, RunConfig
from qlora_core.errors import ConfigError, DataError
from qlora_core.parts import build
from qlora_core.providers import DatasetSource
from qlora_core.registry import Registry

__all__ = ["evaluate"]

logger = logging.getLogger("qlora_core")


def evaluate(
    source: Annotated[str, typer.Argument(metavar="RUN", help="A run's folder.")],
    data: Annotated[
        str, typer.Option(help="A file, glob or folder of text or rows (JSONL, CSV, ...), or a dataset on the hub, to score.")
    ],
    batch_size: Annotated[int, typer.Option(min=1, help="Blocks per forward pass.")] = 2,
    overrides: Set = None,
    modules: Modules = None,
    disable: Disable = None,
    trust: Trust = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    trace: Trace = False,
) -> None:
    """Score data with the base and the adapted model: perplexity over the tokens that the run would supervise.

    The data are read and cut as the run's own; --set takes data.KEY and dataset.KEY for what shall be otherwise.

    [bold]Examples[/bold]

      qlora eval runs/corpus --data held-out.txt

      qlora eval runs/chats --data held-out.jsonl --set data.truncate=true
    """
    say_on_stderr(quiet=quiet, verbose=verbose)
    saved, registry = open_run(source, modules, disable, trust=trust)
    changed = _changed(saved.run.config, data, overrides or ())
    try:
        chosen, rows_or_text = _as_trained(registry, changed, saved.run.config)
    except ConfigError as error:
        raise error.located("", {}, overrides or ()) from None
    run = saved.run
    from qlora_core.data.encode import encode_split
    from qlora_core.evaluation import evaluate as score

    changes: dict[str, Any] = {"train_on": "auto"} if chosen == "text" else {}  # of a text every token counts
    if run.config.data.template != "none":
        changes["template"] = None  # the tokenizer that the run saved has it
    asked = {override.partition("=")[0].strip() for override in overrides or ()}
    changes = {key: value for key, value in changes.items() if not asked & {"data", f"data.{key}"}}
    settings = changed.data.model_copy(update=changes)
    blocks = encode_split(rows_or_text, "train", saved.load_tokenizer(), settings)
    if blocks is None:
        raise DataError(f"--data {data}: no rows")
    model = saved.load_base()
    precision = run.config.training.mixed_precision
    base = score(model, blocks, batch_size=batch_size, mixed_precision=precision)
    adapted = score(saved.apply_kernels(saved.add_adapter(model)), blocks, batch_size=batch_size, mixed_precision=precision)
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


def _changed(config: RunConfig, data: str, overrides: Sequence[str]) -> RunConfig:
    """Return *config* with *data* for its dataset and the *overrides* applied; raise ConfigError for one of another section."""
    if not data:
        raise ConfigError("--data is empty; name a file, a glob or a folder")
    for override in overrides:
        if override.partition("=")[0].strip().split(".")[0] not in ("data", "dataset"):
            raise ConfigError(
                f"--set {override}: `qlora eval` takes data.KEY and dataset.KEY only; model and adapter are those of the run"
            )
    try:
        return RunConfig.parse({**config.model_dump(mode="json"), "dataset": source_of(data)}, overrides)
    except ConfigError as error:
        raise error.located("", {}, overrides) from None


def _as_trained(registry: Registry, changed: RunConfig, config: RunConfig) -> tuple[str, DatasetSource]:
    """Return the name and the source of the data to score, with the options of the run's own source of that name.

    These are its columns, its encoding, its separator. Of several such sources the first counts whose options fit the
    first row, the one with that very path before the others; where none fits, the data are read without any.
    """
    chosen = changed.sources[0]
    path = os.path.abspath(os.path.expanduser(chosen.provider_options["path"]))
    alike = [source.provider_options for source in config.sources if source.name.rpartition(":")[2] == chosen.name]
    alike.sort(key=lambda options: path not in (options.get("path"), options.get("eval_path")))
    for options in [*({**own, "eval_path": None} for own in alike), {}]:
        rows_or_text = _built(registry, chosen, options)
        try:
            _take_first(rows_or_text)
        except DataError:
            if not options:
                raise
        else:
            break
    return chosen.name, rows_or_text


def _built(registry: Registry, chosen: ProviderConfig, trained: dict[str, Any]) -> DatasetSource:
    """Return the source *chosen*, with those of the run's options *trained* that can apply to it."""
    options = {**trained, **chosen.provider_options}
    try:
        source: DatasetSource = build(registry, "dataset", ProviderConfig(name=chosen.name, **options), "dataset")[1]
        return source
    except ConfigError as error:
        wrong = {str(problem.where[1]) for problem in error.problems if problem.where[1:]} & {*trained}
        wrong -= {*chosen.provider_options}
        if not wrong:
            raise
        logger.info("--data: leaves out what applies to the run's own data only: dataset.%s", ", dataset.".join(sorted(wrong)))
        return _built(registry, chosen, {name: value for name, value in trained.items() if name not in wrong})


def _take_first(source: DatasetSource) -> None:
    """Read the first row of *source*, silently: it will be read again."""
    disabled, logger.disabled = logger.disabled, True
    try:
        next(iter(source.stream()), None)
    except ConfigError as error:
        raise error.under("dataset") from None
    finally:
        logger.disabled = disabled
