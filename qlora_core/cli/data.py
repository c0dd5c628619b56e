"""`qlora data`: what the data look like before training, to a person and to a program. `data.inspect` computes it."""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from qlora_core.cli.options import (
    ConfigFile,
    DataName,
    Disable,
    Json,
    ModelName,
    Modules,
    Quiet,
    Set,
    Trace,
    Verbose,
    say_on_stderr,
    stdout,
)
from qlora_core.cli.train import read_config
from qlora_core.errors import ConfigError, RunError

__all__ = ["data"]


def data(
    config: ConfigFile = None,
    model: ModelName = None,
    data: DataName = None,
    overrides: Set = None,
    sample: Annotated[int, typer.Option(min=0, help="Training blocks to show, evenly spread over the data.")] = 3,
    tokens: Annotated[bool, typer.Option("--tokens", help="Show one token per line: index, id, label and text.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Leave nothing out of long samples and full blocks.")] = False,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write one HTML page with everything; the samples go there only.")
    ] = None,
    modules: Modules = None,
    disable: Disable = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    trace: Trace = False,
) -> None:
    """Show what the data look like before training: counts, lengths, findings, and samples. Loads no weights.

    On a terminal supervised text is green, masked text dim, special tokens are magenta, or stand on green where they are
    supervised, and every second token is underlined. Elsewhere ⟦supervised⟧ text and «special» tokens stand in brackets. ⏎ is
    a line break.

    [bold]Examples[/bold]

      qlora data qlora.yaml

      qlora data qlora.yaml --sample 1 --tokens --full

      qlora data qlora.yaml --set data.on_problem=warn --html data.html
    """
    if html is not None:
        _check_file(html)
    resolved, parts = read_config(config, overrides, modules, disable, model=model, data=data)
    say_on_stderr(quiet=quiet, verbose=verbose)
    for handler in logging.getLogger("qlora_core").handlers:
        handler.addFilter(lambda record: not hasattr(record, "finding"))  # all of them stand among the results
    parts.check(resolved)
    from qlora_core.data.inspect import inspect
    from qlora_core.pipeline import prepare

    found = inspect(resolved, parts.datasets, prepare(resolved, parts), sample)
    if html is not None:
        from qlora_core.cli.data_html import page

        _write(html, page(found))
    if as_json:
        print(json.dumps(asdict(found)))
        return
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(encoding="utf-8", errors="replace")  # other encodings lack the marks, and what chats have
    from qlora_core.cli.data_terminal import Preview, print_statistics

    console = stdout()
    print_statistics(console, found)
    if html is not None and not quiet:
        console.print(f"Wrote {html}", markup=False)
    elif html is None and found.blocks:
        Preview(console, found, tokens=tokens, full=full).print()


def _check_file(path: Path) -> None:
    """Raise ConfigError unless *path* can become a file."""
    if path.is_dir():
        raise ConfigError(f"--html {path}: is a folder; name a file in it, such as {path / 'data.html'}")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"--html {path}: there is no folder {path.absolute().parent}; make it, or name another file")


def _write(path: Path, text: str) -> None:
    """Write *text* to *path*, whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise RunError(f"--html {path}: {error.strerror or error}; name another file") from error
    finally:
        partial.unlink(missing_ok=True)
