"""A child process, and how much memory it and its own children take while it runs. Imports nothing but the library.

What is counted is resident anonymous and shared memory (`RssAnon + RssShmem` of /proc/PID/status), which a process really
needs. The maximum resident set stands beside it: it also counts pages of mapped files that the system happens to keep.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EVERY = 0.02  # seconds between two samples
FAMILY_EVERY = 10  # samples between two looks for new children


class ChildError(Exception):
    """A child that failed, with the end of what it wrote."""


def memory(pid: int) -> int:
    """Return the bytes of anonymous and shared memory of *pid*; 0 where it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon:", "RssShmem:")))


def largest(pid: int) -> int:
    """Return the largest resident set of *pid* so far, bytes; unlike `ru_maxrss` it does not begin with that of its parent."""
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    return 0


def family(pid: int) -> list[int]:
    """Return *pid* and its descendants."""
    pids = [pid]
    for one in pids:  # grows meanwhile
        for children in Path(f"/proc/{one}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                pids += [int(child) for child in children.read_text().split()]
    return pids


def busy() -> float:
    """Return the CPU seconds that all processes of this machine, and whoever else has its cores, have taken so far."""
    with contextlib.suppress(OSError):
        user, nice, system, _, _, *interrupts = (int(word) for word in Path("/proc/stat").read_text().split()[1:9])
        return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")
    return 0.0


class Sampler(threading.Thread):
    """Keeps the memory of *pid* and its descendants over time: (s of the monotonic clock, bytes)."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid = pid
        self.series: list[tuple[float, int]] = []
        self.resident = 0
        self._ended = threading.Event()

    def run(self) -> None:
        """Sample until told to end."""
        pids = [self.pid]
        while not self._ended.wait(EVERY):
            if len(self.series) % FAMILY_EVERY == 0:
                pids = family(self.pid)
            self.series.append((time.monotonic(), sum(memory(pid) for pid in pids)))
            self.resident = max(self.resident, *(largest(pid) for pid in pids))

    def end(self) -> list[tuple[float, int]]:
        """Return the series, and sample no more."""
        self._ended.set()
        self.join()
        return self.series


@dataclass(frozen=True)
class Reading:
    """What one child said and took."""

    report: dict[str, Any]
    """The JSON object that it printed last."""
    started: float
    """s of the monotonic clock, which all processes share."""
    seconds: float
    resident: int
    """Its largest resident set, bytes."""
    series: list[tuple[float, int]]
    others: float = 0.0
    """Cores that others than the child took meanwhile, on average: where it is not near 0, its speed means little."""

    def peak(self, begin: float = 0.0, end: float = float("inf")) -> int:
        """Return the most bytes between two times of the monotonic clock."""
        return max((used for when, used in self.series if begin <= when <= end), default=0)


def call(command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
    """Run *command*, unwatched; raise ChildError where it fails."""
    done = subprocess.run(command, env={**os.environ, **(environment or {})}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ChildError(f"{' '.join(command)}\nended with {done.returncode}\n{done.stderr[-3000:]}")


def run(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Reading:
    """Run *command* to its end and return the reading; raise ChildError where it fails or prints no JSON object."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        started, before = time.monotonic(), busy()
        child = subprocess.Popen(command, stdout=out, stderr=err, env={**os.environ, **(environment or {})})
        sampler = Sampler(child.pid)
        sampler.start()
        try:
            _, status, usage = os.wait4(child.pid, 0)
        except BaseException:
            child.kill()
            raise
        child.returncode = os.waitstatus_to_exitcode(status)
        seconds, series = time.monotonic() - started, sampler.end()
        others = max(0.0, busy() - before - usage.ru_utime - usage.ru_stime) / seconds
        out.seek(0)
        err.seek(0)
        lines, said = out.read().strip().splitlines(), err.read()
    try:
        report = json.loads(lines[-1]) if child.returncode == 0 else None
    except (IndexError, ValueError):
        report = None
    if not isinstance(report, dict):
        raise ChildError(f"{' '.join(command)}\nended with {child.returncode}\n{said[-3000:]}")
    return Reading(report, started, seconds, sampler.resident, series, others)
