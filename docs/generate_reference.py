"""Rewrite the generated regions of docs/reference from the code: python docs/generate_reference.py [--check]

A region stands between `<!-- generated: NAME -->` and `<!-- end -->`; NAME is one of the functions in REGIONS. Only what
this distribution provides is described, whatever else is installed. A test fails where the committed text is out of date.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import typer.main
from pydantic import BaseModel

from qlora_core.cli.main import app
from qlora_core.config import DataConfig, ModelConfig, RunConfig, TokensConfig, TrainingConfig
from qlora_core.hooks import ProviderHooks
from qlora_core.registry import KINDS, Registry, hook_name
from qlora_core.schema import default_text, type_text

REFERENCE = Path(__file__).parent / "reference"
SECTIONS: dict[str, type[BaseModel]] = {
    "model": ModelConfig,
    "data": DataConfig,
    "tokens": TokensConfig,
    "training": TrainingConfig,
}
PROVIDED = {"quantizer", "adapter", "dataset", "kernels"}
LISTED = {"callbacks", "exports"}
REGION = re.compile(r"(<!-- generated: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *[[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def option_rows(model: type[BaseModel], prefix: str = "") -> list[list[str]]:
    """Return name, type, default and description of each field."""
    return [
        [f"`{prefix}{name}`", type_text(field.annotation), _code(default_text(field)), field.description or ""]
        for name, field in model.model_fields.items()
    ]


def configuration_top() -> str:
    """Describe the top level: short forms, where each section is described."""
    rows = []
    for name, field in RunConfig.model_fields.items():
        kind = "a provider" if name in PROVIDED else "list of providers" if name in LISTED else type_text(field.annotation)
        kind = "a provider, or a list of them" if name == "dataset" else kind
        if name in SECTIONS:
            kind = f"[section](#{name})"
        default = field.default
        shown = "required" if field.is_required() else ""
        if not shown and name in PROVIDED:
            shown = _code(default.name)
        elif not shown and name in LISTED:
            shown = _code(f"[{', '.join(choice.name for choice in default)}]")
        elif not shown and name not in SECTIONS:
            shown = _code(default_text(field))
        rows.append([f"`{name}`", kind, shown, field.description or ""])
    return table(["key", "what", "default", "meaning"], rows)


def configuration_sections() -> str:
    """Describe each section's keys."""
    head = ["key", "type", "default", "meaning"]
    return "\n".join(f"## `{name}`\n\n{table(head, option_rows(model, f'{name}.'))}" for name, model in SECTIONS.items())


def providers() -> str:
    """Describe every provider of this distribution."""
    registry, parts = Registry(), []
    for kind in KINDS:
        parts.append(f"## {kind}\n")
        for found in registry.provided(kind):
            if found.plugin.distribution != "qlora-core":
                continue
            parts.append(f"### `{found.provider.name}` ({kind})\n")
            parts.append(f"{inspect.getdoc(found.provider)}\n")
            import_line = f"from {found.provider.__module__} import {found.provider.__name__}"
            parts.append(f"Qualified name `{found.qualified}`; in Python `{import_line}`.\n")
            rows = option_rows(found.provider.Options)
            parts.append(table(["option", "type", "default", "meaning"], rows) if rows else "It has no options.\n")
    return "\n".join(parts)


def hooks() -> str:
    """Describe every hook and the class that its answers must be."""
    parts = []
    for kind, base in KINDS.items():
        hook = getattr(ProviderHooks, hook_name(kind))
        parts.append(f"## `{hook_name(kind)}`\n\n{inspect.getdoc(hook)}\n")
        parts.append(f"Returns a list of `{base.__name__}` classes. {inspect.getdoc(base)}\n")
        attributes = [row for row in _attributes(base) if row[0] not in ("`name`", "`options`")]
        if attributes:
            parts.append(table(["class attribute", "default", "meaning"], attributes))
        rows = [
            [f"`{name}{_signature(member)}`", "yes" if name in base.__abstractmethods__ else "no", _first(member)]
            for name, member in _methods(base)
        ]
        parts.append(table(["method", "must implement", "what it does"], rows))
    return "\n".join(parts)


def provider_methods() -> str:
    """Describe what all kinds have in common."""
    base = next(iter(KINDS.values())).__mro__[1]
    rows = [[f"`{name}{_signature(member)}`", _first(member)] for name, member in _methods(base)]
    return table(["method", "what it does"], rows)


def kits() -> dict[str, type[Any]]:
    """Return the conformance kit of each kind."""
    from qlora_core import testing

    found = [kit for kit in vars(testing).values() if inspect.isclass(kit) and hasattr(kit, "kind")]
    return {kit.kind: kit for kind in KINDS for kit in found if kit.kind == kind}


