"""Stop a run on SIGINT or SIGTERM after the step in progress and a checkpoint; a second signal stops it at once."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import transformers

__all__ = ["StopOnSignal"]


class StopOnSignal(transformers.TrainerCallback):
    """Ends training after the current step once a signal has come. `received` is its number, 0 before.

    There may be little time: an evaluation that is due after that step is left to who resumes, and `evaluation_due` says so.
    """

    received = 0
    evaluation_due = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Catch the signals while the block runs; outside the main thread, where Python can't, do nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = number

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save and stop."""
        if self.received:
            self.evaluation_due = control.should_evaluate
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Don't evaluate or save once more."""
        if self.received:
            control.should_evaluate = control.should_save = False
