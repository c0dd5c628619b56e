"""Exit codes: 0 done, 2 the user can mend it, 1 a defect whose traceback is kept, 130 and 143 interrupted."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

CALLBACK = """
    import os, signal
    import qlora_core

    class Odd(qlora_core.CallbackFactory):
        name = "odd"

        def training_arguments(self):
            {early}
            return {{}}

        def build(self, run):
            import transformers

            class Callback(transformers.TrainerCallback):
                def on_step_end(self, args, state, control, **kwargs):
                    {late}

            return Callback()

    @qlora_core.hookimpl
    def qlora_callbacks(): return [Odd]
"""


@pytest.fixture
def odd(write_module: Callable[[str, str], str], write_config: Callable[..., Path], request: Any) -> Callable[..., list[Any]]:
    """Return a function that gives the arguments of a run with a callback that does something odd."""

    def arguments(*, early: str = "pass", late: str = "pass", **changes: Any) -> list[Any]:
        name = write_module(f"odd_{abs(hash(request.node.name))}", CALLBACK.format(early=early, late=late))
        return ["train", write_config(callbacks=["odd"], **changes), "-p", name]

    return arguments


def test_done_is_0(qlora: Callable[..., Any], odd: Callable[..., list[Any]]) -> None:
    assert qlora(*odd(), "-q").code == 0


def test_what_the_user_can_mend_is_2(qlora: Callable[..., Any]) -> None:
    result = qlora("train", "none.yaml")
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("error: none.yaml: ")


def test_a_defect_of_a_plugin_in_a_run_is_2_and_its_traceback_stays_with_the_run(
    qlora: Callable[..., Any], odd: Callable[..., list[Any]], here: Path
) -> None:
    result = qlora(*odd(late="raise ZeroDivisionError('no luck')"), "-q", "--set", "quantizer=none")
    crash = here / "out" / "crash.txt"
    assert (result.code, result.out) == (2, "")
    assert re.fullmatch(
        r"error: callback 'odd' of module 'odd_\d+' failed in on_step_end: ZeroDivisionError: no luck\n"
        rf"tell its author, or choose another provider; the traceback is in {crash}\n",
        result.err,
    )
    text = crash.read_text()
    assert text.startswith("qlora train ")
    assert "Traceback (most recent call last):" in text
    assert "ZeroDivisionError: no luck" in text
    assert "in on_step_end" in text


def test_a_defect_before_the_run_exists_leaves_its_traceback_in_a_temporary_file(
    qlora: Callable[..., Any], odd: Callable[..., list[Any]], here: Path
) -> None:
    result = qlora(*odd(early="raise ZeroDivisionError('no luck')"), "-q")
    assert result.code == 2
    assert " failed in training_arguments: ZeroDivisionError: no luck\n" in result.err
    found = re.search(r"the traceback is in (\S+)$", result.err.strip())
    assert found is not None
    crash = Path(found[1])
    assert "ZeroDivisionError: no luck" in crash.read_text()
    assert not (here / "out").exists()
    crash.unlink()


def test_a_defect_of_a_command_leaves_its_traceback_in_a_temporary_file(
    qlora: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlora_core.cli import config

    def fail(*arguments: Any) -> None:
        raise ZeroDivisionError("no luck")

    monkeypatch.setattr(config, "config_schema", fail)
    result = qlora("config", "schema")
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith("error: ZeroDivisionError: no luck\nThis is a defect of qlora-core or of a plugin; ")
    crash = Path(result.err.strip().rpartition(" ")[2])
    assert "ZeroDivisionError: no luck" in crash.read_text()
    crash.unlink()


def test_a_defect_of_our_own_is_1_and_its_traceback_stays_with_the_run(
    qlora: Callable[..., Any], write_config: Callable[..., Path], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import qlora_console.progress

    def fail(*arguments: Any, **options: Any) -> None:
        raise ZeroDivisionError("no luck")

    monkeypatch.setattr(qlora_console.progress.ProgressDisplay, "on_step_end", fail)
    result = qlora("train", write_config(callbacks=["progress"]), "-q")
    crash = here / "out" / "crash.txt"
    assert (result.code, result.out) == (1, "")
    assert result.err.endswith(
        f"error: callback 'progress' of plugin 'console' (qlora-core {version('qlora-core')}) failed in on_step_end: "
        f"ZeroDivisionError: no luck\nthis is a defect of qlora-core; the traceback is in {crash}\n"
    )
    assert "Traceback (most recent call last):" in crash.read_text()


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_ends_a_run_after_a_checkpoint(
    qlora: Callable[..., Any], odd: Callable[..., list[Any]], here: Path, name: str, code: int
) -> None:
    late = f"state.global_step == 1 and os.kill(os.getpid(), signal.{name})"
    arguments = odd(late=late, training={"max_steps": 5})
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    result = qlora(*arguments, "-q", "--set", "quantizer=none")
    assert (result.code, result.out) == (code, "")
    stopped = re.fullmatch(r"error: stopped at step (\d); continue with --resume\n", result.err)
    assert stopped is not None, result.err
    assert [path.name for path in (here / "out" / "checkpoints").iterdir()] == [f"step-{stopped[1]}"]
    assert not (here / "out" / "adapter").exists()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_outside_of_training_ends_a_command_at_once(
    qlora: Callable[..., Any], odd: Callable[..., list[Any]], here: Path, name: str, code: int
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    sigint = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in the background
    try:
        result = qlora(*odd(early=f"__import__('os').kill(__import__('os').getpid(), __import__('signal').{name})"), "-q")
    finally:
        signal.signal(signal.SIGINT, sigint)
    assert (result.code, result.out, result.err.strip()) == (code, "", "stopped")
    assert not (here / "out").exists()
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("arguments", ["config schema", "--version", "plugins list"])
def test_a_reader_that_goes_away_is_no_error(arguments: str) -> None:
    code = "from qlora_core.cli.main import main; main()"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments.split()], stdout=write, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_very_long_value_after_resume_is_no_traceback(qlora: Callable[..., Any]) -> None:
    result = qlora("train", "--resume", "x" * 5000)
    assert result.code == 2
    assert "Traceback" not in result.err


def test_an_argument_that_the_trainer_refuses_late_is_named(
    qlora: Callable[..., Any], write_config: Callable[..., Path]
) -> None:
    path = write_config(training={"max_steps": 1, "extra": {"use_liger_kernel": True}})
    result = qlora("train", path, "--quiet")
    assert result.code == 2, result.err
    assert "training.extra: the libraries refuse these arguments" in result.err
