"""A Trainer callback that looks for a file. Imported late."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback


class StopOnFile(TrainerCallback):
    """Asks for a checkpoint and the end of training once *path* exists."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.path.exists():
            control.should_save = control.should_training_stop = True
