"""Running many generated cases: in this process with a time limit, or each in a forked one that may also crash.

The short run is the same each time. `QLORA_FUZZ=long` makes it long and different each time: it goes on after a failure and
lists all of them at the end. `QLORA_FUZZ=0.1` is a tenth of that.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.configuration import set_hypothesis_home_dir

ASKED = os.environ.get("QLORA_FUZZ", "")
LONG = float(ASKED.replace("long", "1") or 0)  # 0 for the short run, else the share of the cases of the long one
SECONDS = 20  # a case may take
SHOWN = 40  # failures that a long run lists

set_hypothesis_home_dir(Path(tempfile.gettempdir()) / "qlora-fuzz")  # not into the working directory


class Hang(BaseException):
    """A case that took too long; no Exception, so that nothing on the way takes it for one of its own."""


@dataclass(frozen=True)
class Result:
    """What a command gave: exit code, standard output, standard error."""

    code: int
    out: str
    err: str


Run = Callable[..., Result]


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raise Hang after *seconds*; where no Python code runs that could be interrupted, end the process with a traceback."""

    def hang(*_: Any) -> None:
        raise Hang(f"longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, hang)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    faulthandler.dump_traceback_later(3 * seconds, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="session")
def qlora(qlora: Callable[..., Any]) -> Run:
    """Return a function that runs `qlora` with the given arguments in this process, at most 20 s."""

    def run(*arguments: object) -> Result:
        with limited(SECONDS):
            done = qlora(*arguments)
        return Result(done.code, done.out, done.err + _crash(done.err))

    return run


@pytest.fixture(scope="session")
def forked() -> Iterator[Run]:
    """Return the same as a process of its own, which has the libraries imported already: see forks.py."""
    alone = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}
    command = [sys.executable, str(Path(__file__).with_name("forks.py"))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | alone) as server:
        asked, answers = server.stdin, server.stdout
        assert asked is not None
        assert answers is not None

        def run(*arguments: object) -> Result:
            json.dump([[str(argument) for argument in arguments], os.getcwd(), dict(os.environ)], asked)
            print(file=asked, flush=True)
            code, out, err = json.loads(answers.readline())
            return Result(code, out, err + _crash(err))

        yield run


def _crash(err: str) -> str:
    """Return the traceback of the file that *err* names, which is removed."""
    found = re.search(r"the traceback is in (\S+)$", err.strip())
    path = Path(found[1]) if found else None
    if path is None or not path.is_file():
        return ""
    text = path.read_text(encoding="utf-8")
    path.unlink()
    return f"\n{text}"


@pytest.fixture
def explore(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """Return a function that lets `check` judge *short* cases of a strategy, or in a long run *long* of them.

    `check` asserts, and returns one word for how the case ended; these are counted.
    """

    def run(cases: Any, check: Callable[[Any], str], *, short: int, long: int) -> None:
        count: Counter[str] = Counter()
        failures: dict[str, str] = {}

        def one(case: Any) -> None:
            try:
                count[check(case)] += 1
            except (AssertionError, Exception, Hang) as error:
                if not LONG:
                    raise
                count["failed"] += 1
                failures.setdefault(_kind(error), f"{case!r:.3000}\n{str(error)[-3000:]}")

        how = settings(
            max_examples=max(1, round(long * LONG)) if LONG else short,
            derandomize=not LONG,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate] if LONG else [Phase.generate, Phase.shrink],
        )
        how(given(cases)(one))()
        record_property("fuzz", f"{sum(count.values())} cases: {', '.join(f'{n} {word}' for word, n in count.most_common())}")
        assert not failures, f"{len(failures)} kinds of failure\n\n" + "\n\n".join([*failures.values()][:SHOWN])

    return run


def _kind(error: BaseException) -> str:
    """Return what tells one kind of failure from another: the first exception in a traceback, without numbers and paths."""
    lines = str(error).strip().splitlines() or [""]
    raised = next((line for line in lines if re.match(r"[\w.]+(Error|Exception|Warning): ", line)), lines[-1])
    return f"{type(error).__name__} {re.sub(r'[0-9]+|/[^ ]*', '', raised)[:150]}"


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say how many cases each test had."""
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, value in getattr(report, "user_properties", ()):
                if name == "fuzz" and report.when == "call":
                    terminalreporter.write_line(f"{report.nodeid.rpartition('::')[2]}: {value}")


@pytest.fixture(autouse=True)
def _surroundings(plain_surroundings: None) -> None:
    """Run each test in a folder of its own."""
