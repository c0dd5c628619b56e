"""Stop Python code of the user's, such as a chat template, that does not come to an end. Light."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
import time
from collections.abc import Iterator

__all__ = ["Patience", "TooLong"]


class TooLong(Exception):
    """What code that took too long is stopped with."""


class Patience:
    """A thread that watches one block of code at a time. It ends when nothing is to watch: a block seldom needs a new one."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._start_over()

    def __reduce__(self) -> tuple[type[Patience], tuple[float]]:
        return Patience, (self.seconds,)

    def _start_over(self) -> None:
        self._process = os.getpid()  # threads don't live on in a forked one, locks stay as they were
        self._lock = threading.Lock()
        self._watched = False  # whether there is a thread that watches
        self._until: float | None = None  # while a block runs
        self._pending = False  # whether a TooLong is on its way into it
        self._runner = 0

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Raise TooLong in the block after `seconds`: at its next step of Python, not in the middle of a call into C."""
        if self._process != os.getpid():
            self._start_over()
        with self._lock:
            self._runner, self._until, self._pending = threading.get_ident(), time.monotonic() + self.seconds, False
            if not self._watched:
                self._watched = True
                threading.Thread(target=self._watch, daemon=True).start()
        try:
            yield
        except TooLong:
            self._pending = False
            raise
        finally:
            with self._lock:
                self._until = None
            if self._pending:
                for _ in range(100):  # it is raised here, in one of these steps, and not in what follows
                    time.sleep(0)

    def _watch(self) -> None:
        while True:
            time.sleep(self.seconds / 5)
            with self._lock:
                if self._until is None:
                    self._watched = False
                    return
                if time.monotonic() > self._until:
                    self._until, self._pending = None, True
                    # Never taken back: CPython 3.11 stays in its slow path then, and hangs once a profiler is switched on.
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._runner), ctypes.py_object(TooLong))
