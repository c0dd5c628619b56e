"""`qlora config`: write a starter configuration, show one resolved, print the JSON Schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from qlora_core.cli.options import Disable, Json, Modules, Set, Trace, make_registry, stdout
from qlora_core.cli.train import read_config
from qlora_core.errors import RunError
from qlora_core.schema import config_schema, starter_config

__all__ = ["app"]

app = typer.Typer(
    name="config",
    help="Write, show and describe configurations.",
    epilog="Examples: qlora config init · qlora config show qlora.yaml",
    no_args_is_help=True,
)


@app.command("init")
def init(
    path: Annotated[Path, typer.Argument(help="The file to write.")] = Path("qlora.yaml"),
    model: Annotated[str, typer.Option(help="The base model to write into it.")] = "HuggingFaceTB/SmolLM2-135M-Instruct",
    data: Annotated[str, typer.Option(help="The text to write into it.")] = "corpus.txt",
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
) -> None:
    """Write a commented configuration to start from.

    [bold]Examples[/bold]

      qlora config init

      qlora config init shakespeare.yaml --data tiny_shakespeare.txt
    """
    if path.is_dir():
        raise RunError(f"{path} is a folder; name a file in it")
    if path.exists() and not force:
        raise RunError(f"{path} exists already; name another file, or replace it with --force")
    if not path.parent.is_dir():
        raise RunError(f"{path.parent} is no folder; make it first")
    text = starter_config(make_registry(), model=model, data=data, output=f"runs/{path.stem}")
    path.write_text(text, encoding="utf-8")
    stdout().print(f"Wrote {path}. Run it with: qlora train {path}", markup=False)


@app.command("show")
def show(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="The configuration.")],
    overrides: Set = None,
    modules: Modules = None,
    disable: Disable = None,
    as_json: Json = False,
    trace: Trace = False,
) -> None:
    """Show a configuration resolved: every default filled in, every provider with its plugin.

    [bold]Examples[/bold]

      qlora config show qlora.yaml

      qlora config show qlora.yaml --set quantizer.double_quant=false --json
    """
    resolved, parts = read_config(config, overrides, modules, disable)
    parts.check(resolved)
    print(json.dumps(resolved.model_dump(mode="json")) if as_json else resolved.to_yaml(), end="\n" if as_json else "")


@app.command("schema")
def schema(modules: Modules = None, disable: Disable = None, trace: Trace = False) -> None:
    """Print the JSON Schema of a configuration, the installed plugins' options included; editors complete with it.

    [bold]Example[/bold]

      qlora config schema > qlora.schema.json
    """
    print(json.dumps(config_schema(make_registry(modules, disable)), indent=2))
