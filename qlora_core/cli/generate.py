"""`qlora generate`: continue a prompt with a run or a model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from qlora_core.cli.options import Disable, Json, Modules, Quiet, Trace, Verbose, make_registry, say_on_stderr
from qlora_core.config import ModelConfig, ProviderConfig
from qlora_core.errors import ConfigError
from qlora_core.parts import build
from qlora_core.registry import Registry
from qlora_core.run import Run
from qlora_core.saved import SavedRun

__all__ = ["generate", "open_run"]


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
    model, tokenizer = _load(source, quantizer, modules, disable)
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


def open_run(folder: str | Path, modules: list[str] | None, disable: list[str] | None) -> tuple[SavedRun, Registry]:
    """Return the finished run in *folder*, and the plugins that its own configuration and the options name."""
    config = Run.open(folder).config
    registry = make_registry([*config.plugins, *(modules or [])], [*config.disable_plugins, *(disable or [])])
    return SavedRun.open(folder, registry), registry


def _load(source: str, quantizer: str, modules: list[str] | None, disable: list[str] | None) -> tuple[Any, Any]:
    if Run.holds_a_run(Path(source)):
        saved, _ = open_run(source, modules, disable)
        return saved.add_adapter(saved.load_base()), saved.load_tokenizer()
    from qlora_core.model import load_model, load_tokenizer

    model = ModelConfig(path=source)
    _, stored = build(make_registry(modules, disable), "quantizer", ProviderConfig(name=quantizer), "--quantizer")
    return load_model(model, stored), load_tokenizer(model)
