"""Options that several commands share, and what they mean: the registry, and what is said on the terminal."""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from qlora_core.registry import Registry

__all__ = [
    "ConfigFile",
    "DataName",
    "Disable",
    "Json",
    "ModelName",
    "Modules",
    "Quiet",
    "Set",
    "Trace",
    "Verbose",
    "make_registry",
    "say_on_stderr",
    "stdout",
]

ConfigFile = Annotated[Path | None, typer.Argument(metavar="[CONFIG.yaml]", help="The configuration.", show_default=False)]
ModelName = Annotated[str | None, typer.Option(help="A hub id or a folder; without CONFIG.yaml, or instead of its model.")]
DataName = Annotated[
    str | None,
    typer.Option(
        help="A file, glob or folder of text or rows (JSONL, CSV, ...), or a dataset on the hub; "
        "without CONFIG.yaml, or instead of its data."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but results, warnings and errors.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say more, the libraries' warnings included.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key, such as training.learning_rate=1e-4. Repeatable."),
]
Modules = Annotated[
    list[str] | None,
    typer.Option("-p", "--plugin", metavar="MODULE", help="Use a module as a plugin without installing it. Repeatable."),
]
Disable = Annotated[
    list[str] | None,
    typer.Option("--disable-plugin", metavar="NAME", help="Don't import a plugin; also QLORA_DISABLE_PLUGINS. Repeatable."),
]


def _trace(wanted: bool) -> None:
    if wanted:
        os.environ["QLORA_TRACE"] = "1"  # for the processes that this one starts, too


Trace = Annotated[
    bool,
    typer.Option(
        "--trace",
        help="Write each call into a plugin and its time to standard error; also QLORA_TRACE=1.",
        is_eager=True,
        callback=_trace,
    ),
]


Trust = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run Python code that comes with the model, as the run's configuration asks."),
]


def make_registry(modules: Sequence[str] | None = None, disable: Sequence[str] | None = None) -> Registry:
    """Return the registry for a command: installed plugins, *modules*, less *disable* and QLORA_DISABLE_PLUGINS."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # -p names a module beside the configuration; last, so that it shadows no library
    blocked = [name for name in re.split(r"[,\s]+", os.environ.get("QLORA_DISABLE_PLUGINS", "")) if name]
    return Registry(modules=modules or (), disable={*(disable or ()), *blocked})


def stdout() -> Console:
    """Return the console for results: colours on a terminal only, and no wrapping of lines elsewhere."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=10_000, no_color=True)


def say_on_stderr(*, quiet: bool, verbose: bool) -> None:
    """Send what the library reports to standard error."""
    level = logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO
    handler = _StandardError()
    handler.setFormatter(_Formatter("%(message)s"))
    logger = logging.getLogger("qlora_core")
    logger.handlers[:] = [handler]
    logger.setLevel(level)
    logger.propagate = False
    if not verbose:
        warnings.filterwarnings("ignore")  # of the libraries; ours are logged


class _StandardError(logging.Handler):
    """Writes to what sys.stderr is at the moment: a live display replaces it, to print above itself."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return f"warning: {text}" if record.levelno == logging.WARNING else text