def conformance() -> str:
    """Describe every check of the conformance kit, those of all kinds first."""
    base = next(iter(kits().values())).__mro__[1]
    parts = []
    for heading, kit in (("every kind", base), *kits().items()):
        parts.append(f"## {heading}\n\nClass `{kit.__name__}`. {inspect.getdoc(kit)}\n")
        if attributes := [row for row in _attributes(kit) if row[2]]:
            parts.append(table(["class attribute", "default", "meaning"], attributes))
        checks = [[f"`{name}`", " ".join(_first(member).split())] for name, member in _methods(kit) if name.startswith("test_")]
        parts.append(table(["check", "what it demands"], checks))
    return "\n".join(parts)


def commands() -> str:
    """Describe every command with its arguments and options."""
    parts = []
    for path, command in _commands(typer.main.get_command(app), "qlora"):
        text, _, examples = (command.help or "").partition("[bold]Example")
        parts.append(f"## `{path}`\n\n{inspect.cleandoc(text)}\n")
        rows = [_parameter(p) for p in command.params if not p.hidden and p.name != "help"]
        if rows:
            parts.append(table(["argument or option", "default", "meaning"], rows))
        lines = [line.strip() for line in examples.splitlines()[1:] if line.strip()]
        if lines:
            reason = "<!-- not run: these are the examples of --help; the commands run on the other pages -->"
            parts.append(f"{reason}\n```bash\n" + "\n".join(lines) + "\n```\n")
    return "\n".join(parts)


REGIONS: dict[str, Callable[[], str]] = {
    "configuration-top": configuration_top,
    "configuration-sections": configuration_sections,
    "providers": providers,
    "hooks": hooks,
    "provider-methods": provider_methods,
    "conformance": conformance,
    "commands": commands,
}


def generated(text: str) -> str:
    """Return the page *text* with its regions as the code says."""
    return REGION.sub(lambda match: f"{match[1]}\n{REGIONS[match['name']]()}\n{match[3]}", text)


def _commands(group: Any, path: str) -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


def _parameter(parameter: Any) -> list[str]:
    if parameter.param_type_name == "argument":
        name = parameter.metavar or parameter.name.upper()
    else:
        name = ", ".join(parameter.opts)
        if not parameter.is_flag:
            name += f" {parameter.metavar or parameter.opts[0].strip('-').rpartition('-')[2].upper()}"
    default = parameter.default
    if parameter.required:
        shown = "required"
    else:
        shown = "" if default is None or default is False or callable(default) else _code(str(default))
    return [f"`{name}`", shown, parameter.help or ""]


def _methods(owner: type[Any]) -> Iterator[tuple[str, Any]]:
    """Yield the public methods that *owner* itself defines, class methods too, with their names."""
    for name, member in vars(owner).items():
        function = member.__func__ if isinstance(member, classmethod) else member
        if inspect.isfunction(function) and not name.startswith("_"):
            yield name, function


def _attributes(owner: type[Any]) -> list[list[str]]:
    """Return name, default and the docstring below it of each attribute that *owner* itself defines."""
    body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0].body  # type: ignore[attr-defined]
    rows = []
    for statement, following in zip(body, [*body[1:], None], strict=True):
        if isinstance(statement, (ast.Assign, ast.AnnAssign)):
            target = statement.target if isinstance(statement, ast.AnnAssign) else statement.targets[0]
            is_text = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
            meaning = inspect.cleandoc(following.value.value) if is_text else ""
            default = _code(ast.unparse(statement.value)) if statement.value is not None else ""
            rows.append([f"`{target.id}`", default, meaning])
    return rows


def _signature(function: Any) -> str:
    names = [
        f"{name}={parameter.default!r}" if parameter.default is not inspect.Parameter.empty else name
        for name, parameter in inspect.signature(function).parameters.items()
        if name not in ("self", "cls")
    ]
    return f"({', '.join(names)})"


def _first(function: Any) -> str:
    return (inspect.getdoc(function) or "").partition("\n\n")[0].replace("\n", " ")


def _code(text: str) -> str:
    return text if text in ("required", "") else f"`{text}`"


def main() -> int:
    """Rewrite the pages, or with --check only say which are out of date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a page is out of date")
    check = parser.parse_args().check
    stale = []
    for page in sorted(REFERENCE.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        new = generated(text)
        if new != text:
            stale.append(page.name)
            if not check:
                page.write_text(new, encoding="utf-8")
    print(f"{'out of date' if check else 'rewritten'}: {', '.join(stale) or 'none'}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
