"""`qlora verify`: whether a run depends on what it must not depend on. `qlora_core.verify` measures it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

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

if TYPE_CHECKING:
    from qlora_core.verify import Check, Verified

__all__ = ["verify"]

COLOURS = {"pass": "green", "FAIL": "red", "skipped": "yellow"}


def verify(
    config: ConfigFile = None,
    model: ModelName = None,
    data: DataName = None,
    overrides: Set = None,
    rows: Annotated[int, typer.Option(min=2, help="Samples to compare with, the first that training would see.")] = 4,
    modules: Modules = None,
    disable: Disable = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    trace: Trace = False,
) -> None:
    """Check on your own model and data that a run depends on nothing that it must not depend on.

    Loss and gradients must not change with the micro-batch split, packing, the padding side and the kernels, beyond rounding,
    and a run that is saved and resumed must repeat the next steps to the bit. Writes nothing into the output folder.
    Exits with 1, without a traceback, where a check fails.

    [bold]Examples[/bold]

      qlora verify qlora.yaml

      qlora verify qlora.yaml --rows 8 --set kernels=fused --json
    """
    resolved, parts = read_config(config, overrides, modules, disable, model=model, data=data)
    say_on_stderr(quiet=quiet, verbose=verbose)
    from qlora_core.verify import verify as check

    verified = check(resolved, parts, rows=rows)
    if as_json:
        print(json.dumps(_report(verified)))
    else:
        _show(verified)
    if not verified.passed:
        raise typer.Exit(1)


def _report(verified: Verified) -> dict[str, object]:
    checks = [check.as_json() for check in verified.checks]
    return {"passed": verified.passed, "dtype": verified.dtype, "lengths": verified.lengths, "checks": checks}


def _show(verified: Verified) -> None:
    from rich.markup import escape
    from rich.table import Table

    tokens = ", ".join(f"{length:,}" for length in verified.lengths)
    title = f"{len(verified.lengths)} samples of {tokens} tokens, in {verified.dtype}; differences are relative"
    table = Table(
        "check", "result", "loss differs by", "gradients differ by", "limit", "note", title=title, title_justify="left"
    )
    for check in verified.checks:
        result = f"[{COLOURS[check.result]}]{check.result}[/]"
        table.add_row(check.name, result, _number(check.loss), _number(check.gradients), _limit(check), escape(check.note))
    stdout().print(table)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}" if value else "0"


def _limit(check: Check) -> str:
    if check.loss_limit is None:
        return ""
    if not check.loss_limit and not check.gradients_limit:
        return "0, the same bits"
    return f"{_number(check.loss_limit)} and {_number(check.gradients_limit)}"
