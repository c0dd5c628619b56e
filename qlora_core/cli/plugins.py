"""`qlora plugins`: what is installed, where it comes from, and what it accepts."""

from __future__ import annotations

import inspect
import json
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from qlora_core.cli.options import Disable, Json, Modules, Trace, make_registry, stdout
from qlora_core.errors import PluginError
from qlora_core.registry import KINDS, Plugin, Provided, Registry
from qlora_core.schema import default_of, default_text, type_text
from qlora_core.validation import did_you_mean

if TYPE_CHECKING:
    from qlora_core.testing import Outcome

__all__ = ["app"]

app = typer.Typer(
    name="plugins",
    help="List, describe and check plugins, and write new ones.",
    epilog="Examples: qlora plugins list · qlora plugins show lora",
    no_args_is_help=True,
)


@app.command("list")
def list_plugins(modules: Modules = None, disable: Disable = None, as_json: Json = False, trace: Trace = False) -> None:
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
        mine = [item for item in provided if item.plugin.name == plugin.name]
        names = [f"{i.kind} {i.provider.name}" + (f" (ambiguous: write {i.qualified})" * _ambiguous(i, provided)) for i in mine]
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
    trace: Trace = False,
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


@app.command("check")
def check(
    name: Annotated[str | None, typer.Argument(help="A plugin, a provider, or plugin:provider; all by default.")] = None,
    modules: Modules = None,
    disable: Disable = None,
    as_json: Json = False,
    trace: Trace = False,
) -> None:
    """Run the conformance kit on installed plugins; exits with 2 where a check fails.

    [bold]Examples[/bold]

      qlora plugins check

      qlora plugins check nf4 --json
    """
    from qlora_core.testing import conformance_of, run_checks

    registry = make_registry(modules, disable)
    found = [item for kind in KINDS for item in registry.provided(kind)] if name is None else _find(registry, name)
    failed = [plugin for plugin in registry.plugins if plugin.status == "failed" and name is None]
    results: list[tuple[Provided, list[Outcome]]] = []
    for item in found:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outcomes = list(run_checks(conformance_of(item, modules or ())))
        results.append((item, outcomes))
        if not as_json:
            _show_outcomes(item, outcomes)
    sound = not failed and all(outcome.status != "failed" for _, outcomes in results for outcome in outcomes)
    if as_json:
        checks = [{"provider": i.qualified, "kind": i.kind, "checks": [asdict(o) for o in outcomes]} for i, outcomes in results]
        broken = {plugin.name: plugin.failure for plugin in failed}
        print(json.dumps({"passed": sound, "providers": checks, "failed_plugins": broken}))
    else:
        for plugin in failed:
            stdout().print(f"[red]failed[/red] plugin {escape(plugin.name)}: {escape(plugin.failure)}")
    if not sound:
        raise typer.Exit(2)


@app.command("new")
def new(
    name: Annotated[str, typer.Argument(help="The distribution's name, such as my-quantizer.")],
    kind: Annotated[str, typer.Option(help=f"What it provides: {', '.join(KINDS)}.")],
    output: Annotated[Path | None, typer.Option(help="The folder to write; by default one with the name.")] = None,
) -> None:
    """Write a new plugin: a distribution that works, with one provider and its conformance test, to change into your own.

    [bold]Example[/bold]

      qlora plugins new my-quantizer --kind quantizer
    """
    from qlora_core.scaffold import new_plugin

    folder = output or Path(name)
    for path in new_plugin(name, kind, folder):
        print(path)
    console = stdout()
    console.print(f"\nNext:\n  pip install -e '{folder}[test]'\n  qlora plugins check {name}\n  pytest {folder}", markup=False)


def _show_outcomes(item: Provided, outcomes: list[Outcome]) -> None:
    style = {"passed": "green", "failed": "red", "skipped": "yellow"}
    table = Table("check", "", "why", title=f"{item.kind} {item.qualified}", title_justify="left")
    for outcome in outcomes:
        status = f"[{style[outcome.status]}]{outcome.status}[/{style[outcome.status]}]"
        table.add_row(escape(outcome.check), status, escape(outcome.detail))
    stdout().print(table)


def _find(registry: Registry, name: str) -> list[Provided]:
    every = [item for kind in KINDS for item in registry.provided(kind)]
    found = [item for item in every if name in (item.provider.name, item.qualified, item.plugin.name)]
    if found:
        return found
    broken = {plugin.name: plugin for plugin in registry.plugins if plugin.status != "ok"}
    if name in broken:
        if broken[name].blocked:
            remedy = "leave it out of --disable-plugin, disable_plugins and QLORA_DISABLE_PLUGINS"
            raise PluginError(f"plugin {name!r} is disabled; {remedy}")
        raise PluginError(f"plugin {name!r} failed to load: {broken[name].failure}")
    known = sorted({n for item in every for n in (item.provider.name, item.qualified, item.plugin.name)})
    raise PluginError(f"no plugin or provider {name!r}{did_you_mean(name, known)}; installed: {', '.join(known)}")


def _ambiguous(item: Provided, provided: list[Provided]) -> bool:
    """Return whether another plugin provides the same name, so that only plugin:name finds *item*."""
    return sum((other.kind, other.provider.name) == (item.kind, item.provider.name) for other in provided) > 1


def _plugin(plugin: Plugin, provided: list[Provided]) -> dict[str, Any]:
    mine = [item for item in provided if item.plugin.name == plugin.name]
    return {
        "name": plugin.name,
        "status": plugin.status,
        "failure": plugin.failure or None,
        "distribution": plugin.distribution or None,
        "version": plugin.version or None,
        "module": plugin.module,
        "provides": [
            {"kind": i.kind, "name": i.provider.name, "qualified": i.qualified, "ambiguous": _ambiguous(i, provided)}
            for i in mine
        ],
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
                "default": None if field.is_required() else default_of(field),
                "description": field.description,
            }
            for option, field in item.provider.Options.model_fields.items()
        ],
    }
