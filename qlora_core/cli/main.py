"""The entry point: commands, and what an error becomes. Exit codes: 0 done, 2 the user can mend it, 1 a defect of ours."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from qlora_core import __version__
from qlora_core.calls import ProviderFailed
from qlora_core.cli import config, data, demo, doctor, evaluate, export, generate, plugins, quantize, train, verify
from qlora_core.errors import QLoRAError

__all__ = ["app", "main"]

app = typer.Typer(
    name="qlora",
    help="Fine-tune a 4-bit language model with low-rank adapters, on a CPU or a GPU. Every part is a plugin.",
    epilog="Start with: qlora demo · qlora config init · qlora train qlora.yaml",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("train")(train.train)
app.command("data")(data.data)
app.command("generate")(generate.generate)
app.command("eval")(evaluate.evaluate)
app.command("export")(export.export)
app.command("quantize")(quantize.quantize)
app.command("verify")(verify.verify)
app.command("demo")(demo.demo)
app.command("doctor")(doctor.doctor)
app.add_typer(plugins.app)
app.add_typer(config.app)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"qlora-core {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    tracing = os.environ.get("QLORA_TRACE")
    try:
        with _interrupted_by_sigterm() as terminated:
            code = _run(_split_resume(given))
        if terminated and code == 128 + signal.SIGINT:
            code = 128 + signal.SIGTERM
    finally:  # --trace is for this command, and whoever calls this function may call it again
        if tracing is None:
            os.environ.pop("QLORA_TRACE", None)
    sys.exit(code)


@contextlib.contextmanager
def _interrupted_by_sigterm() -> Iterator[list[int]]:
    """Make SIGTERM do what Ctrl-C does, which removes what is temporary, and give a list that is empty until it comes."""
    terminated: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        terminated.append(number)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield terminated
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield terminated
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(arguments: list[str]) -> int:
    try:
        result = app(arguments, prog_name="qlora", standalone_mode=False)
        sys.stdout.flush()
        code = result if isinstance(result, int) else 0
        if code == 128 + signal.SIGINT:  # how typer reports an interruption
            print("stopped", file=sys.stderr)
        return code
    except ProviderFailed as error:
        return _provider_failed(error, arguments, None)
    except QLoRAError as error:
        print(f"error: {error}", file=sys.stderr)
        return 128 + getattr(error, "signal", 0) if hasattr(error, "signal") else 2
    except typer.Abort:
        print("stopped", file=sys.stderr)
        return 128 + signal.SIGINT
    except (BrokenPipeError, SystemExit) as error:  # qlora ... | head, which typer makes an exit with 1
        if isinstance(error, SystemExit) and not isinstance(error.__context__, BrokenPipeError):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except Exception as error:
        if hasattr(error, "show") and hasattr(error, "exit_code"):  # a usage error; the class is typer's own
            error.show()
            return int(error.exit_code)
        folder = error.folder if isinstance(error, train.RunCrashed) else None
        cause = error.__cause__ if isinstance(error, train.RunCrashed) else error
        if isinstance(cause, ProviderFailed):
            return _provider_failed(cause, arguments, folder)
        print(
            f"error: {type(cause).__name__}: {cause}\nThis is a defect of qlora-core or of a plugin; "
            f"the traceback is in {_keep_traceback(arguments, folder)}",
            file=sys.stderr,
        )
        return 1


def _provider_failed(error: ProviderFailed, arguments: list[str], folder: Path | None) -> int:
    """Say whose defect it is. One of a stranger's plugin the user can mend: use another, or tell its author."""
    remedy = "this is a defect of qlora-core" if error.ours else "tell its author, or choose another provider"
    print(f"error: {error}\n{remedy}; the traceback is in {_keep_traceback(arguments, folder)}", file=sys.stderr)
    return 1 if error.ours else 2


def _split_resume(arguments: list[str]) -> list[str]:
    """Return *arguments* with `--resume CHECKPOINT` as `--resume-from CHECKPOINT`: an option whose value is optional."""
    split: list[str] = []
    for index, argument in enumerate(arguments):
        following = arguments[index + 1] if index + 1 < len(arguments) else "-"
        is_configuration = following.endswith((".yaml", ".yml")) or os.path.isfile(following)
        if argument.startswith("--resume="):
            split += ["--resume-from", argument.removeprefix("--resume=")]
        elif argument == "--resume" and not following.startswith("-") and not is_configuration:
            split.append("--resume-from")
        else:
            split.append(argument)
    return split


def _keep_traceback(arguments: Sequence[str], folder: Path | None) -> Path:
    """Write the traceback into the run's *folder* if it exists, else into a temporary file, and return the path."""
    text = f"qlora {' '.join(arguments)}\n\n{traceback.format_exc()}"
    if folder is not None and os.path.isdir(folder) and os.access(folder, os.W_OK):
        path = folder / "crash.txt"
    else:
        handle, name = tempfile.mkstemp(prefix="qlora-crash-", suffix=".txt")
        os.close(handle)
        path = Path(name)
    path.write_text(text, encoding="utf-8")
    return path
