"""`qlora plugins`: what is installed, where it comes from, and what it accepts."""

from __future__ import annotations

import inspect
import json
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from qlora_core.cli.options import Disable, Json, Modules, make_registry, stdout
from qlora_core.errors import PluginError
from qlora_core.registry import KINDS, Plugin, Provided, Registry
from qlora_core.schema import default_text, type_text
from qlora_core.validation import did_you_mean

__all__ = ["app"]

app = typer.Typer(
    name="plugins",
    help="List and describe the installed plugins.",
    epilog="Examples: qlora plugins list · qlora plugins show lora",
    no_args_is_help=True,
)


@app.command("list")
def list_plugins(modules: Modules = None, disable: Disable = None, as_json: Json = False) -> None:
    """List the plugins: what each provides, and which failed or are disabled.

    [bold]Examples[/bold]

      qlora plugins list

      qlora plugins list -p my_module --disable-plugin text --json
    """
    registry = make_registry(modules, disable)
    provided = [item for kind in KINDS for item in registry.provided(kind)]
    if as_json:
        print(json.dumps({"plugins": [_plugin(plugin, provided) for plugin in registry.plugins]}))
        return
    table = Table("plugin", "provides", "from", "status")
    for plugin in registry.plugins:
        names = [f"{item.kind} {item.provider.name}" for item in provided if item.plugin.name == plugin.name]
        status = {"ok": "[green]ok[/green]", "blocked": "[yellow]disabled[/yellow]"}.get(plugin.status, "[red]failed[/red]")
        detail = f"{status}: {escape(plugin.failure)}" if plugin.failure else status
        table.add_row(escape(plugin.name), escape("\n".join(names)), escape(plugin.origin), detail)
    stdout().print(table)


@app.command("show")
def show(
    name: Annotated[str, typer.Argument(help="A plugin, a provider, or plugin:provider.")],
    modules: Modules = None,
    disable: Disable = None,
    as_json: Json = False,
) -> None:
    """Describe a plugin or a provider: its kind, where it comes from, and its options.

    [bold]Examples[/bold]

      qlora plugins show lora

      qlora plugins show bitsandbytes:nf4 --json
    """
    registry = make_registry(modules, disable)
    found = _find(registry, name)
    if as_json:
        print(json.dumps({"providers": [_provided(item) for item in found]}))
        return
    console = stdout()
    for item in found:
        origin = escape(f"{item.kind} · plugin {item.plugin.name} · {item.plugin.origin}")
        console.print(f"[bold]{escape(item.provider.name)}[/bold] · {origin}")
        console.print(f"{inspect.getdoc(item.provider) or ''}\n", markup=False)
        fields = item.provider.Options.model_fields
        if not fields:
            console.print("It has no options.\n")
            continue
        table = Table("option", "type", "default", "what it does")
        for option, field in fields.items():
            cells = (option, type_text(field.annotation), default_text(field), field.description or "")
            table.add_row(*(escape(cell) for cell in cells))
        console.print(table)


def _find(registry: Registry, name: str) -> list[Provided]:
    every = [item for kind in KINDS for item in registry.provided(kind)]
    found = [item for item in every if name in (item.provider.name, item.qualified, item.plugin.name)]
    if found:
        return found
    broken = {plugin.name: plugin for plugin in registry.plugins if plugin.status != "ok"}
    if name in broken:
        raise PluginError(f"plugin {name!r} is {broken[name].status}: {broken[name].failure or 'it is disabled'}")
    known = sorted({n for item in every for n in (item.provider.name, item.qualified, item.plugin.name)})
    raise PluginError(f"no plugin or provider {name!r}{did_you_mean(name, known)}; installed: {', '.join(known)}")


def _plugin(plugin: Plugin, provided: list[Provided]) -> dict[str, Any]:
    mine = [item for item in provided if item.plugin.name == plugin.name]
    return {
        "name": plugin.name,
        "status": plugin.status,
        "failure": plugin.failure or None,
        "distribution": plugin.distribution or None,
        "version": plugin.version or None,
        "module": plugin.module,
        "provides": [{"kind": item.kind, "name": item.provider.name} for item in mine],
    }


def _provided(item: Provided) -> dict[str, Any]:
    return {
        "name": item.provider.name,
        "kind": item.kind,
        "plugin": item.plugin.name,
        "distribution": item.plugin.distribution or None,
        "version": item.plugin.version or None,
        "class": f"{item.provider.__module__}.{item.provider.__qualname__}",
        "description": inspect.getdoc(item.provider),
        "options": [
            {
                "name": option,
                "type": type_text(field.annotation),
                "required": field.is_required(),
                "default": None if field.is_required() else field.get_default(call_default_factory=True),
                "description": field.description,
            }
            for option, field in item.provider.Options.model_fields.items()
        ],
    }
