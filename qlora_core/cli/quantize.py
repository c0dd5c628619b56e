"""`qlora quantize`: write a model quantised, and say what that did to each layer."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlora_core.cli.options import Disable, Json, Modules, Quiet, Trace, Verbose, make_registry, say_on_stderr, stdout
from qlora_core.config import ModelConfig, ProviderConfig
from qlora_core.errors import ConfigError, Problem
from qlora_core.parts import build
from qlora_core.validation import validate
from qlora_core.yaml_file import scalar

if TYPE_CHECKING:
    from qlora_core.fidelity import LayerError

__all__ = ["quantize"]

MANY = 100  # layers, beyond which the table has a line per kind of layer


def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The model: a folder or a hub id.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write; a configuration names it as its model.")],
    quantizer: Annotated[str, typer.Option(help="How it is stored; `qlora plugins list` has the quantizers.")] = "nf4",
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="An option, such as quantizer.double_quant=false or model.revision=main. Repeatable.",
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of what is not quantised: auto, bfloat16, float16 or float32.")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the model that the folder holds.")] = False,
    modules: Modules = None,
    disable: Disable = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    trace: Trace = False,
) -> None:
    """Write a quantised model, with its tokenizer, and show the error of each layer, or of each kind where layers are many.

    transformers loads the folder by itself, and a configuration can name it as its model, with the same quantizer.

    [bold]Examples[/bold]

      qlora quantize HuggingFaceTB/SmolLM2-135M-Instruct smollm2-nf4

      qlora quantize HuggingFaceTB/SmolLM2-135M-Instruct smollm2-fp4 --quantizer fp4 --set quantizer.double_quant=false
    """
    say_on_stderr(quiet=quiet, verbose=verbose)
    options = _sections(overrides or ())
    try:
        config = validate(ModelConfig, {"dtype": dtype, **options["model"], "path": model, "cache": False})
    except ConfigError as error:
        raise error.under("model") from None
    choice = ProviderConfig(name=quantizer, **options["quantizer"])
    _, stored = build(make_registry(modules, disable), "quantizer", choice, "quantizer")
    from qlora_core.libraries import import_libraries
    from qlora_core.prequantized import check_target, write_quantized

    check_target(out, config, overwrite=overwrite)
    import_libraries()
    started = time.perf_counter()
    with _PeakMemory() as memory:
        size, before, layers = write_quantized(config, stored, out)
    report = {
        "model": config.path,
        "quantizer": stored.name,
        "folder": str(out),
        "bytes_before": before,
        "bytes_after": size.bytes,
        "bits_per_parameter": round(size.bits_per_parameter, 3),
        "seconds": round(time.perf_counter() - started, 3),
        "peak_memory_bytes": memory.peak,
        "layers": [{"name": x.name, "shape": x.shape, "bits": round(x.bits, 4), "error": x.error} for x in layers],
    }
    if as_json:
        print(json.dumps(report))
    elif not quiet:
        _show(report, layers, each=verbose or len(layers) <= MANY)


def _sections(overrides: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return what `--set` gives for the sections model and quantizer; raise ConfigError for what is neither."""
    given: dict[str, dict[str, Any]] = {"model": {}, "quantizer": {}}
    problems = []
    for override in overrides:
        key, equals, text = override.partition("=")
        section, _, name = key.strip().partition(".")
        if not equals or section not in given or not name or name in ("name", "path", "cache"):
            what = f"--set {override}: write quantizer.OPTION=value or model.KEY=value, such as quantizer.double_quant=false"
            problems.append(Problem((), what))
        else:
            given[section][name] = scalar(text)
    if problems:
        raise ConfigError(problems)
    return given


@dataclass
class _PeakMemory:
    """The most memory that this process had for itself meanwhile: its own pages, not those of files that it reads."""

    peak: int = 0
    _over: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> _PeakMemory:
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        from qlora_core.device import peak_memory_bytes, pick_device

        self._over.set()
        if self._thread is not None:
            self._thread.join()
        device = pick_device()
        if device.type == "cuda" or not self.peak:  # no /proc
            self.peak = peak_memory_bytes(device)

    def _watch(self) -> None:
        status = Path("/proc/self/status")
        while status.is_file():
            lines = status.read_text(encoding="utf-8").splitlines()
            own = sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssShmem")))
            self.peak = max(self.peak, 1024 * own)
            if self._over.wait(0.01):
                return


def _show(report: dict[str, Any], layers: Sequence[LayerError], *, each: bool) -> None:
    from rich.table import Table

    console = stdout()
    if each:
        table = Table("layer", "shape", "bits per weight", "error")
        for layer in layers:
            shape = f"{layer.shape[0]} x {layer.shape[1]}"
            table.add_row(layer.name, shape, f"{layer.bits:.3f}", "unknown" if layer.error is None else f"{layer.error:.4f}")
    else:
        table = Table("layers", "number", "bits per weight", "error: least", "mean", "most")
        for kind in dict.fromkeys(layer.kind for layer in layers):
            alike = [layer for layer in layers if layer.kind == kind]
            errors = [layer.error for layer in alike if layer.error is not None]
            figures = (min(errors), sum(errors) / len(errors), max(errors)) if errors else ()
            bits = sum(layer.bits for layer in alike) / len(alike)
            table.add_row(kind, str(len(alike)), f"{bits:.3f}", *(f"{figure:.4f}" for figure in figures))
    console.print(table)
    console.print(
        f"{report['bytes_before'] / 1e6:,.1f} MB became {report['bytes_after'] / 1e6:,.1f} MB "
        f"({report['bits_per_parameter']:.2f} bits per parameter) in {report['seconds']:.1f} s; "
        f"peak memory {report['peak_memory_bytes'] / 1e9:.2f} GB\nWrote {report['folder']}",
        markup=False,
    )
