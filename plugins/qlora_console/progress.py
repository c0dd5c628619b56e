"""The live display of a training run. Imported late."""

from __future__ import annotations

import atexit
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback


class ProgressDisplay(TrainerCallback):
    """A bar on a terminal, a line per log elsewhere, nothing when *quiet*. Everything goes to standard error."""

    def __init__(self, *, quiet: bool = False, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._quiet = quiet
        self._bar: Progress | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show the bar."""
        if self._quiet or not state.is_world_process_zero or not self._console.is_terminal:
            return
        self._bar = Progress(
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            TextColumn("{task.fields[figures]}"),
            expand=True,
            console=self._console,
        )
        self._task = self._bar.add_task("training", total=state.max_steps, completed=state.global_step, figures="")
        self._bar.start()
        atexit.register(self._bar.stop)  # an error ends training without on_train_end, and the cursor is hidden

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Advance the bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Show the figures of a log or an evaluation line."""
        if self._quiet or not state.is_world_process_zero or not logs:
            return
        if "loss" in logs:
            figures = (
                f"loss {logs['loss']:.3f} · {logs['tokens_per_second']:,.0f} tokens/s · "
                f"peak {logs['peak_memory_bytes'] / 1e9:.2f} GB"
            )
            if self._bar is not None:
                self._bar.update(self._task, figures=figures)
            else:
                self._say(f"step {state.global_step}/{state.max_steps} · {figures}")
        elif "eval_loss" in logs:
            self._say(
                f"step {state.global_step}/{state.max_steps} · eval loss {logs['eval_loss']:.4f} · "
                f"perplexity {logs['perplexity']:.3f}"
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the finished bar standing."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _say(self, line: str) -> None:
        self._console.print(line, highlight=False)
