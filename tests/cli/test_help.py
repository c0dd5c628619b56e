"""Help everywhere, with examples, at once, and without a heavy import."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_core import __version__

HEAVY = ("torch", "transformers", "peft", "bitsandbytes", "datasets", "numpy")
SECONDS = 0.6  # in which a light command answers; of processor time, so that a busy machine does not fail the test
BELOW = "pluggy, pydantic, rich.console, typer, yaml"  # what every command imports
SHARE = 2.5  # of the time that these imports take, where a slow machine takes long for them, too
TRIES = 8  # beside other work on the same core a process takes longer

COMMANDS = [
    ["train"],
    ["generate"],
    ["eval"],
    ["data"],
    ["export"],
    ["verify"],
    ["quantize"],
    ["demo"],
    ["doctor"],
    ["plugins", "list"],
    ["plugins", "show"],
    ["config", "init"],
    ["config", "show"],
    ["config", "schema"],
]
WRONG = "model: m\ndataset: {name: text, path: x}\ntraining: {lr: 1}\n"
LIGHT = {
    "--help": 0,
    "--version": 0,
    "train --help": 0,
    "quantize --help": 0,
    "plugins list": 0,
    "plugins list --json": 0,
    "plugins show lora": 0,
    "config show right.yaml": 0,
    "config schema": 0,
    "config init new.yaml": 0,
    "train wrong.yaml": 2,
    "train missing.yaml": 2,
    "quantize m out --quantizer nf5": 2,
    "train right.yaml --set quantizer=nf5": 2,
    "train right.yaml --set adapter.init=pissa": 2,
    "train right.yaml --set dataset.path=missing.txt": 2,
}


@pytest.fixture
def light_folder(here: Path) -> Path:
    (here / "x.txt").write_text("text")
    (here / "wrong.yaml").write_text(WRONG)
    (here / "right.yaml").write_text("model: m\ndataset: {name: text, path: x.txt}\n")
    return here


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_explains_itself_with_an_example(qlora: Callable[..., Any], command: list[str]) -> None:
    result = qlora(*command, "--help")
    assert result.code == 0
    assert f"qlora {' '.join(command)}" in result.out
    assert "Example" in result.out
    assert "\x1b" not in result.out
    assert result.err == ""
    assert qlora(*command, "-h").out == result.out


def test_the_first_help_names_every_command(qlora: Callable[..., Any]) -> None:
    result = qlora("--help")
    assert result.code == 0
    assert all(command[0] in result.out for command in COMMANDS)


def test_qlora_alone_shows_the_help(qlora: Callable[..., Any]) -> None:
    result = qlora()
    assert "Usage: qlora" in result.out + result.err
    assert "train" in result.out + result.err


@pytest.mark.parametrize("group", ["plugins", "config"])
def test_a_group_alone_shows_its_commands(qlora: Callable[..., Any], group: str) -> None:
    result = qlora(group)
    assert f"Usage: qlora {group}" in result.out + result.err


def test_the_version_is_printed(qlora: Callable[..., Any]) -> None:
    result = qlora("--version")
    assert (result.code, result.out) == (0, f"qlora-core {__version__}\n")


def run_light(arguments: str) -> subprocess.CompletedProcess[str]:
    code = (
        "import sys, atexit\n"
        f"atexit.register(lambda: print('HEAVY', [n for n in {HEAVY!r} if n in sys.modules], file=sys.stderr))\n"
        "from qlora_core.cli.main import main\nmain()"
    )
    return subprocess.run([sys.executable, "-c", code, *arguments.split()], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("arguments", LIGHT)
def test_what_needs_no_model_imports_nothing_heavy(light_folder: Path, arguments: str) -> None:
    done = run_light(arguments)
    assert done.returncode == LIGHT[arguments], done.stderr
    assert done.stderr.splitlines()[-1] == "HEAVY []"
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", ["--help", "train --help", "plugins list", "config show right.yaml", "train wrong.yaml"])
def test_what_needs_no_model_answers_at_once(light_folder: Path, arguments: str) -> None:
    def seconds(code: str, *words: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-c", code, *words]
        subprocess.run(command, capture_output=True, check=False, env={**os.environ, "PYTHONDONTWRITEBYTECODE": ""})
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime

    tries = []
    for _ in range(TRIES):
        took = seconds("from qlora_core.cli.main import main; main()", *arguments.split())
        tries.append((took, max(SECONDS, SHARE * seconds(f"import {BELOW}"))))
        if took < tries[-1][1]:
            return
    pytest.fail(f"seconds and those allowed: {tries}")
