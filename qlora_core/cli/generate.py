"""`qlora generate`: continue a prompt with a run or a model."""

from __future__ import annotations

import importlib.machinery
import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from qlora_core.cli.options import Disable, Json, Modules, Quiet, Trace, Trust, Verbose, make_registry, say_on_stderr
from qlora_core.config import ModelConfig, ProviderConfig
from qlora_core.errors import ConfigError
from qlora_core.parts import build
from qlora_core.registry import Registry
from qlora_core.run import Run
from qlora_core.saved import SavedRun

__all__ = ["generate", "open_run"]

logger = logging.getLogger("qlora_core")


def generate(
    source: Annotated[str, typer.Argument(metavar="RUN_OR_MODEL", help="A run's folder, or a model (a folder or a hub id).")],
    prompt: Annotated[str, typer.Argument(help="The text to go on from.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after so many tokens.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token; higher is more varied.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.01, max=1.0, help="Sample from the likeliest tokens with this share.")] = 1.0,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    quantizer: Annotated[str, typer.Option(help="For a plain model: how it is stored.")] = "nf4",
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    modules: Modules = None,
    disable: Disable = None,
    trust: Trust = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    trace: Trace = False,
) -> None:
    """Continue a prompt; the text comes as it is made.

    [bold]Examples[/bold]

      qlora generate runs/corpus "The import statement"

      qlora generate HuggingFaceTB/SmolLM2-135M-Instruct "Why is the sky blue?" --chat --temperature 0.7 --top-p 0.9
    """
    if not prompt:
        raise ConfigError("the prompt is empty; write some text to go on from")
    say_on_stderr(quiet=quiet, verbose=verbose)
    model, tokenizer = _load(source, quantizer, modules, disable, trust=trust)
    import transformers

    from qlora_core.generation import generate as continue_text

    def show(text: str) -> None:
        print(text, end="", flush=True)

    transformers.set_seed(seed)
    if not as_json and not quiet and not chat:
        show(prompt)
    text = continue_text(
        model,
        tokenizer,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        chat=chat,
        on_text=None if as_json else show,
    )
    print(json.dumps({"prompt": prompt, "text": text}) if as_json else "")
    sys.stdout.flush()


def open_run(
    folder: str | Path, modules: list[str] | None, disable: list[str] | None, *, trust: bool = False
) -> tuple[SavedRun, Registry]:
    """Return the finished run in *folder*, and the plugins that its own configuration and the options name.

    A run may come from a stranger: nothing that lies in its folder is executed. Raises ConfigError for a plugin there.
    """
    run = Run.open(folder)
    for module in run.config.plugins:
        if module not in (modules or ()) and _lies_in(module, run.folder):
            raise ConfigError(
                f"{run.folder}: its configuration names the plugin {module!r}, which lies in the run's own folder; "
                f"if you trust that code, name it yourself: -p {module}"
            )
    registry = make_registry([*run.config.plugins, *(modules or [])], [*run.config.disable_plugins, *(disable or [])])
    return SavedRun.open(folder, registry, trust_remote_code=trust), registry


def _lies_in(module: str, folder: Path) -> bool:
    """Return whether Python would import *module* from *folder*, where commands look in the working directory, too."""
    top = module.partition(".")[0]
    found = importlib.machinery.PathFinder.find_spec(top, [*sys.path, os.getcwd()])
    places = [found.origin, *(found.submodule_search_locations or [])] if found is not None else []
    return any(Path(place).resolve().is_relative_to(folder.resolve()) for place in places if place)


def _load(source: str, quantizer: str, modules: list[str] | None, disable: list[str] | None, *, trust: bool) -> tuple[Any, Any]:
    if Run.holds_a_run(Path(source)):
        saved, _ = open_run(source, modules, disable, trust=trust)
        adapted = saved.add_adapter(saved.load_base())
        try:
            saved.apply_kernels(adapted)
        except ConfigError as error:  # they are for speed only
            logger.warning("writing without the run's kernels: %s", error)
        return adapted, saved.load_tokenizer()
    from qlora_core.model import load_model, load_tokenizer

    model = ModelConfig(path=source, trust_remote_code=trust)
    _, stored = build(make_registry(modules, disable), "quantizer", ProviderConfig(name=quantizer), "--quantizer")
    return load_model(model, stored), load_tokenizer(model)
