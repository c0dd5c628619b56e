"""`qlora train`: run a configuration, or a model and a text with sound defaults."""

from __future__ import annotations

import glob
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlora_core import yaml_file
from qlora_core.calls import ProviderFailed
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
    make_registry,
    say_on_stderr,
    stdout,
)
from qlora_core.config import RunConfig
from qlora_core.data.files import hold_rows, is_hub_name
from qlora_core.errors import ConfigError, QLoRAError
from qlora_core.parts import Parts, resolve

if TYPE_CHECKING:
    from qlora_core.pipeline import Finished
    from qlora_core.stages import Stage

__all__ = ["RunCrashed", "read_config", "run", "source_of", "train"]


def train(
    config: ConfigFile = None,
    model: ModelName = None,
    data: DataName = None,
    output: Annotated[
        str | None, typer.Option(help="The run's folder; default runs/NAME of the configuration or text.")
    ] = None,
    overrides: Set = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint, or from --resume CHECKPOINT.")
    ] = False,
    resume_from: Annotated[str | None, typer.Option(hidden=True)] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run that the folder holds.")] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Go through every stage with a tiny model and the first rows; leaves nothing behind."),
    ] = False,
    modules: Modules = None,
    disable: Disable = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    trace: Trace = False,
) -> None:
    """Fine-tune a model.

    [bold]Examples[/bold]

      qlora train qlora.yaml

      qlora train qlora.yaml --set training.learning_rate=1e-4 --set adapter.r=32

      qlora train --model HuggingFaceTB/SmolLM2-135M-Instruct --data corpus.txt --output runs/corpus

      qlora train qlora.yaml --resume

      qlora train qlora.yaml --dry-run
    """
    resolved, parts = read_config(config, overrides, modules, disable, model=model, data=data, output=output)
    quiet = quiet or os.environ.get("RANK", "0") != "0"  # of torchrun's processes only the first one speaks
    say_on_stderr(quiet=quiet, verbose=verbose)
    if dry_run:
        _rehearse(resolved, parts, as_json, overwrite=overwrite, resume=resume_from or resume, quiet=quiet)
        return
    finished = run(resolved, parts, overwrite=overwrite, resume=resume_from or resume, quiet=quiet)
    if as_json:
        print(json.dumps({"run": str(finished.run.folder), "metrics": finished.metrics}))
    elif not quiet:
        folder = finished.run.folder
        stdout().print(f'Done: {folder}\nTry it with: qlora generate {folder} "..."', markup=False)


def _rehearse(resolved: RunConfig, parts: Parts, as_json: bool, *, quiet: bool, **options: Any) -> None:
    """Say what each stage of a dry run took; what a defect leaves goes to a temporary file, not to the run's folder."""
    from rich.console import Console

    from qlora_core.rehearsal import rehearse

    console = Console(stderr=True, highlight=False)

    def tell(stage: Stage) -> None:
        if stage.failed or not quiet:
            took = f"failed after {stage.seconds:.1f} s" if stage.failed else f"{stage.seconds:5.1f} s"
            console.print(f"{stage.name:<20}{took}", markup=False)

    stages = rehearse(resolved, parts, quiet=quiet, tell=tell, **options)
    seconds = sum(stage.seconds for stage in stages)
    if as_json:
        listed = [{"stage": stage.name, "seconds": round(stage.seconds, 3)} for stage in stages]
        print(json.dumps({"stages": listed, "seconds": round(seconds, 3)}))
    elif not quiet:
        stdout().print(
            f"Passed: {len(stages)} stages in {seconds:.1f} s, and nothing was written to {resolved.output}", markup=False
        )


class RunCrashed(Exception):
    """A defect that ended a run; its cause is what happened, and `folder` is where its traceback belongs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        super().__init__(str(folder))


def run(resolved: RunConfig, parts: Parts, **options: Any) -> Finished:
    """Execute *resolved*; an exception that is no QLoRAError becomes RunCrashed."""
    from qlora_core.pipeline import execute

    try:
        return execute(resolved, parts, **options)
    except ProviderFailed as error:
        raise RunCrashed(Path(resolved.output)) from error
    except (QLoRAError, KeyboardInterrupt):
        raise
    except Exception as error:
        raise RunCrashed(Path(resolved.output)) from error


def source_of(data: str) -> dict[str, Any]:
    """Return the dataset that `--data` names: rows of files that hold some, or of the hub, else raw text."""
    return {"name": "records" if is_hub_name(data) or hold_rows(data) else "text", "path": data}


def read_config(
    path: Path | None,
    overrides: list[str] | None = None,
    modules: list[str] | None = None,
    disable: list[str] | None = None,
    *,
    model: str | None = None,
    data: str | None = None,
    output: str | None = None,
) -> tuple[RunConfig, Parts]:
    """Return the configuration that a command names by file, by options, or by both, resolved; options win."""
    lines: dict[tuple[str | int, ...], int] = {}
    raw: dict[str, Any] = {}
    if path is not None:
        raw, lines = yaml_file.read(path)
    elif model is None or data is None:
        raise ConfigError(
            "name a configuration file, or both --model and --data; `qlora config init` writes a file to start from"
        )
    if model is not None:
        raw["model"] = model
    if data is not None:
        raw["dataset"] = source_of(data)
    if output is not None:
        raw["output"] = output
    if data == "":
        raise ConfigError("--data is empty; name a file, a glob or a folder")
    stem = Path(os.path.abspath(data or path or "run")).stem
    raw.setdefault("output", f"runs/{stem if stem and not glob.has_magic(stem) else 'run'}")
    for key, extra in (("plugins", modules), ("disable_plugins", disable)):
        if extra:
            given = raw.get(key) or []
            raw[key] = [*given, *extra] if isinstance(given, list) else given
    try:
        settings = RunConfig.parse(raw, overrides or ())
        return resolve(settings, make_registry(settings.plugins, settings.disable_plugins))
    except ConfigError as error:
        raise error.located(str(path), lines, overrides or ()) from None
