"""When each training step began and ended, and what it trained on: the same callback watches peers and ours."""

from __future__ import annotations

import time
from typing import Any

import transformers

IGNORED = -100


class Clock(transformers.TrainerCallback):
    """Keeps, for each optimiser step, times (s, of the monotonic clock, the same in all processes), loss and tokens."""

    def __init__(self) -> None:
        self.train_begin = 0.0
        self.begins: list[float] = []
        self.ends: list[float] = []
        self.losses: list[float] = []
        self.positions: list[int] = []
        self.supervised: list[int] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any) -> None:
        """Count the tokens of each batch from here on, where it is put together."""
        self.train_begin = time.monotonic()
        loader = getattr(train_dataloader, "base_dataloader", train_dataloader)
        collate = loader.collate_fn

        def counted(rows: Any) -> Any:
            batch = collate(rows)
            self.positions.append(batch["input_ids"].numel())
            self.supervised.append(int((batch["labels"][:, 1:] != IGNORED).sum()))
            return batch

        loader.collate_fn = counted

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the time."""
        self.begins.append(time.monotonic())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the time."""
        self.ends.append(time.monotonic())

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Keep the loss, nats per supervised token."""
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))

    def report(self) -> dict[str, Any]:
        """Return all of it; batches that were fetched ahead and not trained are left out."""
        steps = len(self.ends)
        return {
            "train_begin": self.train_begin,
            "begins": self.begins,
            "ends": self.ends,
            "losses": self.losses,
            "positions": self.positions[:steps],
            "supervised": self.supervised[:steps],
        }
