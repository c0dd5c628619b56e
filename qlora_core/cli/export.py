"""`qlora export`: write a finished run in another format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from qlora_core.cli.generate import open_run
from qlora_core.cli.options import Disable, Json, Modules, Quiet, Trace, Trust, Verbose, say_on_stderr, stdout
from qlora_core.errors import ConfigError, PluginError, Problem, RunError
from qlora_core.parts import Parts, made
from qlora_core.yaml_file import scalar

__all__ = ["export"]


def export(
    source: Annotated[str, typer.Argument(metavar="RUN", help="A run's folder.")],
    to: Annotated[str, typer.Option(help="The exporter; `qlora plugins list` has them.")],
    output: Annotated[Path | None, typer.Option(help="The folder to write; default exports/NAME in the run's.")] = None,
    options: Annotated[
        list[str] | None, typer.Option("--set", metavar="OPTION=VALUE", help="An option of the exporter. Repeatable.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder if it exists.")] = False,
    modules: Modules = None,
    disable: Disable = None,
    trust: Trust = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    trace: Trace = False,
) -> None:
    """Write a finished run in another format.

    [bold]Example[/bold]

      qlora export runs/corpus --to merged --output corpus-model
    """
    say_on_stderr(quiet=quiet, verbose=verbose)
    chosen: dict[str, object] = {}
    for option in options or ():
        name, equals, text = option.partition("=")
        if not equals:
            raise ConfigError(f"--set {option}: write option=value")
        chosen[name.strip()] = scalar(text)
    saved, registry = open_run(source, modules, disable, trust=trust)
    try:
        exporter = made(registry.find("exporter", to), chosen)
    except PluginError as error:
        raise ConfigError([Problem(("--to",), str(error))]) from error
    except ConfigError as error:
        raise error.under("--set") from None
    target = output or saved.run.folder / "exports" / exporter.name
    if target.exists() and not overwrite:
        raise RunError(f"{target} exists already; name another folder with --output, or replace it with --overwrite")
    parts = Parts(saved.quantizer, saved.adapter, (), exporters=(exporter,))
    parts.check(saved.run.config)
    parts.check_libraries()
    from qlora_core.pipeline import export as write

    folder = write(saved, exporter, target)
    if as_json:
        print(json.dumps({"run": str(saved.run.folder), "exporter": exporter.name, "folder": str(folder)}))
    elif not quiet:
        stdout().print(f"Wrote {folder}", markup=False)
